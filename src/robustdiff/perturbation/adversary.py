"""The base classes of adversaries and of their recipe sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.perturbation.norms import NORMS
from robustdiff.perturbation.radii import Constant, Points, RadiusConfig, RadiusSchedule, Ramp
from robustdiff.process import DiffusionProcess, broadcast
from robustdiff.registry import Registry
from robustdiff.section import MOST_LENGTH, MOST_UPDATES, Named

__all__ = ["ADVERSARIES", "Adversary", "AdversaryConfig", "AscentConfig", "LossOfDelta"]

LossOfDelta = Callable[[Tensor], Tensor]


def _check_precision(x_t: Tensor) -> None:
    """Check that noisy points are fine enough for a perturbation.

    An element of δ is about α/√d long, which is less than the distance of two numbers near 1 in bfloat16 (2⁻⁷) for
    nearly all α and d, and in float16 (2⁻¹⁰) for large d. x_t + δ would be rounded back to x_t, and the target, which
    has δ, would be wrong. A network under autocast rounds x_t + δ too, but from points between such numbers, so that on
    average δ is kept.

    Raises:
        InputError: If the points are in half precision.
    """
    if x_t.dtype in (torch.bfloat16, torch.float16):
        raise InputError(
            f"the noisy points are {x_t.dtype}, in which most of δ would be rounded away: add the noise in float32, as "
            "by add_noise(x0.float(), noise.float(), t); the network may stay under autocast"
        )


class Adversary:
    """The base class of adversaries, which yield perturbations δ of noisy points.

    A subclass implements :meth:`perturb`. A sample whose gradient is zero or not finite (as when fp16 overflows) keeps
    its δ, and is counted in ``skipped``.

    Args:
        steps: The number K of steps, ≥ 1.
        step_size: The length α > 0 of one step, in units of the norm.
        radius: The radius of the ball, as a number in units of the norm or a :class:`RadiusSchedule`; None for no
            projection.
        norm: The name of the norm: "l2", "linf" or "l1".

    Raises:
        ValueError: If an argument is out of its range or the norm is unknown.

    Attributes:
        moves: False if every δ is 0, so that points of any precision are taken.
        recordable: True if a batch makes operations on tensors alone, so that a CUDA graph may replay them. Attributes
            and random numbers of Python would keep the values that they had in the recording. It is not inherited:
            every class declares it for itself.
    """

    moves: ClassVar[bool] = True
    recordable: ClassVar[bool] = False

    def __init__(
        self,
        steps: int = 3,
        step_size: float = 0.1,
        radius: float | RadiusSchedule | None = None,
        norm: str = "l2",
    ) -> None:
        if isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1; got {steps}")
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(f"step_size must be positive and finite; got {step_size}")
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: use one of {', '.join(NORMS)}")
        if isinstance(radius, int | float):
            radius = Constant(float(radius))
        self.steps = steps
        self.step_size = step_size
        self.radius = radius
        self.norm = NORMS[norm]
        self._skipped: int | Tensor = 0

    @property
    def skipped(self) -> int:
        """The number of ascent steps of single samples skipped so far because the gradient was zero or not finite."""
        return int(self._skipped)

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skipped = count

    def count_on(self, device: torch.device) -> None:
        """Count :attr:`skipped` in one tensor on a device from now on, as a recorded pass must."""
        self._skipped = torch.as_tensor(self._skipped, device=device).clone()

    @property
    def passes(self) -> int:
        """The number of perturbations yielded for one batch, which is the number of optimiser updates made on it."""
        return self.steps

    @property
    def backward_passes(self) -> int:
        """The number of backward passes for each optimiser update, including those that only move δ."""
        return 1

    @property
    def ascents(self) -> int:
        """The number of ascent steps made for one batch."""
        return self.steps - 1

    def at_radius(
        self, delta: Tensor, x_t: Tensor, t: Tensor | None, training_step: int | Tensor | None
    ) -> Tensor | None:
        """Return how many samples have a δ as long as their radius, and how many a radius above 0, with shape (2,).

        Returns:
            The two numbers in float32 on the device of δ, or None without a radius.
        """
        if self.radius is None:
            return None
        radius = self.radius(Points(x_t, t, training_step), self.norm)
        inside = radius > 0
        reached = inside & (self.norm(delta) >= (1 - 1e-3) * radius)  # up to rounding
        return torch.stack([reached.sum(), inside.sum()]).float()

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        *,
        loss: LossOfDelta | None = None,
        training_step: int | Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the perturbations of a batch, in order, each like ``x_t``.

        Args:
            x_t: The noisy points, with shape (B, *), in float32 or float64.
            t: Their time indices, with shape (B,). Required by radii that depend on the timestep.
            loss: A function that maps δ to the losses (B,) at x_t + δ, or to their sum or mean. Required by adversaries
                that call backward themselves.
            training_step: The number of optimiser updates made so far, a number or a scalar on the device. Required by
                ramped radii.

        Raises:
            InputError: If the points are in half precision, in which most of δ would be rounded away.
        """
        if self.moves:
            _check_precision(x_t)
        return self.perturb(Points(x_t, t, training_step), loss)

    def perturb(self, points: Points, loss: LossOfDelta | None) -> Iterator[Tensor]:
        """Yield the perturbations of a batch, as a subclass makes them; the arguments are those of a call."""
        raise NotImplementedError(f"{type(self).__name__} does not implement perturb")

    def _project(self, delta: Tensor, points: Points) -> Tensor:
        if self.radius is None:
            return delta
        return self.norm.project(delta, self.radius(points, self.norm))

    @torch.no_grad()
    def _ascend(self, delta: Tensor, grad: Tensor, points: Points) -> Tensor:
        """Return Π_r(δ + α d), except for samples whose gradient is zero or not finite: they keep δ and are counted."""
        flat = grad.flatten(1)
        usable = flat.isfinite().all(1) & (flat != 0).any(1)
        # Ones replace an unusable gradient; the result there is discarded.
        safe = torch.where(broadcast(usable, grad), grad, torch.ones_like(grad))
        moved = self._project(delta + self.step_size * self.norm.ascent(safe), points)
        self._skipped += (~usable).sum()  # kept on the device: reading it here would stall a GPU
        return torch.where(broadcast(usable, delta), moved, delta)


