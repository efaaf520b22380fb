"""Conversion of the run of a LoRA for other programs: a whole pipeline, or one file in kohya's format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from robustdiff.backbones.lora import adapter_of, save_kohya
from robustdiff.backbones.model import load_model
from robustdiff.errors import InputError
from robustdiff.files import atomic_folder

__all__ = ["Form", "export"]

Form = Literal["pipeline", "kohya"]


def export(source: str | Path, output: Path, form: Form) -> None:
    """Convert the run of a LoRA.

    Args:
        source: The run, or its folder ``model``.
        output: The folder or the file to create.
        form: "pipeline" adds the adapter to the weights of its base, for a diffusers pipeline folder; "kohya" writes
            the adapter of a UNet as a ``.safetensors`` in kohya's format.

    Raises:
        InputError: If the source is no LoRA, or has no such form; or the output exists or has another ending.
    """
    model = load_model(source)
    if model.adapter is None:
        raise InputError(f"{source} is no LoRA, and --to is for the runs of those: leave it out")
    if output.exists():
        raise InputError(f"{output} exists already: give another name, or remove it")
    if form == "kohya":
        if model.backbone.part != "unet":
            raise InputError(
                f"{source} is a LoRA of a {type(model.network).__name__}, and kohya's format is written for UNets: "
                "use its pytorch_lora_weights.safetensors"
            )
        if output.suffix != ".safetensors":
            raise InputError(f"{output}: give a file that ends in .safetensors")
        output.parent.mkdir(parents=True, exist_ok=True)
        save_kohya(output, model.adapter, adapter_of(model.network.state_dict()))
        return
    model.merge()
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as folder:
        model.save(folder)
