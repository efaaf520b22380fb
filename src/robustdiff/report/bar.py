"""What long work shows while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robustdiff.errors import printable

__all__ = ["Bar"]

_LINE_EVERY = 30.0  # seconds, where there is no terminal


class Bar:
    """A progress bar with a note beside it, as a context manager.

    Arguments:
        console: Where it is shown.
        description: What is being done.
        total: How many units it takes.
        quiet: Show nothing, as in all processes but the first.
    """

    def __init__(self, console: Console, description: str, total: float, quiet: bool = False) -> None:
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
        self._task = self._progress.add_task(printable(description), total=total, note="")
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, description: str, total: float) -> None:
        """Begin a part of the work."""
        self.describe(description, total)

    def describe(self, description: str, total: float | None = None) -> None:
        """Go on to another part of the work; with a total, from 0."""
        description = printable(description)
        self._progress.update(self._task, description=description, total=total, note="")
        if total is not None:
            self._progress.reset(self._task, total=total, description=description, note="")

    def update(self, completed: float, note: str = "") -> None:
        """Set how much is done."""
        note = printable(note)
        self._progress.update(self._task, completed=completed, note=note)
        now = time.monotonic()
        if not self.quiet and not self.console.is_terminal and now - self._shown > _LINE_EVERY:
            self._shown = now
            task = self._progress.tasks[0]
            self.console.print(
                f"{task.description}: {completed:g} of {task.total:g} in {now - self._started:.0f} s  {note}",
                highlight=False,
                markup=False,
                emoji=False,
            )

    def advance(self, amount: float, note: str = "") -> None:
        """Add to how much is done."""
        self.update(self._progress.tasks[0].completed + amount, note)