class AdversaryConfig(Named):
    """The section ``adversary`` of a recipe. Each kind has a ``name``."""

    name: Any

    def example(self) -> Adversary:
        """Return an adversary of this section for some process, to count its passes before the process is known."""
        return self.build(DiffusionProcess.linear())

    @property
    def by_level(self) -> bool:
        """True if the radius depends on the noise level σ_t."""
        return False

    def build(self, process: DiffusionProcess) -> Adversary:
        """Return the adversary for noisy points of a process.

        Raises:
            InputError: If the adversary does not suit the process.
        """
        raise NotImplementedError


ADVERSARIES: Registry[type[AdversaryConfig]] = Registry("adversary", "adversaries", folder="perturbation")
"""The recipe sections of adversaries, by name."""


class AscentConfig(AdversaryConfig):
    """The section of an adversary that takes K steps of length α within a ball.

    Attributes:
        adversary: The class of the adversary, constructed with K, α, the radius and the norm.
    """

    adversary: ClassVar[type[Adversary]]
    steps: int = Field(3, ge=1, le=1000, description="the number K of steps")
    step_size: float = Field(0.1, gt=0, le=MOST_LENGTH, description="the length α of a step, in units of the norm")
    norm: Literal["l2", "linf", "l1"] = "l2"
    radius: RadiusConfig | None = Field(None, description="the radius of the ball; none: no projection")
    ramp: int = Field(0, ge=0, le=MOST_UPDATES, description="the number of updates over which the radius grows from 0")

    @model_validator(mode="after")
    def _consistent(self) -> AscentConfig:
        if self.ramp and self.radius is None:
            raise ValueError("adversary.ramp needs adversary.radius: there is nothing else to ramp")
        return self

    def example(self) -> Adversary:
        # Without the radius, which alone depends on the process.
        return self.model_copy(update={"radius": None, "ramp": 0}).build(DiffusionProcess.linear())

    @property
    def by_level(self) -> bool:
        return self.radius is not None and self.radius.by_level

    def build(self, process: DiffusionProcess) -> Adversary:
        radius = None if self.radius is None else self.radius.build(process)
        if radius is not None and self.ramp:
            radius = Ramp(radius, self.ramp)
        return self.adversary(self.steps, self.step_size, radius, self.norm)
