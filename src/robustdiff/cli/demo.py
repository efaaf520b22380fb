"""The command `robustdiff demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustdiff.cli import INTERRUPTED, app, err, options, out, say
from robustdiff.errors import InputError

if TYPE_CHECKING:
    from robustdiff.evaluation.grid import Grid


@app.command(short_help="Fine-tune a small checkpoint three ways and compare")
def demo(
    output: Annotated[
        Path | None, typer.Option(help="A folder for runs, figures and result.json; robustdiff-demo by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="More updates and images: an hour instead of minutes.")] = False,
    consistency: Annotated[
        bool, typer.Option("--consistency", help="Distil the checkpoint into consistency models of 1 to 8 steps.")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Distil a text-to-image model of emoji into latent consistency models.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(min=0, max=options.LARGEST_SEED, help="The seed of the batches, the noise and the samples."),
    ] = 0,
) -> None:
    """Fine-tune a checkpoint plainly, randomly perturbed, and adversarially; then compare them.

    Data and pretrained networks come with the package: 60,000 images of 16×16 pixels, and captioned emoji of 64×64 for
    --text. It takes minutes on two CPU cores. After an interruption the same command goes on.
    """
    from robustdiff import demo as demos
    from robustdiff.report.bar import Bar

    if consistency and text:
        raise InputError("--consistency and --text are two demonstrations: give one of them")
    kind = "consistency" if consistency else "text" if text else ""
    name = f"demo-{kind}" if kind else "demo"
    folder = output or Path(f"robustdiff-{name}")
    with Bar(err) as bar:
        result = demos.run_demo(demos.demo_study(name, full, seed), folder, progress=bar)
    if result is None:
        given = f" --{kind}" * bool(kind) + " --full" * full + f" --seed {seed}" * bool(seed)
        say(f"stopped; robustdiff demo{given} --output {folder} goes on from here", err)
        raise typer.Exit(INTERRUPTED)
    _show(*result, folder)


def _show(grid: Grid, record: dict[str, Any], folder: Path) -> None:
    from robustdiff.metrics.metric import number_named
    from robustdiff.notation import interval
    from robustdiff.report.tables import grid_table, print_whole

    for number in map(number_named, grid.cells[0].intervals):
        images = f"{grid.cells[0].n:,} images a cell"
        say(f"{number.title} of {images}, and its change vs plain (95 % bootstrap intervals):")
        print_whole(out, grid_table(grid, "plain", number))
        for cell in record.get("teacher", []):
            value = interval(cell[number.name], cell[f"{number.name}_ci"], number.format)
            say(f"the teacher, {cell['sampler']} {cell['steps']}: {value}")
    say(f"figures and result.json are in {folder}")
