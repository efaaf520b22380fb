"""The command `robustdiff sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustdiff.cli import app, err, options, say
from robustdiff.errors import InputError

if TYPE_CHECKING:
    from robustdiff.evaluation.generate import Generator

# Suffixes of images and of archives, which no folder of images has.
_FILES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    *(".gz", ".npy", ".npz", ".pt", ".safetensors", ".tar", ".tgz", ".zip"),
)


@app.command(short_help="Sample images into an .npz file or PNGs")
def sample(
    run: Annotated[str, typer.Argument(help="A run, a diffusers pipeline folder, a shipped model, or one of the Hub.")],
    output: Annotated[Path, typer.Option(help="A file.npz, or a folder for PNGs.")] = Path("samples.npz"),
    num: Annotated[int, typer.Option(min=1, max=options.MOST_IMAGES, help="The number of images.")] = 64,
    sampler: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(options.SHIPPED_SAMPLERS)}; by default that of the run's recipe."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help='Network evaluations for one image; or "10,20,30", "ddim25"; multistep: scales "0,22,39".'),
    ] = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 128,
    precision: options.Precision = "fp32",
    label: Annotated[
        int | None, typer.Option("--class", help="The class of all images; all in turn by default.")
    ] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="OPTION=VALUE", help="An option of the sampler: --set window=20")
    ] = [],  # noqa: B006
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="The number of classes to sample; one less than the model's, if its last is null."),
    ] = None,
    prompts: Annotated[
        list[str], typer.Option("--prompt", help="A caption, for models conditioned on text; several take turns.")
    ] = [],  # noqa: B006
    negative: options.Negative = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side, if the model does not say it, or another size.")
    ] = None,
    cpu: options.Cpu = False,
) -> None:
    """Sample images into an .npz (arr_0: uint8 NHWC, as ADM's evaluator reads it) or into PNGs.

    After an interruption the same command goes on; images of another run or other settings are not overwritten. On
    several GPUs: accelerate launch -m robustdiff sample RUN.
    """
    from robustdiff.distributed import make_accelerator
    from robustdiff.evaluation.generate import Generator, write_npz, write_pngs
    from robustdiff.report.bar import Bar

    accelerator = make_accelerator(cpu)
    chosen = options.given(spacing=spacing)
    chosen |= options.parse_assignments(overrides, "--set", "window=20", chosen)
    settings = options.given(sampler=sampler, steps=_steps(steps), label=label, num_classes=classes, guidance=guidance)
    settings |= {"size": size, "seed": seed, "batch_size": batch_size, "precision": precision, "options": chosen}
    settings |= {"prompts": tuple(prompts), "negative": negative}
    generator = Generator.load(run, accelerator.device, **settings)
    _prepare(output, generator)
    with Bar(err, quiet=not accelerator.is_main_process) as bar:
        made = (write_npz if output.suffix == ".npz" else write_pngs)(generator, num, output, accelerator, bar)
    if accelerator.is_main_process:
        say(f"{num} images in {output}" + ("" if made else ", which were there already"))


def _prepare(output: Path, generator: Generator) -> None:
    """Create the folder of the images, once nothing else stands against them."""
    # Any other suffix may be the end of a folder's name, such as lr-0.1.
    other = output.suffix.lower() in _FILES and not output.is_dir()
    if output.suffix != ".npz" and (other or output.is_file()):
        raise InputError(f"{output}: give a file that ends in .npz, or a folder")
    generator.model.image_shape  # noqa: B018  (raises where the model does not say it)
    output.parent.mkdir(parents=True, exist_ok=True)


def _steps(text: str | None) -> int | str | None:
    """Return a number of steps, or the text, such as "ddim25"."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text
