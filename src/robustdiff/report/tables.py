"""Tables of results for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustdiff.errors import printable
from robustdiff.evaluation.grid import FILE, Cell, Grid, numbers_of
from robustdiff.metrics.metric import Number
from robustdiff.notation import interval
from robustdiff.notation import number as shown_number
from robustdiff.study.analysis import agreeing_digits
from robustdiff.study.estimate import Remaining
from robustdiff.study.store import MEASURES

__all__ = ["cell_table", "grid_table", "print_whole", "remaining_table", "reproduced_table", "shown"]


def shown(name: str) -> Text:
    """Return a name from a file or the command line as text without markup, emoji codes or control characters."""
    return Text(printable(name))


def print_whole(console: Console, table: Table) -> None:
    """Print a table at its full width, even if the terminal is narrower."""
    width = console.width
    console.width = max(width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    console.width = width


def cell_table(cells: Sequence[Cell]) -> Table:
    """Return a table with a row for each cell and its numbers, without details, and the images where they differ.

    "—" means not applicable or unknown.
    """
    numbers = [number for number in numbers_of(cells) if not number.detail]
    counts = len({cell.n for cell in cells}) > 1
    # Without edges the default metrics fit into a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("sampler", no_wrap=True)
    for heading in [*(["images"] if counts else []), *(number.title for number in numbers)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            shown(cell.checkpoint),
            "—" if cell.sampler == FILE else f"{cell.sampler} {cell.steps}",
            *([f"{cell.n:,}"] if counts else []),
            *(_value(cell, number) for number in numbers),
        )
    return table


def _value(cell: Cell, number: Number) -> str:
    """Return a number with its 95 % interval, or with its standard error."""
    value = cell.values.get(number.name)
    if value is None:
        return "—"
    return interval(value, cell.intervals.get(number.name), number.format, cell.values.get(f"{number.name}_se"))


def grid_table(grid: Grid, baseline: str, number: Number) -> Table:
    """Return a table of a number, and of its change against a baseline with the 95 % interval, of sampled cells."""
    checkpoints = list(dict.fromkeys(cell.checkpoint for cell in grid.cells))
    cells = {(c.checkpoint, c.sampler, c.steps): c for c in grid.cells}
    differences = {
        (d.checkpoint, d.baseline, d.sampler, d.steps): d for d in grid.differences if d.number == number.name
    }
    lower, higher = {"lower": ("green", "red"), "higher": ("red", "green"), None: ("", "")}[number.better]
    styles = {-1: lower, 0: "dim", 1: higher}
    # Three checkpoints fit into a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, caption_justify="left")
    table.add_column("", no_wrap=True)
    for checkpoint in checkpoints:
        table.add_column(shown(checkpoint), justify="right", no_wrap=True)
        if checkpoint != baseline:
            table.add_column(shown(f"vs {baseline}"), justify="right", no_wrap=True)
    rows = list(dict.fromkeys((c.sampler, c.steps) for c in grid.cells))
    for i, (sampler, steps) in enumerate(rows):
        row: list[str | Text] = [f"{sampler} {steps}"]
        for checkpoint in checkpoints:
            cell = cells[checkpoint, sampler, steps]
            row.append(shown_number(cell.values[number.name] or 0.0, number.format))
            if checkpoint != baseline:
                difference = differences[checkpoint, baseline, sampler, steps]
                row.append(Text(difference.text(), style=styles[difference.sign]))
        table.add_row(*row, end_section=i + 1 < len(rows) and rows[i + 1][0] != sampler)
    if len(checkpoints) > 1 and number.better is not None:
        table.caption = "green: better, red: worse, by an interval that excludes 0"
    return table


def remaining_table(parts: Sequence[Remaining]) -> Table:
    """Return a table of the work that is left in a study, by method, with the hours of one process."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    runs, cells, seconds = (sum(values) for values in zip(*((p.runs, p.cells, p.seconds) for p in parts), strict=True))
    table.add_column("method", "in all", no_wrap=True)
    table.add_column("runs to train", str(runs), justify="right")
    table.add_column("cells to measure", str(cells), justify="right")
    table.add_column("hours of one process", f"{seconds / 3600:.2f}", justify="right")
    for part in parts:
        table.add_row(shown(part.method), str(part.runs), str(part.cells), f"{part.seconds / 3600:.2f}")
    return table


def reproduced_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Return a table of the numbers of a cell in its file and as reproduced."""
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    for heading in ("", "in the file", "made again", ""):
        table.add_column(heading, no_wrap=True)
    for name in (*MEASURES, "weights"):
        values = [record[name] for record in (before, after)]
        if values[0] == values[1]:
            verdict = "same"
        elif name in MEASURES:
            verdict = f"{agreeing_digits(*values)} digits"
        else:
            verdict = "differs"
        table.add_row(name, *(shown(str(value)[:20]) for value in values), verdict)
    return table
