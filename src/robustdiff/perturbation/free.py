"""Free adversarial training (Shafahi et al., 2019; Wang et al., 2025, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AscentConfig, LossOfDelta
from robustdiff.perturbation.radii import Points

__all__ = ["FreeAdversary", "FreeConfig"]


class FreeAdversary(Adversary):
    """Free adversarial training: K passes over one batch, with one backward pass each for the parameters and for δ.

    The adversary yields δ⁰ = 0, δ¹, …, δ^{K−1}. In every pass, the caller calls backward and steps the optimiser; the
    gradient in ``delta.grad`` then moves δ for the next pass (Wang et al., 2025, Algorithm 1).

    Raises:
        RuntimeError: If ``delta.grad`` is None after a pass that another one follows: the loss was not computed at
            x_t + delta, or backward was not called.
    """

    recordable = True

    def perturb(self, points: Points, loss: LossOfDelta | None) -> Iterator[Tensor]:
        delta = torch.zeros_like(points.x_t)
        for k in range(self.steps):
            delta = delta.detach().requires_grad_()
            yield delta
            if k + 1 < self.steps:
                if delta.grad is None:
                    raise RuntimeError(
                        "delta has no gradient: compute the loss at x_t + delta and call backward in the loop's body"
                    )
                delta = self._ascend(delta, delta.grad, points)


@ADVERSARIES.register("free")
class FreeConfig(AscentConfig):
    """Free adversarial training: the same backward pass updates the parameters and moves δ."""

    adversary: ClassVar[type[Adversary]] = FreeAdversary
    name: Literal["free"] = "free"
