"""The command `robustdiff search-times`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustdiff.cli import app, err, options, say
from robustdiff.files import write_json

if TYPE_CHECKING:
    from robustdiff.samplers.time_search import TimeSearch


@app.command(short_help="Find the best scales to sample a consistency model at")
def search_times(
    run: Annotated[str, typer.Argument(help="A consistency model: a run or a pipeline folder.")],
    steps: Annotated[int, typer.Option(min=2, help="Network evaluations for one image.")] = 4,
    num: Annotated[int, typer.Option(min=4, max=options.MOST_IMAGES, help="Images for each candidate.")] = 2000,
    data: options.Data = None,
    root: options.Root = None,
    overrides: options.SetData = [],  # noqa: B006
    features: options.Features = None,
    weights: options.Weights = None,
    output: Annotated[Path | None, typer.Option(help="A .json for the scales and all candidates.")] = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 128,
    precision: options.Precision = "fp32",
    cpu: options.Cpu = False,
) -> None:
    """Find the scales at which a consistency model is sampled best in so many steps: greedily, by FID.

    The scales that are found are those that robustdiff sample RUN --steps takes. Choose another --seed to judge them.
    """
    from robustdiff.distributed import make_accelerator
    from robustdiff.evaluation.real_images import load_target
    from robustdiff.evaluation.sources import load_generators
    from robustdiff.evaluation.time_search import search_times_by_fid
    from robustdiff.report.bar import Bar

    accelerator, real = make_accelerator(cpu), options.real_images(run, data, root, overrides, workers=True)
    options.claim(output, real)
    target = load_target(real, features, weights, accelerator.device)
    sampling = {run: run}, accelerator.device, target.dataset, ["multistep"], [None]
    (generator,) = load_generators(*sampling, seed=seed, batch_size=batch_size, precision=precision).values()
    with Bar(err) as bar:
        best = search_times_by_fid(generator, steps, num, target, accelerator, bar)
    if output is not None:  # first, since nothing may read what is printed
        write_json(output, _record(best, num, seed))
    say(f"--steps {_text(best.numbers)}  FID {best.value:.2f} of {num} images, {len(best.evaluated)} candidates tried")


def _text(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _record(found: TimeSearch, num: int, seed: int) -> dict[str, Any]:
    from robustdiff.evaluation.noise import NOISE

    tried = [{"steps": _text(numbers), "fid": value} for numbers, value in found.evaluated.items()]
    return {
        "steps": _text(found.numbers),
        "fid": found.value,
        "num": num,
        "seed": seed,
        "noise": NOISE,
        "evaluated": tried,
    }
