"""Radii of the ball to which δ is projected, and the section ``adversary.radius`` of a recipe."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.perturbation.norms import Norm
from robustdiff.process import DiffusionProcess, Table
from robustdiff.section import Section, Times

__all__ = [
    "Constant",
    "NoiseLevel",
    "PerDimension",
    "Points",
    "RadiusConfig",
    "RadiusSchedule",
    "Ramp",
    "SamplerDistance",
    "Within",
]


@dataclass(frozen=True)
class Points:
    """The noisy points of a batch, with what perturbations of them may depend on.

    Attributes:
        x_t: The points, with shape (B, *).
        t: Their time indices, or times, with shape (B,), if they were given.
        training_step: The number of optimiser updates made so far, a number or a scalar on the device, if it was given.
    """

    x_t: Tensor
    t: Tensor | None = None
    training_step: int | Tensor | None = None

    @property
    def times(self) -> Tensor:
        """The time indices, with shape (B,).

        Raises:
            ValueError: If they were not given.
        """
        if self.t is None:
            raise ValueError("a radius by timestep needs t: call adversary(x_t, t)")
        return self.t


class RadiusSchedule(ABC):
    """The radius r of the ball for each sample, which may depend on the timestep and on the number of updates made."""

    @abstractmethod
    def __call__(self, points: Points, norm: Norm) -> Tensor:
        """Return the radius of each noisy point, with shape (B,).

        Raises:
            ValueError: If the schedule depends on ``points.t`` or ``points.training_step``, and it is None.
        """


@dataclass(frozen=True)
class Constant(RadiusSchedule):
    """A constant radius ≥ 0, in units of the norm."""

    radius: float

    def __post_init__(self) -> None:
        if not self.radius >= 0:
            raise ValueError(f"radius must be at least 0; got {self.radius}")

    def __call__(self, points: Points, norm: Norm) -> Tensor:
        return points.x_t.new_full((len(points.x_t),), self.radius)


@dataclass(frozen=True)
class PerDimension(RadiusSchedule):
    """The radius η·‖(1, …, 1)‖: η√d in ℓ2 (Wang et al., 2025), η in ℓ∞, ηd in ℓ1, for samples of d elements.

    η ≥ 0 is in units of x_t (0.1 in the reference implementation).
    """

    eta: float

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0; got {self.eta}")

    def __call__(self, points: Points, norm: Norm) -> Tensor:
        return points.x_t.new_full((len(points.x_t),), self.eta * norm.of_ones(points.x_t[0].numel()))


@dataclass(frozen=True)
class NoiseLevel(RadiusSchedule):
    """The radius η·σ_t·‖(1, …, 1)‖, in proportion to the noise level.

    The noise ε + δ/σ_t then changes by at most η‖(1, …, 1)‖ at every timestep: in ℓ2 by a root mean square of η over
    the dimensions, in ℓ∞ by η in each dimension. With a radius that does not shrink with σ_t, the perturbation of the
    least noisy points is many times their noise.

    Args:
        process: The noising process. A consistency objective whose number of levels grows replaces its process, so that
            the radius would be of other levels than the points.
        eta: η ≥ 0, in units of the noise.
    """

    process: DiffusionProcess
    eta: float

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0; got {self.eta}")

    def __call__(self, points: Points, norm: Norm) -> Tensor:
        sigma = self.process.levels(points.times, points.x_t)[1].flatten()
        return self.eta * norm.of_ones(points.x_t[0].numel()) * sigma


@dataclass(frozen=True)
class SamplerDistance(RadiusSchedule):
    r"""The distance that a sampler covers in one step at t, limited to η per dimension:

        r_t = min( √(2 − 2√(ᾱ_t/ᾱ_s)), η ) · ‖(1, …, 1)‖,

    where s is the less noisy time to which a sampler of ``steps`` steps goes from t (ᾱ_s = 1 after its last step). For
    data of unit variance E‖x_t − x_s‖² = (2 − 2√(ᾱ_t/ᾱ_s))·d.

    Args:
        process: The noising process, which must preserve variance.
        eta: The largest radius per dimension, η ≥ 0.
        steps: The number of sampling steps, in [1, T].
    """

    process: DiffusionProcess
    eta: float
    steps: int = 50

    def distances(self) -> Tensor:
        """Return √(2 − 2√(ᾱ_t/ᾱ_s)) for every t, without the limit η, with shape (T,), float64."""
        a = self.process.alphas_cumprod
        stride = len(a) // self.steps
        before = torch.cat([a.new_ones(stride), a[: len(a) - stride]])
        return (2 - 2 * (a / before).sqrt()).clamp_min(0).sqrt()

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= len(self.process):
            raise ValueError(f"steps must be between 1 and {len(self.process)}; got {self.steps}")
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0; got {self.eta}")

    @cached_property
    def _radii(self) -> Table:
        return Table(self.distances().clamp_max(self.eta))

    def __call__(self, points: Points, norm: Norm) -> Tensor:
        limited = self._radii.at(self.process.index(points.times), points.x_t).flatten()
        return limited * norm.of_ones(points.x_t[0].numel())


@dataclass(frozen=True)
class Within(RadiusSchedule):
    """A given radius at times with σ_t in [low, high], and 0 at all others.

    At a radius of 0, all K passes train at the unperturbed point.

    Args:
        radius: The radius between the two levels.
        process: The noising process, with levels that stay, as for :class:`NoiseLevel`.
        low: The lowest σ_t that is perturbed, ≥ 0.
        high: The highest σ_t that is perturbed, ≥ low.
    """

    radius: RadiusSchedule
    process: DiffusionProcess
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"the noise levels must be 0 ≤ low ≤ high; got {self.low} and {self.high}")

    def __call__(self, points: Points, norm: Norm) -> Tensor:
        sigmas = self.process.sigmas_at(points.times, points.x_t)
        radius = self.radius(points, norm) * ((sigmas >= self.low) & (sigmas <= self.high))
        # An unknown time, whose level is NaN on a GPU, is not one outside.
        return torch.where(sigmas.isnan(), math.nan, radius)


@dataclass(frozen=True)
class Ramp(RadiusSchedule):
    """A given radius times min(1, (training_step + 1)/steps): a linear warm-up.

    Args:
        radius: The radius after the warm-up.
        steps: The number of optimiser updates of the warm-up, ≥ 1.
    """

    radius: RadiusSchedule
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")

    def __call__(self, points: Points, norm: Norm) -> Tensor:
        if points.training_step is None:
            raise ValueError("a ramped radius needs the training step: call adversary(x_t, t, training_step=step)")
        share = (points.training_step + 1) / self.steps
        radius = self.radius(points, norm)
        return radius * (share.clamp(max=1.0) if isinstance(share, Tensor) else min(1.0, share))


class RadiusConfig(Section):
    """The radius of the ball, given by exactly one of ``value`` and ``eta``."""

    value: float | None = Field(None, ge=0, description="the radius, in units of the norm")
    eta: float | None = Field(None, ge=0, description="the radius per dimension, η·‖(1, …, 1)‖; in ℓ2 η√d")
    sampler_steps: Times | None = Field(
        None, description="with eta: at most the distance that a sampler with this number of steps covers in one"
    )
    by_noise: bool = Field(False, description="with eta: a radius in proportion to the noise, η·σ_t·‖(1, …, 1)‖")
    within: tuple[float, float] | None = Field(
        None, description="the lowest and the highest σ_t that are perturbed; none: every σ_t"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"value": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_way(self) -> RadiusConfig:
        if self.sampler_steps is not None and self.eta is None:
            raise ValueError("radius.sampler_steps needs radius.eta, the most per dimension")
        if self.by_noise and (self.eta is None or self.sampler_steps is not None):
            raise ValueError("radius.by_noise needs radius.eta, and does not go with radius.sampler_steps")
        if (self.value is None) == (self.eta is None):
            raise ValueError("a radius is given by a number or by eta")
        if self.within is not None and not 0 <= self.within[0] <= self.within[1]:
            raise ValueError(f"radius.within must be two levels 0 ≤ low ≤ high; got {list(self.within)}")
        return self

    @property
    def by_level(self) -> bool:
        """True if the radius depends on σ_t."""
        return self.by_noise or self.within is not None

    def build(self, process: DiffusionProcess) -> RadiusSchedule:
        """Return the radius as a schedule.

        Raises:
            InputError: If ``sampler_steps`` is given, and the process does not preserve variance or has fewer times.
        """
        radius: RadiusSchedule
        if self.eta is None:
            assert self.value is not None
            radius = Constant(self.value)
        elif self.sampler_steps is not None:
            if not process.variance_preserving:
                raise InputError("radius.sampler_steps is for variance-preserving processes: give radius.eta alone")
            if self.sampler_steps > len(process):
                raise InputError(f"radius.sampler_steps is {self.sampler_steps}: give at most {len(process)}")
            radius = SamplerDistance(process, self.eta, self.sampler_steps)
        else:
            radius = NoiseLevel(process, self.eta) if self.by_noise else PerDimension(self.eta)
        return radius if self.within is None else Within(radius, process, *self.within)
