"""The command `robustdiff evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustdiff.cli import app, err, options, out, say
from robustdiff.errors import InputError

if TYPE_CHECKING:
    import torch

    from robustdiff.evaluation.grid import Grid
    from robustdiff.evaluation.prompts import Prompts
    from robustdiff.evaluation.real_images import Target
    from robustdiff.recipe import DataConfig


@app.command(short_help="Measure FID and other metrics of models and images")
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
        int | None,
        typer.Option(
            min=4,
            max=options.MOST_IMAGES,
            help="Images of each cell; by default one a prompt, or 5000, and all of a folder or file.",
        ),
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
        str | None,
        typer.Option(
            help="Metrics, with commas; by default fid,kid,precision-recall,brightness; clip-score=FOLDER of a CLIP."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Captions, for models of text and clip-score: a .txt, one in each line, or captions of COCO as a "
            ".json; by default those of the real images."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for result.json and figures.")] = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 128,
    precision: options.Precision = "fp32",
    spacing: options.Spacing = None,
    guidance: Annotated[
        str | None, typer.Option(help="Scales of classifier-free guidance, with commas; 1: none.")
    ] = None,
    negative: options.Negative = None,
    cpu: options.Cpu = False,
) -> None:
    """Measure checkpoint × sampler × steps × guidance by FID and other metrics, on common random numbers.

    Images in a folder or an .npz file (arr_0: uint8 NHWC) are measured as they are. On several GPUs: accelerate launch
    -m robustdiff evaluate RUN.
    """
    from robustdiff.distributed import make_accelerator
    from robustdiff.evaluation.sources import evaluate_sources, load_sources
    from robustdiff.report.bar import Bar

    accelerator, (runs, images) = make_accelerator(cpu), load_sources(sources)
    names, values = options.parse_metrics(metrics)
    given = {"--data": data, "--root": root, "--set": overrides, "--reference": reference}
    given |= {"--features": features, "--weights": weights}
    claim = partial(options.claim, output and output / "result.json", sources={*sources} - {*runs.values()})
    target, texts = _target(names, given, runs, prompts, accelerator.device, claim)
    cells = options.parse_names(sampler), options.parse_counts(steps), num, names, values, texts, _scales(guidance)
    recorded, chosen = options.given(seed=seed, negative=negative), options.given(spacing=spacing)
    settings: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "options": chosen, **recorded}
    with Bar(err, quiet=not accelerator.is_main_process) as bar:
        grid = evaluate_sources(runs, images, target, accelerator, *cells, progress=bar, **settings)
    accelerator.on_main_process(_show)(grid, target, texts, values, recorded, output)


def _target(
    metrics: list[str],
    given: dict[str, Any],
    runs: dict[str, str],
    prompts: Path | None,
    device: torch.device,
    claim: Callable[[DataConfig | Path | None], None],
) -> tuple[Target, Prompts | None]:
    """Load the real images that metrics compare with, in which no output may be, and the prompts of a file."""
    from robustdiff.evaluation.prompts import load_prompts
    from robustdiff.evaluation.real_images import load_target

    texts = None if prompts is None else load_prompts(prompts)
    real, compare = _real_images(metrics, given, runs, texts)
    claim(real)
    return load_target(real, given["--features"], given["--weights"], device, texts, compare), texts


def _real_images(
    metrics: list[str], given: dict[str, Any], runs: dict[str, str], prompts: Prompts | None
) -> tuple[DataConfig | Path | None, bool]:
    """Return the configuration of the real images or the file of their statistics, and whether a metric compares.

    If no metric compares, the real images are None, unless their captions are the prompts.
    """
    from robustdiff.metrics.metric import DEFAULT, METRICS, compared

    compare = compared(metrics or DEFAULT)
    of_images = ["--data", "--root", "--set"]
    captions = prompts is None and any(METRICS[name].needs == "captions" for name in metrics)
    captions = captions and bool(runs)
    for option in (name for name, value in given.items() if value and not compare):
        if not (captions and option in of_images):
            raise InputError(f"{option} is for comparing with real images, and --metrics does not: leave it out")
    if not compare and not captions:
        return None, False
    data, root, overrides = (given[name] for name in of_images)
    if given["--reference"] is None:
        run = next(iter(runs.values()), None)
        return options.real_images(run, data, root, overrides, workers=compare), compare
    if data is not None or root is not None or overrides:
        raise InputError("--reference takes the place of --data, --root and --set: give it, or them")
    return Path(given["--reference"]), True


def _scales(text: str | None) -> list[float]:
    """Return the scales of guidance, which are distinct; an empty list for None."""
    remedy = "give numbers from 0 up with commas, such as 1,3,7.5"
    scales = [] if text is None else options.parse_numbers(text, "--guidance", remedy)
    if not all(0 <= scale < math.inf for scale in scales):
        raise InputError(f"--guidance {text}: {remedy}")
    return scales


def _show(
    grid: Grid,
    target: Target,
    texts: Prompts | None,
    metrics: dict[str, str],
    settings: dict[str, Any],
    output: Path | None,
) -> None:
    """Write the results into a folder, and print the tables."""
    from robustdiff.evaluation.grid import FILE
    from robustdiff.metrics.metric import number_named
    from robustdiff.report.tables import cell_table, grid_table, print_whole

    if output is not None:  # first, since nothing may read what is printed
        _write(grid, target, texts, metrics, settings, output)
    sampled = replace(grid, cells=[cell for cell in grid.cells if cell.sampler != FILE])
    runs = list(dict.fromkeys(cell.checkpoint for cell in sampled.cells))
    counts = sorted({cell.n for cell in grid.cells})
    images = f"{counts[0]:,} to {counts[-1]:,} images" if len(counts) > 1 else f"{counts[0]:,} images a cell"
    of = "" if target.extractor is None else f", against {target.name} on the features {target.extractor.name}"
    say(f"{images}{of}.")
    say("In brackets: 95 % bootstrap intervals; after ±: standard errors.")
    print_whole(out, cell_table(grid.cells))
    for number in map(number_named, dict.fromkeys(difference.number for difference in grid.differences)):
        say(f'{number.title}, and its change vs "{runs[0]}" on common random numbers:')
        print_whole(out, grid_table(sampled, runs[0], number))
    if output is not None:
        say(f"figures and result.json are in {output}" if runs else f"result.json is in {output}")


def _write(
    grid: Grid, target: Target, texts: Prompts | None, metrics: dict[str, str], settings: dict[str, Any], output: Path
) -> None:
    from robustdiff.evaluation.grid import FILE
    from robustdiff.evaluation.noise import NOISE
    from robustdiff.evaluation.prompts import prompts_of
    from robustdiff.report.results import write_results

    title = f"{grid.cells[0].n} images a cell, seed {settings['seed']}"
    title = title if target.name is None else f"{target.name}, {title}"
    used = prompts_of(target.dataset) if texts is None and grid.captions else texts
    noise = NOISE if any(cell.sampler != FILE for cell in grid.cells) else None
    prompts = None if used is None else used.record
    record = options.given(**settings, noise=noise, metrics=metrics or None, prompts=prompts)
    write_results(output, grid, title, {**target.record, **record})
