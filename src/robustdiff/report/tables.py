"""Tables of results for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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

Key = TypeVar("Key")


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
    """Return a table with a row for each cell and its numbers, without details, under the name of its source.

    The number of images is beside the name where it is not the same for all. "—" means not applicable or unknown.
    """
    numbers = [number for number in numbers_of(cells) if not number.detail]
    counts = len({cell.n for cell in cells}) > 1
    # Names have rows of their own, so that the default metrics fit into a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, show_edge=False)
    for heading in ("", *(number.title for number in numbers)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, own in _grouped(cells, lambda cell: cell.checkpoint).items():
        count = f"{own[0].n:,} images" if counts else ""
        table.add_row(shown(name), *([count] if numbers else []), style="bold")
        for cell in own:
            place = "—" if cell.sampler == FILE else f"{cell.sampler} {cell.steps}"
            table.add_row(f" {place}", *(_value(cell, number) for number in numbers), end_section=cell is own[-1])
    return table


def _grouped(cells: Sequence[Cell], key: Callable[[Cell], Key]) -> dict[Key, list[Cell]]:
    """Return the cells of each key, in their order."""
    found: dict[Key, list[Cell]] = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return found


def _value(cell: Cell, number: Number) -> str:
    """Return a number with its 95 % interval, or with its standard error."""
    value = cell.values.get(number.name)
    if value is None:
        return "—"
    return interval(value, cell.intervals.get(number.name), number.format, cell.values.get(f"{number.name}_se"))


def grid_table(grid: Grid, baseline: str, number: Number) -> Table:
    """Return a table of a number, and of its change against a baseline with the 95 % interval, of sampled cells.

    The networks are below each other, at equal sampler and steps.
    """
    differences = {
        (d.checkpoint, d.baseline, d.sampler, d.steps): d for d in grid.differences if d.number == number.name
    }
    lower, higher = {"lower": ("green", "red"), "higher": ("red", "green"), None: ("", "")}[number.better]
    styles = {-1: lower, 0: "dim", 1: higher}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, caption_justify="left")
    for heading in ("", "", number.title, shown(f"vs {baseline}")):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for (sampler, steps), cells in _grouped(grid.cells, lambda cell: (cell.sampler, cell.steps)).items():
        for cell in cells:
            change = differences.get((cell.checkpoint, baseline, sampler, steps))
            table.add_row(
                f"{sampler} {steps}" if cell is cells[0] else "",
                shown(cell.checkpoint),
                shown_number(cell.values[number.name] or 0.0, number.format),
                "" if change is None else Text(change.text(), style=styles[change.sign]),
                end_section=cell is cells[-1],
            )
    if differences and number.better is not None:
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
