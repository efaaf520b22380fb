"""The command `robustdiff study`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustdiff.cli import INTERRUPTED, app, err, out, say
from robustdiff.errors import InputError

if TYPE_CHECKING:
    from robustdiff.study.schema import Study


@app.command(short_help="Train and measure methods, seeds, samplers and steps")
def study(
    file: Annotated[Path, typer.Argument(help="A study file: methods, seeds, samplers and steps.")],
    output: Annotated[Path | None, typer.Option(help="A folder for runs and cells; studies/NAME by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is left to do and its time, and do nothing.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Compute nothing: write the results as this page (.md) with its figures, and as .html."),
    ] = None,
) -> None:
    """Train and measure a matrix of methods × seeds × samplers × steps.

    Each result is a file; only what is missing is computed. Start the same command several times, and the processes
    share the work.
    """
    from robustdiff.report.tables import print_whole, remaining_table
    from robustdiff.study.estimate import remaining
    from robustdiff.study.schema import load_study

    if dry_run and report is not None:
        raise InputError("--dry-run and --report are two commands: give one of them")
    settings, folder = load_study(file), output or Path("studies") / file.stem
    if dry_run:
        print_whole(out, remaining_table(remaining(settings, folder)))
    elif report is not None:
        _report(settings, file, folder, report)
    elif _run(settings, folder):
        say(f"every cell is in {folder / 'cells'}")
    else:
        say(f"stopped; robustdiff study {file} --output {folder} goes on from here", err)
        raise typer.Exit(INTERRUPTED)


def _report(settings: Study, file: Path, folder: Path, page: Path) -> None:
    """Write the results as Markdown with figures, and as an HTML file beside it."""
    from robustdiff.report.html import write_report
    from robustdiff.report.page import write_page

    write_page(settings, folder, page)
    write_report([str(file)], page.with_suffix(".html"), folder)
    say(f"{page} and its figures in {page.with_suffix('')}; {page.with_suffix('.html')} has all in one file")


def _run(settings: Study, folder: Path) -> bool:
    from robustdiff.report.bar import Bar
    from robustdiff.study.run import run_study

    with Bar(err) as bar:
        return run_study(settings, folder, progress=bar)
