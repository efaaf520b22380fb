"""The protocol by which long computations report their progress."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SILENT", "Progress"]


class Progress(Protocol):
    """A receiver of progress, such as the progress bar :class:`robustdiff.report.bar.Bar`."""

    def begin(self, description: str, total: float) -> None:
        """Begin a part of the work.

        Args:
            description: The name of the part.
            total: The size of the part, in any unit.
        """

    def advance(self, amount: float, note: str = "") -> None:
        """Report progress in the current part.

        Args:
            amount: The amount of work done since the last call, in the unit of the part's size.
            note: Additional text, such as the loss.
        """


class _Silent:
    def begin(self, description: str, total: float) -> None: ...

    def advance(self, amount: float, note: str = "") -> None: ...


SILENT: Progress = _Silent()
"""A receiver that ignores all progress."""
