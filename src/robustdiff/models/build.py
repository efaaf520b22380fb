"""Networks by name, and pipeline folders in and out.

Everything that this project trains is a diffusers pipeline folder: ``unet/`` and ``scheduler/``, with
``model_index.json`` beside them, which ``DDPMPipeline.from_pretrained`` reads, or for a consistency model
``ConsistencyModelPipeline.from_pretrained``. The scheduler says what the network is:

    DDPMScheduler and its kin            a diffusion model, of the scheduler's prediction_type
    FlowMatchEulerDiscreteScheduler      flow matching
    EDMEulerScheduler                    a denoiser in Karras et al.'s preconditioning
    CMStochasticIterativeScheduler       a consistency model

A denoiser is called at the time 250 ln σ, as those of Song et al. are, from which consistency models start;
EDMEulerScheduler itself has ln σ/4. It is in the folder for its levels and for what its kind says, and
sampling is for this package: no diffusers scheduler has both this time and this preconditioning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor

from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.objectives.consistency import DoublingScales, FixedScales, GrowingScales, ScaleSchedule
from robustdiff.objectives.denoising import Variance
from robustdiff.objectives.preconditioning import (
    Denoise,
    DiffusionDenoiser,
    OverTimes,
    Preconditioned,
    karras_process,
    karras_sigmas,
)
from robustdiff.process import DiffusionProcess
from robustdiff.recipe import (
    ConsistencyConfig,
    DenoisingConfig,
    EdmConfig,
    ModelConfig,
    ObjectiveConfig,
    ProcessConfig,
    Recipe,
)

__all__ = [
    "PRETRAINED",
    "Built",
    "build_model",
    "build_process",
    "build_unet",
    "check_classes",
    "check_fit",
    "denoiser_of",
    "load_pipeline",
    "model_of",
    "objective_of",
    "process_of",
    "save_pipeline",
    "scale_schedule",
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


def build_process(config: ProcessConfig, objective: DenoisingConfig) -> tuple[DiffusionProcess, Any]:
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


def scale_schedule(config: ConsistencyConfig, steps: int) -> ScaleSchedule:
    """The schedule of the numbers of levels over so many optimiser updates."""
    if config.start_scales is None:
        return FixedScales(config.scales, config.decay)
    kind = GrowingScales if config.schedule == "growing" else DoublingScales
    return kind(config.start_scales, config.scales, config.decay, steps)


def _build_levels(objective: EdmConfig | ConsistencyConfig, steps: int) -> tuple[DiffusionProcess, Any]:
    """The process over noise levels when training ends, and its diffusers scheduler."""
    levels = objective.levels if isinstance(objective, EdmConfig) else scale_schedule(objective, steps)(steps)[0]
    kind = EDMEulerScheduler if isinstance(objective, EdmConfig) else CMStochasticIterativeScheduler
    scheduler = kind(
        num_train_timesteps=levels,
        sigma_min=objective.sigma_min,
        sigma_max=objective.sigma_max,
        sigma_data=objective.sigma_data,
        rho=objective.rho,
    )
    return karras_process(_sigmas_of(scheduler)), scheduler


def _sigmas_of(scheduler: Any) -> Tensor:
    config = scheduler.config
    return karras_sigmas(config.num_train_timesteps, config.sigma_min, config.sigma_max, config.rho)


def process_of(scheduler: Any) -> DiffusionProcess:
    """The process that a pipeline's scheduler was made for; of a denoiser the one that :func:`model_of` is over."""
    match scheduler:
        case FlowMatchEulerDiscreteScheduler():
            return DiffusionProcess.flow(scheduler.config.num_train_timesteps)
        case CMStochasticIterativeScheduler():
            return karras_process(_sigmas_of(scheduler))
        case EDMEulerScheduler():
            return OverTimes.process(_sigmas_of(scheduler))
    try:
        return DiffusionProcess.from_scheduler(scheduler)
    except ValueError as error:
        raise InputError(str(error)) from None


def objective_of(scheduler: Any, unet: UNet2DModel) -> ObjectiveConfig:
    """What the network of a pipeline predicts, read from the scheduler and the number of its output channels."""
    config = scheduler.config
    match scheduler:
        case FlowMatchEulerDiscreteScheduler():
            return DenoisingConfig(prediction="flow")
        case CMStochasticIterativeScheduler() | EDMEulerScheduler():
            levels = {name: getattr(config, name) for name in ("sigma_min", "sigma_max", "rho", "sigma_data")}
            if isinstance(scheduler, EDMEulerScheduler):
                return EdmConfig(name="edm", levels=config.num_train_timesteps, **levels)
            return ConsistencyConfig(name="consistency", scales=config.num_train_timesteps, **levels)
    learned = unet.config.out_channels == 2 * unet.config.in_channels
    return DenoisingConfig(
        prediction=getattr(config, "prediction_type", "epsilon"),
        variance="learned_range" if learned else "fixed",
    )


