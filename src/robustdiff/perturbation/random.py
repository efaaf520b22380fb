"""Perturbations in random directions, a control for adversarial training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AscentConfig, LossOfDelta
from robustdiff.perturbation.radii import Points, RadiusSchedule

__all__ = ["RandomAdversary", "RandomConfig"]


class RandomAdversary(Adversary):
    """A control for adversarial training: δ has the size of free adversarial training and a random direction.

    For each sample a direction u is drawn: the direction of steepest ascent for a Gaussian gradient. It is uniform on
    the unit sphere for ℓ2, a random sign vector for ℓ∞, and a random signed coordinate for ℓ1. The K passes yield
    Π_r(k·α·u), k = 0 … K−1, which have the sizes of :class:`FreeAdversary` for a gradient of constant direction.

    Args:
        steps: The number K of passes over a batch, ≥ 1.
        step_size: The length α > 0 by which δ grows from pass to pass, in units of the norm.
        radius: The radius of the ball, as for :class:`Adversary`.
        norm: The name of the norm: "l2", "linf" or "l1".
        generator: The source of randomness, on the device of x_t. Default: PyTorch's global generator.
    """

    recordable = True

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

    def perturb(self, points: Points, loss: LossOfDelta | None) -> Iterator[Tensor]:
        x_t = points.x_t
        gaussian = torch.randn(x_t.shape, generator=self.generator, device=x_t.device, dtype=x_t.dtype)
        direction = self.norm.ascent(gaussian)
        for k in range(self.steps):
            yield self._project(k * self.step_size * direction, points)


@ADVERSARIES.register("random")
class RandomConfig(AscentConfig):
    """Steps of length α in a random direction, as a control."""

    adversary: ClassVar[type[Adversary]] = RandomAdversary
    name: Literal["random"] = "random"
