"""The base classes of objectives and of their recipe sections.

An objective draws times and noise once for a batch, and evaluates the loss in every pass over it.
"""

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
    """A training batch with its times and noise, which are the same in all passes over it.

    Attributes:
        x0: Clean samples, with shape (B, *).
        t: Time indices, or times if time is continuous, with shape (B,).
        noise: The noise ε, with shape (B, *).
        x_t: The noisy points to which δ is added, with shape (B, *).
        weight: The weight of each sample's loss, with shape (B,); None for weights of 1.
        condition: Further keyword arguments of the model, such as ``class_labels``.
    """

    x0: Tensor
    t: Tensor
    noise: Tensor
    x_t: Tensor
    weight: Tensor | None = None
    condition: dict[str, Any] = field(default_factory=dict)


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise like a tensor, drawn on the device of the generator if there is one."""
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def predict(model: Callable[..., Any], x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
    """Call a model as diffusers calls it, ``model(x, t, **condition).sample``, or one that returns a tensor."""
    output = model(x, t, **condition)
    return output if isinstance(output, Tensor) else output.sample


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of levels, times and weights for points of a given precision: at least float32.

    In bfloat16, 250 ln σ would be rounded to steps of up to 8, so that neighbouring levels would coincide.
    """
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def follow(average: list[Tensor], values: list[Tensor], weight: float | Tensor, stepped: Tensor | None = None) -> None:
    """Update a moving average of parameters in place, a ← (1 − w) a + w θ.

    Args:
        average: The averages a.
        values: The parameters θ, with the shapes of ``average``.
        weight: The weight w in [0, 1]; the number 1 copies θ exactly. A scalar on the device of θ is not read.
        stepped: A boolean scalar on the device of θ: if False, the averages stay as they are. Default: True.
    """
    if not isinstance(weight, Tensor) and (stepped is None or weight == 1):
        torch._foreach_lerp_(average, values, weight)
        return
    # The flag is not read on the host, which would make it wait for the GPU.
    gaps = torch._foreach_sub(values, average)
    torch._foreach_mul_(gaps, torch.as_tensor(weight if stepped is None else weight * stepped))
    torch._foreach_add_(average, gaps)