def model_of(scheduler: Any, unet: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's network as samplers call it: over the times of :func:`process_of`, predicting what
    :func:`objective_of` says."""
    config = scheduler.config
    match scheduler:
        case CMStochasticIterativeScheduler():
            return Preconditioned(unet, config.sigma_data, config.sigma_min)
        case EDMEulerScheduler():
            return OverTimes(Preconditioned(unet, config.sigma_data), _sigmas_of(scheduler))
    return unet


def denoiser_of(scheduler: Any, unet: UNet2DModel, network: Callable[..., Any] | None = None) -> Denoise:
    """A pipeline's network as a denoiser D(x, σ), such as a teacher.

    Arguments:
        scheduler: The pipeline's scheduler.
        unet: The pipeline's network.
        network: What to call in its place, where it is wrapped.

    Raises:
        InputError: If it is a consistency model or of flow matching.
    """
    network = unet if network is None else network
    if isinstance(scheduler, EDMEulerScheduler):
        return Preconditioned(network, scheduler.config.sigma_data)
    objective = objective_of(scheduler, unet)
    if not isinstance(objective, DenoisingConfig) or objective.prediction == "flow":
        kind = "a flow-matching model" if isinstance(objective, DenoisingConfig) else "a consistency model"
        raise InputError(f"{kind} cannot be a teacher: give a diffusion model, or one trained with objective=edm")
    return DiffusionDenoiser(network, process_of(scheduler), objective.prediction)


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
    kind = ConsistencyModelPipeline if isinstance(scheduler, CMStochasticIterativeScheduler) else DDPMPipeline
    kind(unet, scheduler).save_pretrained(folder, safe_serialization=True)


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
    given = recipe.process
    if recipe.model.name == "unet":
        if given is not None and given.name == "pretrained":
            raise InputError("process=pretrained needs model.name=pretrained: choose cosine, linear or flow")
        objective: ObjectiveConfig = recipe.objective or DenoisingConfig()
        variance = objective.variance if isinstance(objective, DenoisingConfig) else "fixed"
        process, scheduler = _build_process_of(objective, given, recipe.steps)
        unet = build_unet(recipe.model, dataset.shape, dataset.num_classes, variance)
        return Built(unet, process, scheduler, objective)
    assert recipe.model.path is not None  # the recipe's own validation
    unet, scheduler = load_pipeline(recipe.model.path)
    if given is not None and given.name == "pretrained":
        given = None
    own = objective_of(scheduler, unet)
    objective = recipe.objective or own
    if recipe.objective is None and isinstance(own, ConsistencyConfig):
        raise InputError(f"the model {recipe.model.path} is a consistency model: give the recipe its objective")
    diffusion = isinstance(own, DenoisingConfig) and isinstance(objective, DenoisingConfig)
    if diffusion:
        objective = own.model_copy(update={name: getattr(objective, name) for name in objective.model_fields_set})
    if diffusion and given is None:
        process = process_of(scheduler)
    else:
        process, scheduler = _build_process_of(objective, given, recipe.steps)
    check_fit(unet, dataset.shape, str(recipe.model.path))
    check_classes(unet, dataset.num_classes, str(recipe.model.path))
    if not isinstance(objective, DenoisingConfig) and unet.config.out_channels != unet.config.in_channels:
        raise InputError(
            f"the model {recipe.model.path} has a learned variance, which objective={objective.name} has no use for"
        )
    return Built(unet, process, scheduler, objective)


def _build_process_of(
    objective: ObjectiveConfig, config: ProcessConfig | None, steps: int
) -> tuple[DiffusionProcess, Any]:
    """The process that an objective is over, where it is not the checkpoint's, and its diffusers scheduler."""
    if isinstance(objective, DenoisingConfig):
        return build_process(config or ProcessConfig(), objective)
    if config is not None:
        raise InputError(f"objective={objective.name} has levels of its own: leave process out")
    return _build_levels(objective, steps)


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


def check_classes(unet: UNet2DModel, num_classes: int | None, path: str) -> None:
    """Whether a network, if it is conditioned on classes, knows all those of the data.

    Raises:
        InputError: If it does not, or the data has none.
    """
    known = unet.config.num_class_embeds
    if known is None:
        return
    if num_classes is None:
        raise InputError(f"the model {path} needs class labels, and this data has none: choose data that has them")
    if num_classes > known:
        raise InputError(
            f"the model {path} knows {known} classes and the data has {num_classes}: choose data of no more classes"
        )
