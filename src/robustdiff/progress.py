"""The progress of long work, told to whoever shows it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SILENT", "Progress"]


class Progress(Protocol):
    """Something that is told how far work has come, such as :class:`robustdiff.report.bar.Bar`."""

    def begin(self, description: str, total: float) -> None:
        """Begin a part of the work.

        Arguments:
            description: Its name.
            total: Its size, in any unit.
        """

    def advance(self, amount: float, note: str = "") -> None:
        """Say that more of the part is done.

        Arguments:
            amount: How much more, in the unit of its size.
            note: What else there is to say, such as the loss.
        """


class _Silent:
    def begin(self, description: str, total: float) -> None: ...

    def advance(self, amount: float, note: str = "") -> None: ...


SILENT: Progress = _Silent()
"""The progress that nobody looks at."""
