"""Guided-diffusion checkpoints as diffusers pipeline folders, and back.

A checkpoint holds a network and nothing of its process; a pipeline folder has both. So the noise schedule comes with
the flags: with a preset, or from ``--noise_schedule`` among them, or guided-diffusion's default, linear.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, EDMEulerScheduler

from robustdiff.backbones.adm import PRESETS, AdmFlags, load_adm, parse_flags, save_adm
from robustdiff.backbones.model import Model, load_model
from robustdiff.backbones.scheduler import mark_as_own
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
"""Of the presets; the others are linear."""


def read_flags(preset: str | None, text: str) -> tuple[AdmFlags, Schedule]:
    """The flags of a network and its schedule, from a preset's name or from guided-diffusion's own flags.

    Arguments:
        preset: A key of :data:`robustdiff.backbones.adm.PRESETS`.
        text: Flags as guided-diffusion spells them, such as ``--image_size 64 --class_cond True``.

    Raises:
        InputError: If both are given, or neither, or one is not known.
    """
    if (preset is None) == (not text.strip()):
        raise InputError("give either --preset or guided-diffusion's flags, such as --image_size 64 --learn_sigma True")
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        return PRESETS[preset], _SCHEDULES.get(preset, "linear")
    flags = parse_flags(text)
    if "--training_mode" in text or "--weight_schedule" in text:
        return flags, "edm" if re.search(r"--training_mode[ =]edm\b", text) else "consistency"
    given = re.search(r"--noise_schedule[ =](\w+)", text)
    if given is not None and given[1] not in ("linear", "cosine"):
        raise InputError(f"unknown --noise_schedule {given[1]}: use linear or cosine")
    return flags, "cosine" if given is not None and given[1] == "cosine" else "linear"


def convert(source: Path, output: Path, flags: AdmFlags | None = None, schedule: Schedule = "linear") -> None:
    """Convert a checkpoint into a pipeline folder, or a pipeline folder into a ``.pt``, bit for bit.

    Arguments:
        source: A checkpoint of guided-diffusion or of OpenAI's consistency models, ``.pt`` or
            ``.safetensors``; or a folder (a run, a pipeline).
        output: The folder, or the ``.pt``.
        flags: The flags that the checkpoint was trained with; a folder needs none.
        schedule: The process of the checkpoint; "consistency" makes a ``ConsistencyModelPipeline``, "edm" a denoiser
            over noise levels, a teacher of those.

    Raises:
        InputError: If the source is missing or unreadable, the flags are missing or do not fit, or the output exists.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist: give a .pt checkpoint, or a pipeline folder")
    if output.exists():
        raise InputError(f"{output} exists already: give another name, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        save_adm(load_model(source).network, output)
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
