"""Networks by name, and pipeline folders in and out.

Everything that this project trains is a diffusers pipeline folder: ``unet/`` and ``scheduler/``, with
``model_index.json`` beside them, which ``DDPMPipeline.from_pretrained`` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.objectives.denoising import Variance
from robustdiff.process import DiffusionProcess
from robustdiff.recipe import ModelConfig, ObjectiveConfig, ProcessConfig, Recipe

__all__ = [
    "PRETRAINED",
    "Built",
    "build_model",
    "build_process",
    "build_unet",
    "check_fit",
    "load_pipeline",
    "objective_of",
    "process_of",
    "save_pipeline",
]

PRETRAINED = files("robustdiff.models") / "pretrained"
"""Where the models shipped with the package are."""


def build_unet(
    config: ModelConfig, shape: tuple[int, int, int], num_classes: int | None, variance: Variance = "fixed"
) -> UNet2DModel:
    """A new UNet for images of one shape.

    Arguments:
        config: Its sizes.
        shape: (C, H, W) of the images.
        num_classes: The number of classes of the data, if it has labels.
        variance: With "learned_range" the network has 2C output channels.

    Raises:
        InputError: If the images are not square or cannot be halved often enough, or labels are missing.
    """
    channels, height, width = shape
    levels = len(config.channels)
    if height != width or height % 2 ** (levels - 1):
        raise InputError(
            f"a UNet of {levels} levels cannot take images of {height}×{width}: "
            f"set data.size to a multiple of {2 ** (levels - 1)}, or fewer model.channels"
        )
    if config.class_cond and num_classes is None:
        raise InputError("model.class_cond needs labels, and this data has none: set model.class_cond=false")
    attention = config.attention or (False,) * levels
    # Wider than the level, a head would leave no heads at all. The middle always has attention.
    widths = [config.channels[-1], *(w for w, a in zip(config.channels, attention, strict=True) if a)]
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels if variance == "fixed" else 2 * channels,
        layers_per_block=config.layers,
        block_out_channels=config.channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=min(config.head_width, *widths),
        norm_num_groups=config.groups,
        dropout=config.dropout,
        num_class_embeds=num_classes if config.class_cond else None,
    )


def build_process(config: ProcessConfig, objective: ObjectiveConfig) -> tuple[DiffusionProcess, Any]:
    """A process by name, and the diffusers scheduler that goes into the pipeline folder with it."""
    if (config.name == "flow") != (objective.prediction == "flow"):
        raise InputError("process=flow and objective.prediction=flow go together: set both, or neither")
    if config.name == "flow":
        return DiffusionProcess.flow(config.T), FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.T)
    scheduler = DDPMScheduler(
        config.T,
        beta_schedule={"cosine": "squaredcos_cap_v2", "linear": "linear"}[config.name],
        beta_start=0.0001 * 1000 / config.T,
        beta_end=0.02 * 1000 / config.T,
        prediction_type=objective.prediction,
        variance_type={"fixed": "fixed_small"}.get(objective.variance, objective.variance),
    )
    process = DiffusionProcess.cosine(config.T) if config.name == "cosine" else DiffusionProcess.linear(config.T)
    return process, scheduler


def process_of(scheduler: Any) -> DiffusionProcess:
    """The process that a pipeline's scheduler was made for."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return DiffusionProcess.flow(scheduler.config.num_train_timesteps)
    try:
        return DiffusionProcess.from_scheduler(scheduler)
    except ValueError as error:
        raise InputError(str(error)) from None


