"""The base class of objectives, losses that are drawn once for a batch and evaluated in every pass over it, and of
their sections in a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from robustdiff.objectives.timesteps import TimestepSampler
from robustdiff.process import DiffusionProcess, Prediction, ProcessConfig
from robustdiff.registry import Registry
from robustdiff.section import Named

__all__ = ["OBJECTIVES", "Draw", "Objective", "ObjectiveConfig", "follow", "gaussian", "precise", "predict"]


@dataclass
class Draw:
    """A batch to train on, the same in all its passes.

    Attributes:
        x0: Clean samples, with shape (B, *).
        t: Time indices, or where time is continuous times, with shape (B,).
        noise: The noise ε, with shape (B, *).
        x_t: The noisy points that δ moves, with shape (B, *).
        weight: What multiplies the loss of each sample, with shape (B,); none is 1.
        condition: What else the model is called with, such as ``class_labels``.
    """

    x0: Tensor
    t: Tensor
    noise: Tensor
    x_t: Tensor
    weight: Tensor | None = None
    condition: dict[str, Any] = field(default_factory=dict)


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise like a tensor, drawn where the generator is, or else where the tensor is."""
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def predict(model: Callable[..., Any], x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
    """Call a model as diffusers calls it, ``model(x, t, **condition).sample``, or one that returns a tensor."""
    output = model(x, t, **condition)
    return output if isinstance(output, Tensor) else output.sample


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of levels, times and weights beside points of some precision: never below float32.

    250 ln σ would be rounded to steps of 8 in bfloat16, and neighbouring levels to the same number.
    """
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def follow(average: list[Tensor], values: list[Tensor], weight: float, stepped: Tensor | None = None) -> None:
    """Move an average towards its parameters in place, a ← (1 − w) a + w θ.

    Arguments:
        average: a.
        values: θ, of the same shapes.
        weight: w in [0, 1]; with 1, a becomes θ exactly.
        stepped: Whether θ has changed, a boolean scalar on its device; where it is false a stays. None: it has.
    """
    if stepped is None or weight == 1:
        torch._foreach_lerp_(average, values, weight)
        return
    # The flag is not read: on a GPU that would wait for everything before it.
    gaps = torch._foreach_sub(values, average)
    torch._foreach_mul_(gaps, weight * stepped)
    torch._foreach_add_(average, gaps)


class Objective(ABC):
    """A training loss.

    Attributes:
        process: The process whose times ``Draw.t`` are.
        timesteps: How they are drawn.
    """

    process: DiffusionProcess
    timesteps: TimestepSampler

    @abstractmethod
    def draw(self, x0: Tensor, t: Tensor | None = None, noise: Tensor | None = None, **more: Any) -> Draw:
        """Fix everything about a batch x_0 (B, *) that depends neither on δ nor on the parameters."""

    @abstractmethod
    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses (B,) at x_t + δ by name, "loss" among them."""

    def more_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw what is random about a batch beside t and ε: arguments of :meth:`draw`, with a row for each sample."""
        return {}

    def after_update(  # noqa: B027  (most objectives have nothing to do)
        self, model: torch.nn.Module, stepped: Tensor | None = None
    ) -> None:
        """Follow an optimiser update. Called with the model after each.

        Arguments:
            model: The model.
            stepped: Whether the update changed the model, a boolean scalar on its device; None: it did.
        """

    def state(self) -> dict[str, Any]:
        """Return what a resumed run has to know, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take what :meth:`state` gave."""


class ObjectiveConfig(Named):
    """The section ``objective`` of a recipe. Every kind has a ``name``, and says what its network predicts.

    Attributes:
        over_levels: Whether the objective has noise levels σ of its own. Otherwise it is over the process of the
            recipe, or of the checkpoint.
        needs_target: Whether it needs a target network, a copy of the student.
        prediction: The parameterisation of the network.
    """

    over_levels: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    prediction: ClassVar[Prediction]
    name: Any

    @property
    def learned_variance(self) -> bool:
        """True if the network has 2C output channels, the second half a variance."""
        return False

    @property
    def fixed_levels(self) -> bool:
        """True if the times or noise levels are the same throughout a training."""
        return True

    @property
    def teacher_path(self) -> str | None:
        """The model to learn from: a run, a pipeline folder, or a shipped model."""
        return None

    @property
    def teacher_sigma_max(self) -> float:
        """The highest noise level at which the teacher is asked."""
        return 0.0

    def adopt(self, own: ObjectiveConfig) -> ObjectiveConfig:
        """Return this section with what it does not say taken from the objective that a checkpoint was trained by."""
        return self

    def new_process(self, process: ProcessConfig | None, steps: int) -> tuple[DiffusionProcess, Any]:
        """Return the process of a new network when training ends, and the diffusers scheduler that describes it.

        Arguments:
            process: The section ``process`` of the recipe.
            steps: The optimiser updates of the training.

        Raises:
            InputError: If the section does not suit the objective.
        """
        raise NotImplementedError

    def build(
        self,
        process: DiffusionProcess,
        steps: int,
        target: Module | None = None,
        teacher: Callable[..., Tensor] | None = None,
    ) -> Objective:
        """Make the objective.

        Arguments:
            process: The network's process.
            steps: The optimiser updates of the training.
            target: The target network, where one is needed.
            teacher: The denoiser D(x, σ) to learn from, where there is one.

        Raises:
            InputError: If the settings do not suit the process or one another.
        """
        raise NotImplementedError


OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry("objective", "objectives")
"""The sections by the names of the objectives."""
