"""Construction of the model that a recipe trains, new or from a pipeline folder, with its process and objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robustdiff.backbones.backbone import Backbone
from robustdiff.backbones.frozen import FrozenWeights
from robustdiff.backbones.kinds.kind import kind_of, mark_as_own
from robustdiff.backbones.model import Model, load_model
from robustdiff.codecs.codec import Codec, build_codec
from robustdiff.codecs.pixels import Pixels
from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.objectives.objective import OBJECTIVES, ObjectiveConfig
from robustdiff.process import DiffusionProcess
from robustdiff.recipe import Recipe
from robustdiff.samplers.sample import resolve
from robustdiff.weights import DTYPES

__all__ = ["Built", "build_model", "load_start"]


@dataclass
class Built:
    """A model to be trained.

    Attributes:
        process: The process of the objective, in float64.
        objective: The objective; its parameterisation is the model's unless the recipe sets one.
        pretrained: The model that training begins with, with its own scheduler; None for a new network.
    """

    model: Model
    process: DiffusionProcess
    objective: ObjectiveConfig
    pretrained: Model | None = None


def load_start(recipe: Recipe) -> Model | None:
    """Load the checkpoint that training begins with, or return None for a new network.

    The size of the recipe's data is compared with the checkpoint's here, before any image is read.

    Raises:
        InputError: If the checkpoint is missing or of another kind, or does not take images of that size.
    """
    if recipe.model.source is None:
        return None
    lora = recipe.model.lora
    frozen = None if lora is None else FrozenWeights(DTYPES[recipe.precision], recipe.model.quantize)
    model = load_model(recipe.model.source, recipe.model.side, frozen)
    size, own = recipe.data.size, model.backbone.size
    if size is not None and own is not None and recipe.codec is None:
        channels = model.codec.decoded_shape((model.backbone.channels, *own))[0]
        model.check_shape((channels, size, size))
    return model


def build_model(recipe: Recipe, dataset: ImageDataset, start: Model | None = None) -> Built:
    """Build the model of a recipe, with its process and objective, from the checkpoint of :func:`load_start`, if given.

    Raises:
        InputError: If the checkpoint is missing or of another kind, or the data or the sampler does not fit the
            network.
    """
    start = start or load_start(recipe)
    built = _new(recipe, dataset) if start is None else _pretrained(recipe, start, dataset)
    if recipe.sampler.name not in (None, *built.model.samplers):
        raise InputError(
            f"sampler.name={recipe.sampler.name} does not suit the model: give {' or '.join(built.model.samplers)}"
        )
    if recipe.sampler.steps is not None:
        try:
            name = recipe.sampler.name or built.model.samplers[0]
            resolve(built.model, built.model.process, name, recipe.sampler.steps, {})
        except InputError as error:
            raise InputError(f"sampler.steps: {error}") from None
    if recipe.model.gradient_checkpointing:
        try:
            built.model.network.enable_gradient_checkpointing()
        except ValueError:  # of a class without it
            name = type(built.model.network).__name__
            raise InputError(f"model.gradient_checkpointing is not for {name}: leave it out") from None
    return built


def _new(recipe: Recipe, dataset: ImageDataset) -> Built:
    objective = recipe.objective or OBJECTIVES["denoising"].model_validate({})
    process, scheduler = objective.new_process(recipe.process, recipe.steps)
    codec = Pixels() if recipe.codec is None else build_codec(recipe.codec, None)
    shape = codec.encoded_shape(dataset.shape)
    backbone = recipe.model.build(shape, dataset.num_classes, objective.learned_variance)
    backbone.note_classes(dataset.num_classes)
    backbone.check_codec(codec, recipe.model.name)
    return Built(Model(backbone, _own(scheduler, codec), codec), process, objective)


def _own(scheduler: Any, codec: Codec) -> Any:
    """Return a new scheduler, marked as written by this package, that clips x̂_0 as the codec says."""
    if codec.clip is None and "clip_denoised" in scheduler.config:
        scheduler.register_to_config(clip_denoised=False)
    if codec.clip != 1 and "clip_sample" in scheduler.config:  # the default is that of pixels
        clip = {} if codec.clip is None else {"clip_sample_range": codec.clip}
        scheduler.register_to_config(clip_sample=codec.clip is not None, **clip)
    return mark_as_own(scheduler)


def _pretrained(recipe: Recipe, model: Model, dataset: ImageDataset) -> Built:
    path, lora, frozen = model.path, recipe.model.lora, model.frozen
    if lora is None:
        model.merge()
    elif model.adapter is not None:
        raise InputError(
            f"the model {path} is a LoRA already, and model.lora would be another on top: merge it by robustdiff "
            f"convert {path} FOLDER --to pipeline, and set model.path=FOLDER"
        )
    if recipe.codec is not None:
        given_codec, model.codec = model.codec, build_codec(recipe.codec, model.codec)
        before, after = (codec.components or codec.fingerprint() for codec in (given_codec, model.codec))
        if lora is not None and before != after:
            raise InputError("a LoRA is saved without a codec, and works on its base's: leave codec.path out")
        model.backbone.check_codec(model.codec, path)
    backbone, given = model.backbone, recipe.process
    recipe.model.configure(backbone)
    if given is not None and given.name == "pretrained":
        given = None
    try:
        own = model.kind.objective()
    except InputError as error:
        raise InputError(f"the model {path}: {error}") from None
    objective = recipe.objective or own
    if recipe.objective is None and own.needs_target:
        raise InputError(f"the model {path} is a consistency model: give the recipe its objective")
    if own.name == "latent-consistency" != objective.name:
        raise InputError(
            f"the model {path} is a latent consistency model, and objective={objective.name} would undo it: set "
            "objective.name=latent-consistency, or take its teacher"
        )
    model.kind.check_trainable(path)
    objective = objective.adopt(own)
    over_levels = own.over_levels or objective.over_levels
    if not over_levels:
        _check_channels(backbone, objective, path)
    model.check_data(dataset)
    if given is None and not over_levels:
        scheduler = _retargeted(model.scheduler, own, objective, path)
        kind = kind_of(scheduler)(scheduler, backbone)
        kind.objective()  # raises where the process has no such parameterisation
        process = kind.process()
    else:
        process, scheduler = objective.new_process(given, recipe.steps)
        scheduler = _own(scheduler, model.codec)
    backbone.note_classes(dataset.num_classes)
    if recipe.model.condition_dropout and not model.condition.droppable:
        raise InputError(
            f"model.condition_dropout needs a network with an empty condition, such as a null class after the "
            f"{dataset.num_classes or 'no'} classes of the data, and the model {path} has none: leave it out"
        )
    if objective.over_levels and backbone.learned_variance:
        raise InputError(f"the model {path} has a learned variance, which objective={objective.name} has no use for")
    if objective.needs_unconditional and not model.condition.droppable:
        raise InputError(
            f"objective.guidance needs a network with an empty condition, and the model {path} has none: set "
            "objective.guidance=[0, 0]"
        )
    objective, backbone = objective.student_of(backbone, lora is not None)
    student = Model(backbone, objective.scheduler_of(scheduler), model.codec, path=path)
    if lora is not None and frozen is not None:
        student.add_lora(lora, recipe.seed, frozen.fingerprint)
    return Built(student, process, objective, model)


def _check_channels(backbone: Backbone, objective: ObjectiveConfig, path: str) -> None:
    """Raise InputError if a network does not have the output channels of an objective."""
    learned = backbone.learned_variance
    if learned != objective.learned_variance:
        variance = "learned_range" if objective.learned_variance else "fixed"
        raise InputError(
            f"objective.variance={variance} does not go with the model {path}, which has {backbone.channels} input "
            f"and {(1 + learned) * backbone.channels} output channels: leave objective.variance out"
        )


def _retargeted(scheduler: Any, own: ObjectiveConfig, objective: ObjectiveConfig, path: str) -> Any:
    """Return the scheduler of a checkpoint with the parameterisation that the objective trains."""
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
