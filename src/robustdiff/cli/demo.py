"""The command `robustdiff demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustdiff.cli import app, err, out, say

if TYPE_CHECKING:
    from robustdiff.evaluation.grid import Grid


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="A folder for runs, figures and result.json; robustdiff-demo by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="More updates and images: an hour instead of minutes.")] = False,
    consistency: Annotated[
        bool, typer.Option("--consistency", help="Distil the checkpoint into consistency models of 1 to 8 steps.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the batches, the noise and the samples.")] = 0,
) -> None:
    """Fine-tune a checkpoint plainly, randomly perturbed, and adversarially; then compare them.

    Sixty thousand real images of 16×16 pixels and a small pretrained network come with the package. It takes minutes on
    two CPU cores. After an interruption the same command goes on.
    """
    from robustdiff import demo as demos
    from robustdiff.report.bar import Bar

    name = "demo-consistency" if consistency else "demo"
    folder = output or Path(f"robustdiff-{name}")
    with Bar(err) as bar:
        result = demos.run_demo(demos.demo_study(name, full, seed), folder, progress=bar)
    if result is None:
        options = " --consistency" * consistency + " --full" * full + f" --seed {seed}" * bool(seed)
        say(f"stopped; robustdiff demo{options} --output {folder} goes on from here", err)
    else:
        _show(*result, folder)


def _show(grid: Grid, record: dict[str, Any], folder: Path) -> None:
    from robustdiff.metrics.fid import FID
    from robustdiff.report.tables import grid_table, print_whole

    say(f"FID of {grid.cells[0].n} images a cell, with 95 % bootstrap intervals:")
    print_whole(out, grid_table(grid, "plain", FID.numbers[0]))
    for cell in record.get("teacher", []):
        low, high = cell["fid_ci"]
        say(f"the teacher, {cell['sampler']} {cell['steps']}: {cell['fid']:.2f} ±{(high - low) / 2:.2g}")
    say(f"figures and result.json are in {folder}")
