"""Projected gradient ascent before every update (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AscentConfig, LossOfDelta
from robustdiff.perturbation.radii import Points

__all__ = ["PGDAdversary", "PGDConfig"]


class PGDAdversary(Adversary):
    """Projected gradient ascent: K forward and backward passes that compute no parameter gradients, then one update.

    The adversary yields δ^K alone. It calls backward itself, so ``loss`` is required.

    Raises:
        ValueError: If ``loss`` is not given.
    """

    recordable = True

    @property
    def passes(self) -> int:
        return 1

    @property
    def backward_passes(self) -> int:
        return 1 + self.steps

    @property
    def ascents(self) -> int:
        return self.steps

    def perturb(self, points: Points, loss: LossOfDelta | None) -> Iterator[Tensor]:
        if loss is None:
            raise ValueError("PGDAdversary needs the loss as a function of delta: adversary(x_t, t, loss=…)")
        delta = torch.zeros_like(points.x_t)
        for _ in range(self.steps):
            delta = delta.detach().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(loss(delta).sum(), delta)
            delta = self._ascend(delta, grad, points)
        yield delta


@ADVERSARIES.register("pgd")
class PGDConfig(AscentConfig):
    """Projected gradient ascent: K steps of δ, then one optimiser update."""

    adversary: ClassVar[type[Adversary]] = PGDAdversary
    name: Literal["pgd"] = "pgd"
