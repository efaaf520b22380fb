"""Display of the progress of long work: a bar on a terminal or in a notebook, else a line every 30 seconds."""

from __future__ import annotations

import html
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from robustdiff.errors import printable

__all__ = ["Bar"]

_LINE_EVERY = 30.0  # seconds, where there is no terminal
_DRAW_EVERY = 0.3  # seconds, in a notebook


class _Shortened(TextColumn):
    """Show a column, shortened where the line is longer than the terminal is wide."""

    def __init__(self, text: str) -> None:
        super().__init__(text, markup=False, table_column=Column())

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Bar:
    """A progress bar with a note, as a context manager. It implements :class:`robustdiff.progress.Progress`.

    In a notebook it is an HTML element, which needs no widgets.

    Args:
        console: The console of the output; by default that of stderr.
        quiet: Show nothing, for all processes but the main one.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console, self.quiet = Console(stderr=True) if console is None else console, quiet
        self._progress = Progress(
            _Shortened("{task.description}"),
            BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _Shortened("{task.fields[note]}"),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("eta"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=self.console,
            disable=quiet or self.console.is_jupyter or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=0, visible=False, note="")
        self._started = self._shown = time.monotonic()
        self._notebook: Any = None

    def __enter__(self) -> Bar:
        self._progress.start()
        if self.console.is_jupyter and not self.quiet:
            from IPython.display import display

            self._notebook = display(self, display_id=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._notebook is not None:
            self._notebook.update(self)

    def begin(self, description: str, total: float) -> None:
        """Start the display of another part of the work at 0."""
        self._progress.reset(self._task, total=total, visible=True, description=printable(description), note="")

    def advance(self, amount: float, note: str = "") -> None:
        """Add an amount to the completed work, and show a note."""
        self._progress.update(self._task, advance=amount, note=printable(note))
        now = time.monotonic()
        if self._notebook is not None:
            if now - self._shown > _DRAW_EVERY:
                self._shown = now
                self._notebook.update(self)
        elif not self.quiet and not self.console.is_terminal and now - self._shown > _LINE_EVERY:
            self._shown = now
            self.console.print(repr(self), highlight=False, markup=False, emoji=False, soft_wrap=True)

    def __repr__(self) -> str:
        task = self._progress.tasks[0]
        passed = time.monotonic() - self._started
        done = f"{task.description}: {task.completed:,.0f} of {task.total:,.0f} in {passed:.0f} s"
        return f"{done}  {task.fields['note']}".rstrip()

    def _repr_html_(self) -> str:
        task, text = self._progress.tasks[0], html.escape(repr(self))
        return (
            f'<progress value="{task.completed:g}" max="{task.total or 1:g}" aria-label="progress"></progress> {text}'
        )
