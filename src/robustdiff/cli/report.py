"""The command `robustdiff report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustdiff.cli import app, err, options, say


@app.command(short_help="Report on runs and a study in one HTML file")
def report(
    sources: Annotated[list[str], typer.Argument(help="Folders of runs, finished or not, and a study file (.yaml).")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    folder: Annotated[
        Path | None, typer.Option(help="The study's folder of runs and cells; studies/NAME by default.")
    ] = None,
    results: Annotated[
        list[Path], typer.Option(help="A folder that evaluate or mismatch wrote by --output; several may be given.")
    ] = [],  # noqa: B006
    num: Annotated[int, typer.Option(min=0, max=256, help="Images in each picture; 0: no pictures of runs.")] = 16,
    sampler: Annotated[
        str | None, typer.Option(help="Samplers of the pictures, with commas; by default one that was watched.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Network evaluations of the pictures, with commas; by default those that were watched."),
    ] = None,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    prompts: Annotated[
        list[str],
        typer.Option("--prompt", help="A caption of the pictures; several take turns; by default the data's."),
    ] = [],  # noqa: B006
    cpu: options.Cpu = False,
) -> None:
    """Report on runs and a study in one HTML file, which loads nothing.

    It has the outcome in words, the metrics against steps and over the training, samples of the start, the best and the
    last model from common noise, costs, settings, and the commands that reproduce them.
    """
    from robustdiff.distributed import make_accelerator
    from robustdiff.report.bar import Bar
    from robustdiff.report.html import write_report
    from robustdiff.report.pictures import Pictures

    names, counts = options.parse_names(sampler), options.parse_counts(steps)
    pictures = Pictures(num, names, counts, seed, guidance, prompts)
    settings: dict[str, Any] = {"device": make_accelerator(cpu).device, "on_read": lambda message: say(message, err)}
    with Bar(err) as bar:
        size = write_report(sources, output, folder, results, pictures=pictures, progress=bar, **settings)
    say(f"{output} has {size / 2**20:.1f} MB, and loads nothing")
