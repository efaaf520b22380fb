"""The command `robustdiff reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustdiff.cli import app, err, out, say
from robustdiff.errors import RunError


@app.command()
def reproduce(
    cell: Annotated[Path, typer.Argument(help="The file of a cell.")],
    output: Annotated[Path, typer.Option(help="A folder for the run.")] = Path("reproduced"),
) -> None:
    """Make one cell of a study again, from the settings in its file alone, and compare."""
    from robustdiff.report.bar import Bar
    from robustdiff.report.tables import print_whole, reproduced_table
    from robustdiff.study import MEASURES
    from robustdiff.study import reproduce as run

    with Bar(err) as bar:
        result = run(cell, output, on_part=bar.begin, on_progress=bar.update)
    if result is None:
        say(f"stopped; robustdiff reproduce {cell} --output {output} goes on from here", err)
        return
    before, after = result
    print_whole(out, reproduced_table(before, after))
    if any(before[name] != after[name] for name in ("weights", "replicates", *MEASURES)):
        raise RunError("the cell is not the same: another machine, torch or number of threads rounds differently")
    say("the same to the last digit")
