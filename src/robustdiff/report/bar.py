"""Display of the progress of long work: a bar on a terminal, else a line every 30 seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robustdiff.errors import printable

__all__ = ["Bar"]

_LINE_EVERY = 30.0  # seconds, where there is no terminal


class Bar:
    """A progress bar with a note, as a context manager. It implements :class:`robustdiff.progress.Progress`.

    Arguments:
        console: The console of the output.
        quiet: Show nothing, for all processes but the main one.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=0, visible=False, note="")
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, description: str, total: float) -> None:
        """Start the display of another part of the work at 0."""
        self._progress.reset(self._task, total=total, visible=True, description=printable(description), note="")

    def advance(self, amount: float, note: str = "") -> None:
        """Add an amount to the completed work, and show a note."""
        self._progress.update(self._task, advance=amount, note=printable(note))
        now, task = time.monotonic(), self._progress.tasks[0]
        if not self.quiet and not self.console.is_terminal and now - self._shown > _LINE_EVERY:
            self._shown = now
            self.console.print(
                f"{task.description}: {task.completed:g} of {task.total:g} in {now - self._started:.0f} s  "
                f"{task.fields['note']}",
                highlight=False,
                markup=False,
                emoji=False,
            )
