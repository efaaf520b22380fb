"""Conversion between guided-diffusion checkpoints and diffusers pipeline folders.

A checkpoint holds a network without its process; a pipeline folder holds both. The noise schedule therefore comes with
the flags: from the preset, from ``--noise_schedule``, or guided-diffusion's default, linear.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, EDMEulerScheduler

from robustdiff.backbones.adm.checkpoint import load_adm, save_adm
from robustdiff.backbones.adm.flags import PRESETS, AdmFlags, parse_flags, read_command
from robustdiff.backbones.kinds.kind import mark_as_own
from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError
from robustdiff.files import atomic_folder

__all__ = ["Schedule", "convert", "read_flags"]

Schedule = Literal["linear", "cosine", "edm", "consistency"]

_SCHEDULES: dict[str, Schedule] = {
    "cifar10-adm": "cosine",
    "imagenet64-adm": "cosine",
    "imagenet64-edm": "edm",
    "imagenet64-cm": "consistency",
    "lsun256-cm": "consistency",
}
"""The schedules of presets whose schedule is not linear."""


def read_flags(preset: str | None, text: str) -> tuple[AdmFlags, Schedule]:
    """Return the flags of a network and its schedule, from the name of a preset or from guided-diffusion's flags.

    Args:
        preset: A key of :data:`robustdiff.backbones.adm.flags.PRESETS`.
        text: Flags of guided-diffusion, such as ``--image_size 64 --class_cond True``.

    Raises:
        InputError: If both are given, or neither, or the preset or a flag is unknown.
    """
    if (preset is None) == (not text.strip()):
        raise InputError("give either --preset or guided-diffusion's flags, such as --image_size 64 --learn_sigma True")
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        return PRESETS[preset], _SCHEDULES.get(preset, "linear")
    command = read_command(text)
    schedule = command.get("noise_schedule", "linear")
    if "training_mode" in command or "weight_schedule" in command:
        schedule = "edm" if command.get("training_mode") == "edm" else "consistency"
    elif schedule not in ("linear", "cosine"):
        raise InputError(f"unknown --noise_schedule {schedule}: use linear or cosine")
    return parse_flags(text), cast(Schedule, schedule)


def convert(source: Path, output: Path, flags: AdmFlags | None = None, schedule: Schedule = "linear") -> None:
    """Convert a checkpoint into a pipeline folder, or a pipeline folder into a ``.pt``, bit for bit.

    Args:
        source: A checkpoint of guided-diffusion or of OpenAI's consistency models, ``.pt`` or
            ``.safetensors``; or a folder (a run, a pipeline).
        output: The folder or the ``.pt`` file to create.
        flags: The flags that the checkpoint was trained with; not needed for a folder.
        schedule: The process of the checkpoint; "consistency" gives a ``ConsistencyModelPipeline``, "edm" a denoiser
            over noise levels, the teacher of a consistency model.

    Raises:
        InputError: If the source is missing or unreadable, the flags are missing or do not fit, or the output exists.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist: give a .pt checkpoint, or a pipeline folder")
    if output.exists():
        raise InputError(f"{output} exists already: give another name, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        model = load_model(source)
        model.merge()
        save_adm(model.network, output)
        return
    if flags is None:
        raise InputError(f"{source} needs the flags it was trained with: --preset, or guided-diffusion's own")
    unet = load_adm(source, **asdict(flags))
    scheduler: Any
    if schedule in ("edm", "consistency"):
        scheduler = EDMEulerScheduler() if schedule == "edm" else CMStochasticIterativeScheduler()
    else:
        scheduler = DDPMScheduler(
            1000,
            beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
            variance_type="learned_range" if flags.learn_sigma else "fixed_large",
        )
    with atomic_folder(output) as folder:
        Model.of(unet, mark_as_own(scheduler)).save(folder)
