"""The command `robustdiff train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from robustdiff.cli import INTERRUPTED, app, err, options, say

if TYPE_CHECKING:
    from robustdiff.recipe import Recipe
    from robustdiff.training.run_files import RunResult


@app.command(short_help="Train or fine-tune by a recipe")
def train(
    recipe: Annotated[str, typer.Argument(help=f"A YAML file, or one of {', '.join(options.SHIPPED_RECIPES)}.")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set adversary.step_size=0.5")
    ] = [],  # noqa: B006  (typer reads it and does not change it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint; start if none.")] = False,
    cpu: options.Cpu = False,
) -> None:
    """Train a recipe: pretraining or fine-tuning, plain or adversarial.

    With a section watch in the recipe, the model is measured while it trains, and the best is kept in best/. On several
    GPUs or machines: accelerate launch -m robustdiff train RECIPE. Ctrl-C saves first.
    """
    from robustdiff.distributed import make_accelerator
    from robustdiff.recipe import load_recipe
    from robustdiff.report.bar import Bar
    from robustdiff.training.run import train as run

    settings = load_recipe(recipe, overrides, cpu=cpu)
    # Its precision counts for nothing, and one that accelerate's configuration names may not be for this device.
    quiet = not make_accelerator(cpu, mixed_precision="no").is_main_process
    with Bar(err, quiet) as bar:
        result = run(settings, resume=resume, cpu=cpu, progress=bar)
    if not quiet:
        _show(settings, result)
    if result is None:
        raise typer.Exit(INTERRUPTED)


def _show(settings: Recipe, result: RunResult | None) -> None:
    from robustdiff.training.watch_files import summary

    if result is None:
        say(f"stopped and saved; --resume goes on from {settings.output}", err)
        return
    say(f"{settings.output}: {result['steps']} updates, loss {result['loss']:.4f}; the model is in model/")
    for line in summary(settings, result):
        say(line)
