"""The model that a recipe trains: new, or from a pipeline folder, with its process and objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from robustdiff.backbones.backbone import Backbone
from robustdiff.backbones.model import Model, load_model
from robustdiff.backbones.scheduler import mark_as_own, objective_of, process_of
from robustdiff.codecs.pixels import Pixels
from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.objectives.consistency import DoublingScales, FixedScales, GrowingScales, ScaleSchedule
from robustdiff.objectives.preconditioning import karras_process, karras_sigmas
from robustdiff.process import DiffusionProcess
from robustdiff.recipe import ConsistencyConfig, DenoisingConfig, EdmConfig, ObjectiveConfig, ProcessConfig, Recipe

__all__ = ["Built", "build_model", "build_process", "scale_schedule"]


def build_process(config: ProcessConfig, objective: DenoisingConfig) -> tuple[DiffusionProcess, Any]:
    """A process by name, and the diffusers scheduler that goes into the pipeline folder with it."""
    if (config.name == "flow") != (objective.prediction == "flow"):
        raise InputError("process=flow and objective.prediction=flow go together: set both, or neither")
    if config.name == "flow":
        # A flow's time is continuous: T is how finely it is drawn, and the scheduler has always 1000 t.
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=config.shift)
        return DiffusionProcess.flow(config.T, config.shift), mark_as_own(scheduler)
    scheduler = DDPMScheduler(
        config.T,
        beta_schedule={"cosine": "squaredcos_cap_v2", "linear": "linear"}[config.name],
        beta_start=0.0001 * 1000 / config.T,
        beta_end=0.02 * 1000 / config.T,
        prediction_type=objective.prediction,
        variance_type={"fixed": "fixed_small"}.get(objective.variance, objective.variance),
    )
    process = DiffusionProcess.cosine(config.T) if config.name == "cosine" else DiffusionProcess.linear(config.T)
    return process, mark_as_own(scheduler)


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
    sigmas = karras_sigmas(levels, objective.sigma_min, objective.sigma_max, objective.rho)
    return karras_process(sigmas), mark_as_own(scheduler)


@dataclass
class Built:
    """A model to be trained.

    Attributes:
        model: The model.
        process: The process of the objective, in float64.
        objective: The objective, with the model's own parameterisation where the recipe does not give one.
    """

    model: Model
    process: DiffusionProcess
    objective: ObjectiveConfig


def build_model(recipe: Recipe, dataset: ImageDataset) -> Built:
    """Return the model of a recipe with its process and objective.

    Raises:
        InputError: If the checkpoint is missing or of another kind, or the data does not fit the network.
    """
    source = recipe.model.source
    return _new(recipe, dataset) if source is None else _pretrained(recipe, source, dataset)


def _new(recipe: Recipe, dataset: ImageDataset) -> Built:
    if recipe.process is not None and recipe.process.name == "pretrained":
        raise InputError("process=pretrained needs model.name=pretrained: choose cosine, linear or flow")
    objective: ObjectiveConfig = recipe.objective or DenoisingConfig()
    process, scheduler = _build_process_of(objective, recipe.process, recipe.steps)
    codec = Pixels() if recipe.codec is None else recipe.codec.build(None)
    learned = isinstance(objective, DenoisingConfig) and objective.variance == "learned_range"
    backbone = recipe.model.build(codec.encoded_shape(dataset.shape), dataset.num_classes, learned)
    backbone.note_classes(dataset.num_classes)
    return Built(Model(backbone, scheduler, codec), process, objective)


def _pretrained(recipe: Recipe, path: str, dataset: ImageDataset) -> Built:
    model = load_model(path)
    if recipe.codec is not None:
        model.codec = recipe.codec.build(model.codec)
    backbone, given = model.backbone, recipe.process
    if given is not None and given.name == "pretrained":
        given = None
    try:
        own = objective_of(model.scheduler, backbone)
    except InputError as error:
        raise InputError(f"the model {path}: {error}") from None
    objective = recipe.objective or own
    if recipe.objective is None and isinstance(own, ConsistencyConfig):
        raise InputError(f"the model {path} is a consistency model: give the recipe its objective")
    if isinstance(own, EdmConfig) and model.scheduler.config.get("_time_scale") is None:
        raise InputError(
            f"the model {path} is called at ln σ/4, and training over noise levels calls networks at "
            "250 ln σ: it can be sampled and be a teacher, but not be trained"
        )
    if isinstance(own, DenoisingConfig) and isinstance(objective, DenoisingConfig):
        objective = own.model_copy(update={name: getattr(objective, name) for name in objective.model_fields_set})
        _check_channels(backbone, objective, path)
        if given is None:
            scheduler = _retargeted(model.scheduler, own, objective, path)
            objective_of(scheduler, backbone)  # raises where the process has no such parameterisation
            process = process_of(scheduler)
        else:
            process, scheduler = build_process(given, objective)
    else:
        process, scheduler = _build_process_of(objective, given, recipe.steps)
    model.check_data(dataset)
    backbone.note_classes(dataset.num_classes)
    if recipe.model.condition_dropout and not model.condition.droppable:
        raise InputError(
            f"model.condition_dropout needs a network with an empty condition, such as a null class after the "
            f"{dataset.num_classes or 'no'} classes of the data, and the model {path} has none: leave it out"
        )
    if not isinstance(objective, DenoisingConfig) and backbone.learned_variance:
        raise InputError(f"the model {path} has a learned variance, which objective={objective.name} has no use for")
    return Built(Model(backbone, scheduler, model.codec, path=path), process, objective)


def _check_channels(backbone: Backbone, objective: DenoisingConfig, path: str) -> None:
    """Raise InputError if a network does not have the output channels of an objective."""
    learned = backbone.learned_variance
    if learned != (objective.variance == "learned_range"):
        raise InputError(
            f"objective.variance={objective.variance} does not go with the model {path}, which has "
            f"{backbone.channels} input and {(1 + learned) * backbone.channels} output channels: leave "
            "objective.variance out"
        )


def _retargeted(scheduler: Any, own: DenoisingConfig, objective: DenoisingConfig, path: str) -> Any:
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


def _build_process_of(
    objective: ObjectiveConfig, config: ProcessConfig | None, steps: int
) -> tuple[DiffusionProcess, Any]:
    """The process that an objective is over, where it is not the checkpoint's, and its diffusers scheduler."""
    if isinstance(objective, DenoisingConfig):
        return build_process(config or ProcessConfig(), objective)
    if config is not None:
        raise InputError(f"objective={objective.name} has levels of its own: leave process out")
    return _build_levels(objective, steps)