def objective_of(scheduler: Any, unet: UNet2DModel) -> ObjectiveConfig:
    """What the network of a pipeline predicts, read from the scheduler and the number of its output channels."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return ObjectiveConfig(prediction="flow")
    learned = unet.config.out_channels == 2 * unet.config.in_channels
    return ObjectiveConfig(
        prediction=getattr(scheduler.config, "prediction_type", "epsilon"),
        variance="learned_range" if learned else "fixed",
    )


def _pipeline_folder(path: str | Path) -> Path:
    """A run, a pipeline folder, or the name of a shipped model, as a folder with ``model_index.json``."""
    given = Path(path)
    for candidate in (given, given / "model", Path(str(PRETRAINED / str(path)))):
        if (candidate / "model_index.json").is_file():
            return candidate
    shipped = ", ".join(sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())) if PRETRAINED.is_dir() else "none"
    if (given / "recipe.yaml").is_file():
        raise InputError(f"{path} is a run that is not finished: go on with it by robustdiff train … --resume")
    raise InputError(f"no model at {path}: give a run, a folder with model_index.json, or a shipped model ({shipped})")


@contextmanager
def _quietly() -> Iterator[None]:
    """diffusers logs errors that it also raises, and shows a bar of its own."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        diffusers_logging.enable_progress_bar()


def load_pipeline(path: str | Path) -> tuple[UNet2DModel, Any]:
    """The network and the scheduler of a run, of a pipeline folder, or of a model shipped with the package.

    Raises:
        InputError: If there is none, or it cannot be read, or it is not an unconditional or class-conditional UNet.
    """
    folder = _pipeline_folder(path)
    try:
        index = json.loads((folder / "model_index.json").read_text())
        kind = index.get("unet", [None, None])[1]
        if kind not in ("UNet2DModel", "AdmUNet2DModel"):
            raise InputError(
                f"{folder} holds {kind or 'no unet'}, not a UNet2DModel: only pixel-space UNets are supported"
            )
        with _quietly():
            pipeline = DDPMPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, LookupError, TypeError, SafetensorError) as error:
        raise InputError(f"the model in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    return pipeline.unet, pipeline.scheduler


def save_pipeline(folder: Path, unet: UNet2DModel, scheduler: Any) -> None:
    """Write a pipeline folder; the caller sees to it that it appears whole."""
    DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=True)


@dataclass
class Built:
    """What a recipe trains.

    Attributes:
        unet: The network.
        process: Its process.
        scheduler: The diffusers scheduler of that process, for the pipeline folder.
        objective: What the network predicts.
    """

    unet: UNet2DModel
    process: DiffusionProcess
    scheduler: Any
    objective: ObjectiveConfig


def build_model(recipe: Recipe, dataset: ImageDataset) -> Built:
    """The network of a recipe with its process.

    Raises:
        InputError: If the checkpoint is missing or of another kind, or the data does not fit the network.
    """
    if recipe.model.name == "unet":
        if recipe.process is not None and recipe.process.name == "pretrained":
            raise InputError("process=pretrained needs model.name=pretrained: choose cosine, linear or flow")
        objective = recipe.objective or ObjectiveConfig()
        process, scheduler = build_process(recipe.process or ProcessConfig(), objective)
        unet = build_unet(recipe.model, dataset.shape, dataset.num_classes, objective.variance)
        return Built(unet, process, scheduler, objective)
    assert recipe.model.path is not None  # the recipe's own validation
    unet, scheduler = load_pipeline(recipe.model.path)
    objective = objective_of(scheduler, unet)
    if (given := recipe.objective) is not None:
        objective = objective.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})
    if recipe.process is None or recipe.process.name == "pretrained":
        process = process_of(scheduler)
    else:
        process, scheduler = build_process(recipe.process, objective)
    check_fit(unet, dataset.shape, str(recipe.model.path))
    if unet.config.num_class_embeds is not None and dataset.num_classes is None:
        raise InputError(f"the model {recipe.model.path} needs class labels, and this data has none")
    return Built(unet, process, scheduler, objective)


def check_fit(unet: UNet2DModel, shape: tuple[int, int, int], path: str) -> None:
    """Whether a network takes images of a shape.

    Raises:
        InputError: If it does not.
    """
    channels, height, width = shape
    size = unet.config.sample_size
    if unet.config.in_channels != channels:
        raise InputError(
            f"the model {path} takes {unet.config.in_channels} channels and the data has {channels}: "
            f"set data.channels={unet.config.in_channels}"
        )
    if (height, width) != ((size, size) if isinstance(size, int) else tuple(size)):
        raise InputError(
            f"the model {path} takes images of {size}×{size}, the data has {height}×{width}: set data.size={size}"
        )
