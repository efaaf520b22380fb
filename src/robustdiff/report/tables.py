"""The grid as a table on the terminal."""

from __future__ import annotations

from rich.table import Table

from robustdiff.evaluation.grid import Grid

__all__ = ["grid_table"]


def grid_table(grid: Grid, baseline: str) -> Table:
    """Samplers and steps down, checkpoints across: FID ± half of its 95 % interval, and the difference to a baseline.

    Arguments:
        grid: The results.
        baseline: The checkpoint that the others are compared with.
    """
    checkpoints = list(dict.fromkeys(cell.checkpoint for cell in grid.cells))
    cells = {(c.checkpoint, c.sampler, c.steps): c for c in grid.cells}
    differences = {(d.checkpoint, d.baseline, d.sampler, d.steps): d for d in grid.differences}
    table = Table()
    table.add_column("sampler")
    table.add_column("steps", justify="right")
    for checkpoint in checkpoints:
        table.add_column(checkpoint, justify="right")
        if checkpoint != baseline:
            table.add_column(f"− {baseline}", justify="right")
    previous = ""
    for sampler, steps in dict.fromkeys((c.sampler, c.steps) for c in grid.cells):
        if previous and sampler != previous:
            table.add_section()
        row = [sampler if sampler != previous else "", str(steps)]
        previous = sampler
        for checkpoint in checkpoints:
            cell = cells[checkpoint, sampler, steps]
            row.append(f"{cell.fid:.2f} ± {(cell.fid_ci[1] - cell.fid_ci[0]) / 2:.2f}")
            if checkpoint != baseline:
                difference = differences[checkpoint, baseline, sampler, steps]
                low, high = difference.fid_ci
                style = "green" if high < 0 else "red" if low > 0 else "dim"
                row.append(f"[{style}]{difference.relative:+.1%} ({low:+.2f} … {high:+.2f})[/]")
        table.add_row(*row)
    if len(checkpoints) > 1:
        table.caption = "negative: better than the baseline; green and red: the interval of the difference excludes 0"
    return table
