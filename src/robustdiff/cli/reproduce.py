"""The command `robustdiff reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustdiff.cli import INTERRUPTED, app, err, out, say


@app.command(short_help="Make one result of a study again, and compare")
def reproduce(
    cell: Annotated[Path, typer.Argument(help="The file of a cell.")],
    output: Annotated[Path, typer.Option(help="A folder for the run.")] = Path("reproduced"),
) -> None:
    """Make one cell of a study again, from the settings in its file alone, and compare."""
    from robustdiff.report.bar import Bar
    from robustdiff.report.tables import print_whole, reproduced_table
    from robustdiff.study.analysis import compare
    from robustdiff.study.run import reproduce as run

    with Bar(err) as bar:
        result = run(cell, output, progress=bar)
    if result is None:
        say(f"stopped; robustdiff reproduce {cell} --output {output} goes on from here", err)
        raise typer.Exit(INTERRUPTED)
    print_whole(out, reproduced_table(*result))
    say(compare(*result))