class Objective(ABC):
    """The base class of training losses.

    Attributes:
        process: The noising process, to which the times ``Draw.t`` refer.
        timesteps: The distribution of the times.
        updates: The number of optimiser updates so far. Most objectives do not depend on it.
        recordable: True if the losses are made by operations on tensors alone, so that a CUDA graph may replay them. It
            is not inherited, as that of :class:`robustdiff.perturbation.adversary.Adversary`.
    """

    recordable: ClassVar[bool] = False
    process: DiffusionProcess
    timesteps: TimestepSampler
    updates: int = 0

    @abstractmethod
    def draw(self, x0: Tensor, t: Tensor | None = None, noise: Tensor | None = None, **more: Any) -> Draw:
        """Draw everything for a batch x_0 (B, *) that depends neither on δ nor on the parameters."""

    @abstractmethod
    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses at x_t + δ by name, each with shape (B,). The key "loss" holds the one to minimise.

        Args:
            model: The model, called as diffusers calls it with the times of the process.
            draw: The batch.
            delta: The perturbation δ of x_t, with shape (B, *); None for δ = 0.
        """

    def more_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw further random arguments of :meth:`draw` besides t and ε, with a row for each sample."""
        return {}

    def after_update(  # noqa: B027  (most objectives have nothing to do)
        self, model: torch.nn.Module, stepped: Tensor | None = None
    ) -> None:
        """Update the objective's own state. The training loop calls it after each optimiser update.

        Args:
            model: The model.
            stepped: A boolean scalar on the model's device: False if the optimiser skipped the update. Default: True.
        """

    def unrecordable(self) -> str | None:
        """Return why the passes over a batch cannot be recorded as a CUDA graph with this instance, in a few words.

        A recorded pass repeats the operations on the GPU alone, so that nothing of it may depend on ``updates``.

        Returns:
            The reason, or None if they can be recorded.
        """
        return None

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as JSON-serialisable values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore the state that :meth:`state` returned."""


class ObjectiveConfig(Named):
    """The section ``objective`` of a recipe. Each kind has a ``name``.

    Attributes:
        over_levels: True if the objective has noise levels σ of its own. Otherwise it uses the process of the recipe or
            of the checkpoint.
        needs_target: True if the objective needs a target network, which is a copy of the student, or the student.
        prediction: The parameterisation of the network.
    """

    over_levels: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    prediction: ClassVar[Prediction]
    name: Any

    @property
    def learned_variance(self) -> bool:
        """True if the network has 2C output channels, of which the second half is the variance."""
        return False

    @property
    def fixed_levels(self) -> bool:
        """True if the times or noise levels stay the same throughout training.

        A GPU then makes the draw of a batch while it trains on the batch before, so that :meth:`Objective.draw` must
        depend on nothing that training changes on the device.
        """
        return True

    @property
    def teacher_path(self) -> str | None:
        """The path or name of the teacher (a run, a pipeline folder, or a shipped model), if there is one."""
        return None

    @property
    def teacher_bound(self) -> tuple[str, float]:
        """The field that says up to which noise level the teacher supplies targets, and the level."""
        return "", 0.0

    @property
    def needs_teacher(self) -> bool:
        """True if there is a teacher. Without a path of its own it is the pretrained model of the recipe."""
        return self.teacher_path is not None

    @property
    def needs_unconditional(self) -> bool:
        """True if :meth:`Objective.draw` takes the empty condition as ``unconditional``."""
        return False

    def teacher_of(self, model: Any, network: Callable[..., Any], process: DiffusionProcess) -> Callable[..., Any]:
        """Return the teacher as :meth:`build` takes it, by default a denoiser D(x, σ).

        Args:
            model: The :class:`~robustdiff.backbones.model.Model` of the teacher.
            network: The network of the model, or a wrapper of it.
            process: The student's process.

        Raises:
            InputError: If the model cannot be a teacher.
        """
        denoiser: Callable[..., Any] = model.denoiser(network)
        return denoiser

    def student_of(self, backbone: Any, adapted: bool) -> tuple[ObjectiveConfig, Any]:
        """Return this section and the backbone of the student, made of those of the pretrained model.

        Args:
            backbone: The :class:`~robustdiff.backbones.backbone.Backbone` of the pretrained model.
            adapted: Whether the student is an adapter (LoRA) of its network.

        Raises:
            InputError: If the section does not suit the backbone.
        """
        return self, backbone

    def copies_student(self, adapted: bool) -> bool:
        """Return whether the target network is a copy of the student; otherwise it is the student itself."""
        return True

    def scheduler_of(self, scheduler: Any) -> Any:
        """Return the scheduler to save the model with, made of that of the pretrained model.

        Raises:
            InputError: If there is none.
        """
        return scheduler

    def adopt(self, own: ObjectiveConfig) -> ObjectiveConfig:
        """Return this section, with fields of the network that it leaves unset taken from ``own``, a checkpoint's."""
        return self

    def new_process(self, process: ProcessConfig | None, steps: int) -> tuple[DiffusionProcess, Any]:
        """Return the process of a new network at the end of training, and the diffusers scheduler that describes it.

        Args:
            process: The section ``process`` of the recipe.
            steps: The number of optimiser updates of the training.

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
        """Return the objective.

        Args:
            process: The network's process.
            steps: The number of optimiser updates of the training.
            target: The target network, if the objective needs one.
            teacher: The teacher that :meth:`teacher_of` returned, if there is one.

        Raises:
            InputError: If the settings do not suit the process or one another.
        """
        raise NotImplementedError


OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry("objective", "objectives")
"""The recipe sections of objectives, by name."""
