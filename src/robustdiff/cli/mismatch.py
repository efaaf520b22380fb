"""The command `robustdiff mismatch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustdiff.cli import app, err, options, out, say

if TYPE_CHECKING:
    from robustdiff.mismatch.measure import Mismatch


_RADII = "give numbers with commas, such as 0.1,0.3,1.0"


@app.command(short_help="Measure how far sampling is from training, step by step")
def mismatch(
    runs: Annotated[list[str], typer.Argument(help="Runs, pipeline folders or shipped models.")],
    sampler: options.Samplers = None,
    steps: Annotated[str, typer.Option(help="Numbers of network evaluations, with commas.")] = "10",
    num: Annotated[
        int | None,
        typer.Option(
            min=1, max=options.MOST_IMAGES, help="Images; by default 2000, or half of the real ones if they are fewer."
        ),
    ] = None,
    radii: Annotated[str, typer.Option(help="ℓ2 radii of the robust loss, with commas.")] = "0.1,0.3,1.0",
    probes: Annotated[
        int | None, typer.Option(min=0, help="Images of the robust loss, by default 32; 0 leaves it out.")
    ] = None,
    data: options.Data = None,
    root: options.Root = None,
    overrides: options.SetData = [],  # noqa: B006
    output: Annotated[Path, typer.Option(help="A folder for mismatch.json and figures.")] = Path("mismatch"),
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 128,
    precision: options.Precision = "fp32",
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    cpu: options.Cpu = False,
) -> None:
    """Measure how far a sampler's points are from those that the network was trained on, step by step.

    Along the sampler's path: spread (exposure bias), sliced Wasserstein, energy and Fréchet distance and KL divergence,
    with intervals and floors. Besides: robust loss and Lipschitz constant at true points, in fp32. All checkpoints are
    measured on common random numbers.
    """
    from robustdiff.distributed import make_accelerator
    from robustdiff.evaluation.sources import load_generators, name_sources
    from robustdiff.mismatch.measure import measure_mismatch
    from robustdiff.report.bar import Bar

    cells = options.parse_names(sampler), options.parse_counts(steps)
    numbers = options.given(num=num, probes=probes, seed=seed, radii=options.parse_numbers(radii, "--radii", _RADII))
    device, named = make_accelerator(cpu).device, name_sources(runs)
    real = options.real_images(runs[0], data, root, overrides)
    options.claim(output / "mismatch.json", real)
    settings = options.given(batch_size=batch_size, precision=precision, guidance=guidance)
    dataset, chosen = real.load(), options.given(spacing=spacing)
    generators = load_generators(named, device, dataset, *cells, options=chosen, half=False, **settings)
    with Bar(err) as bar:
        result = measure_mismatch(generators, dataset, *cells, **numbers, progress=bar)
    _show(result, output)


def _show(result: Mismatch, output: Path) -> None:
    """Write the results into a folder, and print the tables."""
    from robustdiff.report.mismatch import mismatch_table, robustness_table, write_mismatch
    from robustdiff.report.tables import print_whole

    write_mismatch(output, result)  # first, since nothing may read what is printed
    say(f"p(x_t) of {result.paths[0].n} images against q(x_t) of {result.data}, with 95 % intervals:")
    print_whole(out, mismatch_table(result))
    if result.robustness:
        n = result.robustness[0].n
        say(f"robust loss and Lipschitz constant of the predicted noise at {n} true points, ± standard errors:")
        print_whole(out, robustness_table(result))
    say(f"figures and mismatch.json are in {output}")
