"""The command `robustdiff convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from robustdiff.cli import app, say
from robustdiff.errors import InputError


@app.command(
    short_help="Convert a guided-diffusion checkpoint, or export a LoRA",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def convert(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="A guided-diffusion .pt; a run or pipeline folder, to go back; or a LoRA.")
    ],
    output: Annotated[Path, typer.Argument(help="The pipeline folder to make; or the .pt.")],
    preset: Annotated[str | None, typer.Option(help="The flags of a published model, such as imagenet64-adm.")] = None,
    flags: Annotated[str, typer.Option(help="The flags as one string, such as the MODEL_FLAGS of a README.")] = "",
    to: Annotated[
        Literal["pipeline", "kohya"] | None,
        typer.Option(help="Of the run of a LoRA: a pipeline with its weights merged, or one .safetensors for others."),
    ] = None,
) -> None:
    """Convert a guided-diffusion (ADM) checkpoint to diffusers and back, bit for bit; or the run of a LoRA.

    The flags that the checkpoint was trained with come from --preset, from --flags "…", or one by one as
    guided-diffusion spells them: robustdiff convert model.pt OUT --image_size 64 --num_channels 192 …
    """
    from robustdiff.backbones.adm.convert import convert as run
    from robustdiff.backbones.adm.convert import read_flags

    text = " ".join([flags, *context.args])
    if to is not None:
        from robustdiff.backbones.export import export

        if preset is not None or text.strip():
            raise InputError("--to is for the run of a LoRA, which has no flags: leave them out")
        export(source, output, to)
    elif not source.exists() or (source.is_dir() and preset is None and not text.strip()):
        run(source, output)
    else:
        run(source, output, *read_flags(preset, text))
    say(f"{source} → {output}")
