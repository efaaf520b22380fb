r"""Norms on samples: the direction of steepest ascent, and the projection on the ball.

d = argmax_{‖d‖ ≤ 1} ⟨g, d⟩,        Π_r(z) = argmin_{‖δ‖ ≤ r} ‖δ − z‖₂.

norm    d                                 Π_r
l2      g/‖g‖₂                            z · min(1, r/‖z‖₂)
linf    sign(g)                           clamp(z, −r, r)
l1      sign(g_i) e_i, i = argmax |g_i|   soft threshold at the level that makes ‖·‖₁ = r (Duchi et al., 2008)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robustdiff.process import broadcast

__all__ = ["L1", "L2", "NORMS", "Linf", "Norm"]


class Norm(ABC):
    """A norm on samples: its size, its direction of steepest ascent, and the projection on its ball."""

    name: str
    order: float
    """p of ℓp."""

    def __call__(self, delta: Tensor) -> Tensor:
        """Return ‖δ‖ for each sample: (B, *) → (B,)."""
        return torch.linalg.vector_norm(delta.flatten(1), ord=self.order, dim=1)

    def of_ones(self, d: int) -> float:
        """Return ‖(1, …, 1)‖ in d dimensions, d^(1/p): a radius η per dimension is η·‖(1, …, 1)‖ in every norm."""
        return d ** (1 / self.order)

    @abstractmethod
    def ascent(self, grad: Tensor) -> Tensor:
        """Return the d of norm 1 that maximises ⟨grad, d⟩ for each sample, (B, *); each gradient must be nonzero."""

    @abstractmethod
    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        """Return the nearest point (in ℓ2) of the ball of the radius (B,) for each sample: (B, *) → (B, *)."""


class L2(Norm):
    """The Euclidean norm; the paper's choice."""

    name, order = "l2", 2.0

    def ascent(self, grad: Tensor) -> Tensor:
        # Scaled to a largest entry of 1 first: the squares of a tiny gradient would underflow.
        grad = grad / broadcast(grad.flatten(1).abs().amax(1), grad)
        return grad / broadcast(self(grad), grad)

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        size = self(delta)
        # Inside the ball the factor is exactly 1, so that δ keeps its bits.
        factor = torch.where(size > radius, radius / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0)
        return delta * broadcast(factor, delta)


class Linf(Norm):
    """The maximum norm."""

    name, order = "linf", math.inf

    def ascent(self, grad: Tensor) -> Tensor:
        return grad.sign()

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        bound = broadcast(radius, delta)
        return torch.minimum(torch.maximum(delta, -bound), bound)


class L1(Norm):
    """The sum of absolute values: its steepest ascent moves one coordinate."""

    name, order = "l1", 1.0

    def ascent(self, grad: Tensor) -> Tensor:
        flat = grad.flatten(1)
        index = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index).sign()).reshape(grad.shape)

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        flat = delta.flatten(1)
        size = flat.abs()
        # Duchi et al. (2008), figure 1: with u sorted downwards, the threshold is (Σ_{j ≤ k} u_j − r)/k for the
        # largest k at which it is still below u_k.
        ordered = size.sort(dim=1, descending=True).values
        k = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
        thresholds = (ordered.cumsum(1) - radius[:, None]) / k
        count = (ordered > thresholds).sum(1, keepdim=True).clamp_min(1)
        threshold = thresholds.gather(1, count - 1)
        projected = flat.sign() * (size - threshold).clamp_min(0)
        inside = size.sum(1, keepdim=True) <= radius[:, None]
        return torch.where(inside, flat, projected).reshape(delta.shape)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (L2(), Linf(), L1())}
