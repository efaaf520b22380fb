"""Networks and processes that a recipe names, new or from a pipeline folder.

Everything that this project trains is a diffusers pipeline folder: ``unet/`` and ``scheduler/``, with
``model_index.json`` beside them, which ``DDPMPipeline.from_pretrained`` reads, or for a consistency model
``ConsistencyModelPipeline.from_pretrained``. Its scheduler says what the network is
(:mod:`robustdiff.backbones.scheduler`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel

from robustdiff.backbones.pipeline import downsampling, load_pipeline, size_of
from robustdiff.backbones.scheduler import kind_of, mark_as_own, objective_of, process_of
from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.objectives.denoising import Variance
from robustdiff.objectives.objective import OBJECTIVES, ObjectiveConfig
from robustdiff.process import DiffusionProcess
from robustdiff.recipe import ModelConfig, Recipe

__all__ = [
    "Built",
    "build_model",
    "build_unet",
    "check_classes",
    "check_fit",
]


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
    embedded = None
    if config.class_cond and num_classes is not None:
        embedded = num_classes + (config.condition_dropout > 0)  # the last is the null class
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
        num_class_embeds=embedded,
    )


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
        objective = recipe.objective or OBJECTIVES["denoising"].model_validate({})
        process, scheduler = objective.new_process(given, recipe.steps)
        variance: Variance = "learned_range" if objective.learned_variance else "fixed"
        unet = build_unet(recipe.model, dataset.shape, dataset.num_classes, variance)
        _note_null_class(unet, dataset)
        return Built(unet, process, mark_as_own(scheduler), objective)
    assert recipe.model.path is not None  # the recipe's own validation
    unet, scheduler = load_pipeline(recipe.model.path)
    if given is not None and given.name == "pretrained":
        given = None
    try:
        own = objective_of(scheduler, unet)
    except InputError as error:
        raise InputError(f"the model {recipe.model.path}: {error}") from None
    objective = recipe.objective or own
    if recipe.objective is None and own.needs_target:
        raise InputError(f"the model {recipe.model.path} is a consistency model: give the recipe its objective")
    if kind_of(scheduler) == "edm" and scheduler.config.get("_time_scale") is None:
        raise InputError(
            f"the model {recipe.model.path} is called at ln σ/4, and training over noise levels calls networks at "
            "250 ln σ: it can be sampled and be a teacher, but not be trained"
        )
    objective = objective.adopt(own)
    if not (own.over_levels or objective.over_levels):
        _check_channels(unet, objective, str(recipe.model.path))
        if given is None:
            scheduler = _retargeted(scheduler, own, objective, str(recipe.model.path))
            objective_of(scheduler, unet)  # raises where the process has no such parameterisation
            process = process_of(scheduler)
        else:
            process, scheduler = objective.new_process(given, recipe.steps)
            mark_as_own(scheduler)
    else:
        process, scheduler = objective.new_process(given, recipe.steps)
        mark_as_own(scheduler)
    check_fit(unet, dataset.shape, str(recipe.model.path))
    check_classes(unet, dataset.num_classes, str(recipe.model.path))
    if recipe.model.condition_dropout and unet.config.num_class_embeds != (dataset.num_classes or 0) + 1:
        raise InputError(
            f"model.condition_dropout needs a network with a null class after the {dataset.num_classes or 'no'} "
            f"classes of the data, and the model {recipe.model.path} has {unet.config.num_class_embeds or 'none'}: "
            "leave it out"
        )
    if objective.over_levels and unet.config.out_channels != unet.config.in_channels:
        raise InputError(
            f"the model {recipe.model.path} has a learned variance, which objective={objective.name} has no use for"
        )
    _note_null_class(unet, dataset)
    return Built(unet, process, scheduler, objective)


def _note_null_class(unet: UNet2DModel, dataset: ImageDataset) -> None:
    """Remember in a network that its last class is none of the data's, so that it is never sampled."""
    if unet.config.num_class_embeds is not None and unet.config.num_class_embeds == (dataset.num_classes or 0) + 1:
        unet.register_to_config(_null_class=True)


def _check_channels(unet: UNet2DModel, objective: ObjectiveConfig, path: str) -> None:
    """Raise InputError if a network does not have the output channels of an objective."""
    learned = unet.config.out_channels == 2 * unet.config.in_channels
    if learned != objective.learned_variance:
        variance = "learned_range" if objective.learned_variance else "fixed"
        raise InputError(
            f"objective.variance={variance} does not go with the model {path}, which has "
            f"{unet.config.in_channels} input and {unet.config.out_channels} output channels: leave "
            "objective.variance out"
        )


def _retargeted(scheduler: Any, own: ObjectiveConfig, objective: ObjectiveConfig, path: str) -> Any:
    """Return a checkpoint's scheduler with the parameterisation that is trained, for the pipeline folder.

    Raises:
        InputError: If the process of the checkpoint has no such parameterisation.
    """
    if objective.prediction == own.prediction:
        return scheduler
    if "flow" in (objective.prediction, own.prediction):
        kind = "of flow matching" if own.prediction == "flow" else "a diffusion model"
        raise InputError(
            f"the model {path} is {kind}, and objective.prediction={objective.prediction} is not for its process: "
            f"leave objective.prediction out, or set process={'flow' if objective.prediction == 'flow' else 'cosine'} "
            "as well"
        )
    return type(scheduler).from_config(scheduler.config, prediction_type=objective.prediction)


def check_fit(unet: UNet2DModel, shape: tuple[int, int, int], path: str) -> None:
    """Check that a network takes images of a shape; one without a ``sample_size`` gets theirs.

    Raises:
        InputError: If it does not take them.
    """
    channels, height, width = shape
    if unet.config.in_channels != channels:
        wanted = unet.config.in_channels
        remedy = f"set data.channels={wanted}" if wanted in (1, 3) else "only grey and colour images can be read"
        raise InputError(f"the model {path} takes {wanted} channels and the data has {channels}: {remedy}")
    size = size_of(unet)
    if size is None:
        multiple = downsampling(unet)
        if height % multiple or width % multiple:
            raise InputError(
                f"the model {path} takes sides that are multiples of {multiple}, the data has {height}×{width}: "
                "set data.size to such a number"
            )
        unet.register_to_config(sample_size=height if height == width else (height, width))
    elif (height, width) != size:
        remedy = f"set data.size={size[0]}" if size[0] == size[1] else "give images of that height and width"
        raise InputError(
            f"the model {path} takes images of {size[0]}×{size[1]}, the data has {height}×{width}: {remedy}"
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
