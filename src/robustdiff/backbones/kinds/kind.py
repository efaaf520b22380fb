"""The base class of the kinds of models, and their registry.

A diffusers scheduler tells the kind of the model that it is for, and with it the noising process, the parameterisation
of the network's output, and the settings of sampling.

Schedulers written by this package have ``_timestep_spacing: own``, with which each sampler uses its own default
spacing. (diffusers preserves fields that begin with an underscore, and ignores them.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError
from torch import Tensor

from robustdiff.backbones.backbone import Backbone
from robustdiff.errors import InputError, first_mistake
from robustdiff.objectives.objective import ObjectiveConfig
from robustdiff.objectives.preconditioning import Denoise
from robustdiff.process import DiffusionProcess
from robustdiff.registry import Registry
from robustdiff.samplers.denoiser import DynamicThreshold

__all__ = ["KINDS", "ModelKind", "incorrect", "kind_of", "mark_as_own", "validated"]

Section = TypeVar("Section", bound=ObjectiveConfig)


class ModelKind(ABC):
    """A kind of model, read from a diffusers scheduler.

    Args:
        scheduler: The scheduler.
        backbone: The network and its family.

    Attributes:
        name: The name of the kind.
        title: The name in messages, with an article.
        general: Whether the kind has all schedulers that :meth:`reads` returns True for and no other kind has.
        marks: Fields that this package adds to the configuration of schedulers that it writes.
        sampler: The default sampler; None for that of the process.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    general: ClassVar[bool] = False
    marks: ClassVar[Mapping[str, Any]] = {}
    sampler: ClassVar[str | None] = None

    def __init__(self, scheduler: Any, backbone: Backbone) -> None:
        self.scheduler = scheduler
        self.config = scheduler.config
        self.backbone = backbone

    @classmethod
    @abstractmethod
    def reads(cls, scheduler: Any) -> bool:
        """Return whether a scheduler is for models of this kind."""

    @abstractmethod
    def process(self) -> DiffusionProcess:
        """Return the process, which defines the times of :meth:`model`.

        Raises:
            InputError: If the scheduler defines no process, or its table has an invalid noise level.
        """

    @abstractmethod
    def objective(self) -> ObjectiveConfig:
        """Return the parameterisation of the network as the section of an objective.

        Raises:
            InputError: If the scheduler contradicts the number of channels or the process, or has an unknown setting.
        """

    def model(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """Return the network for samplers, with the times of :meth:`process` and the parameterisation of
        :meth:`objective`."""
        return network

    def denoiser(self, network: Callable[..., Any]) -> Denoise:
        """Return the network, or a wrapper of it, as a denoiser D(x, σ), such as a teacher.

        Raises:
            InputError: If models of this kind are not denoisers.
        """
        raise InputError(f"{self.title} cannot be a teacher: give a diffusion model, or one trained with objective=edm")

    def levels(self) -> dict[str, float]:
        """Return sigma_min, sigma_max, rho and sigma_data of a network over noise levels σ; {} for other networks.

        Raises:
            InputError: If the scheduler defines no levels.
        """
        return {}

    def check_reaches(self, sigma: float, path: str, bound: str = "sigma_max") -> None:
        """Check that a denoiser has levels up to a given one.

        Diffusion models pass: :class:`~robustdiff.objectives.preconditioning.DiffusionDenoiser` evaluates them beyond
        their table.

        Args:
            sigma: The largest level that it is evaluated at.
            path: The name of the model in messages.
            bound: The name of the setting of that level in messages.

        Raises:
            InputError: If it has not.
        """
        highest = self.levels().get("sigma_max", sigma)
        if highest < sigma:
            raise InputError(
                f"the teacher {path} has levels up to {highest:g} and is asked up to {sigma:g}: lower {bound}, or "
                "take another teacher"
            )

    def check_trainable(self, path: str) -> None:  # noqa: B027  (most models are)
        """Check that the model can be trained on.

        Args:
            path: The name of the model in messages.

        Raises:
            InputError: If it cannot.
        """

    def sampling(self) -> dict[str, Any]:
        """Return the settings of sampling, as arguments of :func:`robustdiff.sample`.

        Each setting applies to the samplers that take it. ``clip`` is present only if the scheduler has a setting for
        clipping, and ``spacing`` only if it differs from the samplers' own.

        Raises:
            InputError: If the scheduler has a setting that is not supported.
        """
        config, result = self.config, dict[str, Any]()
        if config.get("thresholding", False):
            result["clip"] = DynamicThreshold(config.dynamic_thresholding_ratio, config.sample_max_value)
        elif "clip_sample" in config:
            result["clip"] = float(config.get("clip_sample_range", 1.0)) if config.clip_sample else False
        if config.get("steps_offset"):
            result["steps_offset"] = config.steps_offset
        spacing = None if config.get("_timestep_spacing") == "own" else self.spacing()
        if spacing is not None:
            result["spacing"] = spacing
        return result

    def spacing(self) -> Callable[[int, int], Tensor] | None:
        """Return the function of (steps, T) that chooses the times of sampling; None for the samplers' own.

        Raises:
            InputError: If the scheduler has a setting that is not supported.
        """
        return None


KINDS: Registry[type[ModelKind]] = Registry("kind of model", "kinds", "backbones.kinds")
"""The kinds of models by name."""


def kind_of(scheduler: Any) -> type[ModelKind]:
    """Return the kind of model that a scheduler is for.

    Raises:
        InputError: If the kind of model is not supported.
    """
    for kind in sorted(KINDS.values(), key=lambda kind: kind.general):
        if kind.reads(scheduler):
            return kind
    raise InputError(
        f"the scheduler {type(scheduler).__name__} has no alphas_cumprod and is not one of flow matching, EDM or "
        "consistency models: replace it by the scheduler that the model was trained with, such as DDPMScheduler"
    )


def mark_as_own(scheduler: Any) -> Any:
    """Mark a scheduler as written by this package (``_timestep_spacing``, …), and return it."""
    scheduler.register_to_config(_timestep_spacing="own", **kind_of(scheduler).marks)
    return scheduler


def incorrect(scheduler: Any, error: Exception) -> InputError:
    """Return the error of a scheduler whose numbers define no process."""
    return InputError(f"{type(scheduler).__name__}: {error}: correct scheduler_config.json")


def validated(scheduler: Any, section: type[Section], **values: Any) -> Section:
    """Return the section of an objective with values of a scheduler.

    Raises:
        InputError: If the section does not take such values.
    """
    try:
        return section(**values)
    except ValidationError as error:
        name = type(scheduler).__name__
        raise InputError(f"{name}: {first_mistake(error)}: correct scheduler_config.json") from None
