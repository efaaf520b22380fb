"""The command `robustdiff evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustdiff.cli import app, err, out, say
from robustdiff.cli.options import (
    BatchSize,
    Cpu,
    Data,
    Features,
    Guidance,
    Precision,
    Root,
    Samplers,
    Seed,
    SetData,
    Spacing,
    Weights,
    given,
    parse_counts,
    parse_samplers,
    real_images,
)
from robustdiff.errors import InputError

if TYPE_CHECKING:
    from robustdiff.evaluation.sources import Evaluation
    from robustdiff.recipe import DataConfig


@app.command()
def evaluate(
    sources: Annotated[
        list[str], typer.Argument(help="Runs, pipeline folders or shipped models; folders of images or .npz files.")
    ],
    sampler: Samplers = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Numbers of network evaluations, with commas: 5,10,20,50; 1,2,4,8 for consistency models."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=4, help="Images of each cell; by default 5000, and all of a folder or file.")
    ] = None,
    data: Data = None,
    root: Root = None,
    overrides: SetData = [],  # noqa: B006
    reference: Annotated[
        Path | None, typer.Option(help="In place of real images, their mu and sigma under --features: an .npz file.")
    ] = None,
    features: Features = None,
    weights: Weights = None,
    output: Annotated[Path | None, typer.Option(help="A folder for result.json and figures.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    precision: Precision = "fp32",
    spacing: Spacing = None,
    guidance: Guidance = None,
    cpu: Cpu = False,
) -> None:
    """Measure FID, KID, precision and recall over checkpoint × sampler × steps, on common random numbers.

    Images in a folder or an .npz file (arr_0: uint8 NHWC) are measured as they are. On several GPUs: accelerate launch
    -m robustdiff evaluate RUN.
    """
    from accelerate import Accelerator

    from robustdiff.evaluation.real_images import load_target
    from robustdiff.evaluation.sources import evaluate_sources, load_sources
    from robustdiff.report.bar import Bar

    accelerator, found = Accelerator(cpu=cpu), load_sources(sources)
    grid = parse_samplers(sampler), parse_counts(steps), num
    real = _real_images(reference, found.first_run, data, root, overrides)
    target = load_target(real, features, weights, accelerator.device)
    options = given(spacing=spacing)
    settings = given(seed=seed, batch_size=batch_size, precision=precision, guidance=guidance, options=options)
    with Bar(err, quiet=not accelerator.is_main_process) as bar:
        result = evaluate_sources(found, target, accelerator, *grid, progress=bar, **settings)
    if accelerator.is_main_process:
        _show(result, output)


def _real_images(
    reference: Path | None, run: str | None, data: str | None, root: str | None, overrides: list[str]
) -> DataConfig | Path:
    """Return the configuration of the real images, or the file of their statistics."""
    if reference is None:
        return real_images(run, data, root, overrides)
    if data is not None or root is not None or overrides:
        raise InputError("--reference takes the place of --data, --root and --set: give it, or them")
    return reference


def _show(result: Evaluation, output: Path | None) -> None:
    """Print the tables, and write the results into a folder."""
    from robustdiff.report.results import write_evaluation
    from robustdiff.report.tables import cell_table, grid_table, print_whole

    target, runs = result.target, result.runs
    say(f"to {target.name} on the features {target.extractor.name}, FID with 95 % bootstrap intervals:")
    print_whole(out, cell_table([*result.grid.cells, *result.images]))
    if len(runs) > 1:
        say(f"FID, and its difference to {runs[0]} on common random numbers:")
        print_whole(out, grid_table(result.grid, runs[0]))
    if output is not None:
        write_evaluation(output, result)
        say(f"figures and result.json are in {output}" if runs else f"result.json is in {output}")
