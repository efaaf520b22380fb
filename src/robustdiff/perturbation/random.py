"""Random directions of δ: the control of an adversary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AscentConfig, LossOfDelta
from robustdiff.perturbation.radii import RadiusSchedule

__all__ = ["RandomAdversary", "RandomConfig"]


class RandomAdversary(Adversary):
    """The control: δ of free AT's size in a direction that knows nothing of the loss.

    One direction u per sample is drawn uniformly from the unit sphere of the norm (for ℓ2; for ℓ∞ a random sign
    vector, for ℓ1 a random signed coordinate: what steepest ascent on a random gradient gives), and the K passes
    yield Π_r(k·α·u), k = 0 … K−1: the sizes of :class:`FreeAdversary` when its gradient does not turn.

    Arguments:
        generator: Where the directions come from, on the device of x_t; torch's global generator by default.
    """

    def __init__(
        self,
        steps: int = 3,
        step_size: float = 0.1,
        radius: float | RadiusSchedule | None = None,
        norm: str = "l2",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(steps, step_size, radius, norm)
        self.generator = generator

    def __call__(
        self, x_t: Tensor, t: Tensor | None = None, *, loss: LossOfDelta | None = None, training_step: int | None = None
    ) -> Iterator[Tensor]:
        gaussian = torch.randn(x_t.shape, generator=self.generator, device=x_t.device, dtype=x_t.dtype)
        direction = self.norm.ascent(gaussian)
        for k in range(self.steps):
            yield self._project(k * self.step_size * direction, x_t, t, training_step)


@ADVERSARIES.register("random")
class RandomConfig(AscentConfig):
    """Steps of the same length in a random direction."""

    adversary: ClassVar[type[Adversary]] = RandomAdversary
    name: Literal["random"] = "random"
