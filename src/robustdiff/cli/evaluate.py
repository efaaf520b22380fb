"""The command `robustdiff evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustdiff.cli import app, err, options, out, say
from robustdiff.errors import InputError

if TYPE_CHECKING:
    from robustdiff.evaluation.grid import Grid
    from robustdiff.evaluation.real_images import Target
    from robustdiff.recipe import DataConfig


@app.command()
def evaluate(
    sources: Annotated[
        list[str], typer.Argument(help="Runs, pipeline folders or shipped models; folders of images or .npz files.")
    ],
    sampler: options.Samplers = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Numbers of network evaluations, with commas: 5,10,20,50; 1,2,4,8 for consistency models."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=4, help="Images of each cell; by default 5000, and all of a folder or file.")
    ] = None,
    data: options.Data = None,
    root: options.Root = None,
    overrides: options.SetData = [],  # noqa: B006
    reference: Annotated[
        Path | None, typer.Option(help="In place of real images, their mu and sigma under --features: an .npz file.")
    ] = None,
    features: options.Features = None,
    weights: options.Weights = None,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics, with commas; by default fid,kid,precision-recall,brightness.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for result.json and figures.")] = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 128,
    precision: options.Precision = "fp32",
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    cpu: options.Cpu = False,
) -> None:
    """Measure checkpoint × sampler × steps by FID and other metrics, on common random numbers.

    Images in a folder or an .npz file (arr_0: uint8 NHWC) are measured as they are. On several GPUs: accelerate launch
    -m robustdiff evaluate RUN.
    """
    from accelerate import Accelerator

    from robustdiff.evaluation.real_images import load_target
    from robustdiff.evaluation.sources import evaluate_sources, load_sources
    from robustdiff.report.bar import Bar

    accelerator, (runs, images) = Accelerator(cpu=cpu), load_sources(sources)
    names = options.parse_names(metrics, "--metrics")
    cells = options.parse_names(sampler), options.parse_counts(steps), num, names
    given = {"--data": data, "--root": root, "--set": overrides, "--reference": reference}
    real = _real_images(names, given | {"--features": features, "--weights": weights}, runs)
    target = load_target(real, features, weights, accelerator.device)
    chosen = options.given(spacing=spacing)
    settings = options.given(seed=seed, batch_size=batch_size, precision=precision, guidance=guidance, options=chosen)
    with Bar(err, quiet=not accelerator.is_main_process) as bar:
        grid = evaluate_sources(runs, images, target, accelerator, *cells, progress=bar, **settings)
    accelerator.on_main_process(_show)(grid, target, seed, output)


def _real_images(metrics: list[str], given: dict[str, Any], runs: dict[str, str]) -> DataConfig | Path | None:
    """Return the configuration of the real images or the file of their statistics, or None if no metric compares."""
    from robustdiff.metrics.metric import DEFAULT, compared

    if not compared(metrics or DEFAULT):
        for option in (name for name, value in given.items() if value):
            raise InputError(f"{option} is for comparing with real images, and --metrics does not: leave it out")
        return None
    data, root, overrides, reference = (given[name] for name in ("--data", "--root", "--set", "--reference"))
    if reference is None:
        return options.real_images(next(iter(runs.values()), None), data, root, overrides)
    if data is not None or root is not None or overrides:
        raise InputError("--reference takes the place of --data, --root and --set: give it, or them")
    return Path(reference)


def _show(grid: Grid, target: Target, seed: int, output: Path | None) -> None:
    """Print the tables, and write the results into a folder."""
    from robustdiff.evaluation.grid import FILE
    from robustdiff.metrics.metric import number_named
    from robustdiff.report.results import write_results
    from robustdiff.report.tables import cell_table, grid_table, print_whole

    sampled = replace(grid, cells=[cell for cell in grid.cells if cell.sampler != FILE])
    runs = list(dict.fromkeys(cell.checkpoint for cell in sampled.cells))
    if target.extractor is not None:
        of = target.extractor.name
        say(f"to {target.name} on the features {of}, with 95 % bootstrap intervals and standard errors:")
    print_whole(out, cell_table(grid.cells))
    for number in map(number_named, dict.fromkeys(difference.number for difference in grid.differences)):
        say(f"{number.title}, and its difference to {runs[0]} on common random numbers:")
        print_whole(out, grid_table(sampled, runs[0], number))
    if output is not None:
        title = f"{grid.cells[0].n} images a cell, seed {seed}"
        title = title if target.name is None else f"{target.name}, {title}"
        write_results(output, grid, title, {**target.record, "seed": seed})
        say(f"figures and result.json are in {output}" if runs else f"result.json is in {output}")
