"""The grid as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustdiff.errors import printable
from robustdiff.evaluation.grid import FILE, Cell, Grid
from robustdiff.study.analysis import agreeing_digits
from robustdiff.study.estimate import Remaining
from robustdiff.study.store import MEASURES

__all__ = ["cell_table", "grid_table", "print_whole", "remaining_table", "reproduced_table", "shown"]


def shown(name: str) -> Text:
    """Return a name from a file or the command line as it is: without markup, emoji codes or control characters."""
    return Text(printable(name))


def print_whole(console: Console, table: Table) -> None:
    """Print a table at its full width, however narrow the terminal: what is cut off cannot be read elsewhere."""
    width = console.width
    console.width = max(width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    console.width = width


def cell_table(cells: Sequence[Cell]) -> Table:
    """Return one row for each cell, with all that was measured of it; "—" is what does not apply or is not known."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("", no_wrap=True)
    table.add_column("sampler", no_wrap=True)
    for heading in ("steps", "images", "FID", "KID", "precision", "recall", "brightness"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            shown(cell.checkpoint),
            "—" if cell.sampler == FILE else cell.sampler,
            "—" if cell.steps is None else str(cell.steps),
            str(cell.n),
            f"{cell.fid:.2f} ±{(cell.fid_ci[1] - cell.fid_ci[0]) / 2:.2g}",
            "—" if cell.kid is None or cell.kid_se is None else f"{cell.kid:.4g} ±{cell.kid_se:.2g}",
            "—" if cell.precision is None else f"{cell.precision:.3f}",
            "—" if cell.recall is None else f"{cell.recall:.3f}",
            f"{cell.brightness:.1f}",
        )
    return table


def grid_table(grid: Grid, baseline: str) -> Table:
    """Samplers and steps down, checkpoints across: FID ± half of its 95 % interval, and the difference to a baseline.

    Arguments:
        grid: The results, all of checkpoints.
        baseline: The checkpoint that the others are compared with.
    """
    checkpoints = list(dict.fromkeys(cell.checkpoint for cell in grid.cells))
    cells = {(c.checkpoint, c.sampler, c.steps): c for c in grid.cells}
    differences = {(d.checkpoint, d.baseline, d.sampler, d.steps): d for d in grid.differences}
    # Narrow enough for a terminal of 80 columns with three checkpoints.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, caption_justify="left")
    table.add_column("", no_wrap=True)
    for checkpoint in checkpoints:
        table.add_column(shown(checkpoint), justify="right", no_wrap=True)
        if checkpoint != baseline:
            table.add_column(shown(f"to {baseline}"), justify="right", no_wrap=True)
    rows = list(dict.fromkeys((c.sampler, c.steps) for c in grid.cells))
    for i, (sampler, steps) in enumerate(rows):
        row: list[str | Text] = [f"{sampler} {steps}"]
        for checkpoint in checkpoints:
            cell = cells[checkpoint, sampler, steps]
            row.append(f"{cell.fid:.2f} ±{(cell.fid_ci[1] - cell.fid_ci[0]) / 2:.2g}")
            if checkpoint != baseline:
                difference = differences[checkpoint, baseline, sampler, steps]
                low, high = difference.fid_ci
                style = "green" if high < 0 else "red" if low > 0 else "dim"
                if difference.relative is None:  # of a baseline whose FID is 0
                    text = f"{difference.fid:+.2f} ({low:+.2f}…{high:+.2f})"
                else:
                    low, high = (100 * end / cells[baseline, sampler, steps].fid for end in difference.fid_ci)
                    text = f"{difference.relative:+.0%} ({low:+.0f}…{high:+.0f})"
                row.append(Text(text, style=style))
        table.add_row(*row, end_section=i + 1 < len(rows) and rows[i + 1][0] != sampler)
    if len(checkpoints) > 1:
        table.caption = "green and red: the interval of the difference excludes 0"
    return table


def remaining_table(parts: Sequence[Remaining]) -> Table:
    """What is left of a study, method by method, and the hours that one process takes for it."""
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
    """A cell as it was and as it was made again."""
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
