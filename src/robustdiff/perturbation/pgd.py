"""Projected gradient ascent before every update (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AscentConfig, LossOfDelta
from robustdiff.perturbation.radii import Points
from robustdiff.process import broadcast

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
                losses = loss(delta)
                scale = _scale(losses, delta)
                (grad,) = torch.autograd.grad((scale * losses).sum(), delta)
            delta = self._ascend(delta, grad / broadcast(scale.expand(len(delta)), grad), points)
        yield delta


@torch.no_grad()
def _scale(losses: Tensor, delta: Tensor) -> Tensor:
    """Return the factors, like the losses, that keep gradients with respect to δ in the range of float16.

    A loss that is a mean over d elements has gradients of about L/d in each, which underflow in float16. The factor is
    the power of 2 next to d/L, so that they become about 1, whatever the loss is a mean or a sum of, and no digit is
    lost.
    """
    elements = delta.numel() / losses.numel()
    exponents = torch.log2(elements / losses.detach().float().abs()).round()
    # A loss of 0 has no gradient, and one that is not finite has none that is used.
    return torch.exp2(exponents.nan_to_num(0.0).clamp(-64, 64))


@ADVERSARIES.register("pgd")
class PGDConfig(AscentConfig):
    """Projected gradient ascent: K steps of δ, then one optimiser update."""

    adversary: ClassVar[type[Adversary]] = PGDAdversary
    name: Literal["pgd"] = "pgd"
