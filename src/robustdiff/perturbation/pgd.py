"""Projected gradient ascent before every update (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AscentConfig, LossOfDelta, check_precision

__all__ = ["PGDAdversary", "PGDConfig"]


class PGDAdversary(Adversary):
    """Projected gradient ascent: K forward and backward passes that compute no parameter gradients, then one update.

    The adversary yields δ^K alone. It calls backward itself, so ``loss`` is required.

    Raises:
        ValueError: If ``loss`` is not given.
    """

    @property
    def passes(self) -> int:
        return 1

    @property
    def backward_passes(self) -> int:
        return 1 + self.steps

    @property
    def ascents(self) -> int:
        return self.steps

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        *,
        loss: LossOfDelta | None = None,
        training_step: int | Tensor | None = None,
    ) -> Iterator[Tensor]:
        if loss is None:
            raise ValueError("PGDAdversary needs the loss as a function of delta: adversary(x_t, t, loss=…)")
        check_precision(x_t)
        delta = torch.zeros_like(x_t)
        for _ in range(self.steps):
            delta = delta.detach().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(loss(delta).sum(), delta)
            delta = self._ascend(delta, grad, x_t, t, training_step)
        yield delta


@ADVERSARIES.register("pgd")
class PGDConfig(AscentConfig):
    """Projected gradient ascent: K steps of δ, then one optimiser update."""

    adversary: ClassVar[type[Adversary]] = PGDAdversary
    name: Literal["pgd"] = "pgd"
