r"""Norms of samples, with the direction of steepest ascent d and the projection Π_r on the ball of radius r
(:mod:`robustdiff.perturbation`):

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
    """A norm of samples, with its direction of steepest ascent and the projection on its ball."""

    name: str
    order: float
    """The exponent p of ℓp."""

    def __call__(self, delta: Tensor) -> Tensor:
        """Return ‖δ‖ for each sample: (B, *) → (B,)."""
        return torch.linalg.vector_norm(delta.flatten(1), ord=self.order, dim=1)

    def of_ones(self, d: int) -> float:
        """Return ‖(1, …, 1)‖ = d^(1/p) in d dimensions: the radius η per dimension is η·‖(1, …, 1)‖ in every norm."""
        return d ** (1 / self.order)

    @abstractmethod
    def ascent(self, grad: Tensor) -> Tensor:
        """Return the direction d of norm 1 that maximises ⟨grad, d⟩, for each sample: (B, *) → (B, *).

        The gradient of every sample must be nonzero.
        """

    @abstractmethod
    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        """Return the nearest point (in ℓ2) in the ball of each sample's radius (B,): (B, *) → (B, *)."""


class L2(Norm):
    """The Euclidean norm, which Wang et al. (2025) use."""

    name, order = "l2", 2.0

    def ascent(self, grad: Tensor) -> Tensor:
        # The largest entry is scaled to 1 first, since the squares of a tiny gradient would underflow.
        grad = grad / broadcast(grad.flatten(1).abs().amax(1), grad)
        return grad / broadcast(self(grad), grad)

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        size = self(delta)
        # Inside the ball the factor is exactly 1, so that δ is unchanged bit for bit. A radius of NaN, as that of an
        # unknown time on a GPU, makes δ NaN.
        factor = torch.where(size <= radius, 1.0, radius / size.clamp_min(torch.finfo(size.dtype).tiny))
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
    """The sum of absolute values. The direction of steepest ascent is a single coordinate."""

    name, order = "l1", 1.0

    def ascent(self, grad: Tensor) -> Tensor:
        flat = grad.flatten(1)
        index = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index).sign()).reshape(grad.shape)

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        flat = delta.flatten(1)
        size = flat.abs()
        # Duchi et al. (2008), figure 1: with u in descending order, the threshold is (Σ_{j ≤ k} u_j − r)/k for the
        # largest k for which it is below u_k.
        ordered = size.sort(dim=1, descending=True).values
        k = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
        thresholds = (ordered.cumsum(1) - radius[:, None]) / k
        count = (ordered > thresholds).sum(1, keepdim=True).clamp_min(1)
        threshold = thresholds.gather(1, count - 1)
        projected = flat.sign() * (size - threshold).clamp_min(0)
        inside = size.sum(1, keepdim=True) <= radius[:, None]
        return torch.where(inside, flat, projected).reshape(delta.shape)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (L2(), Linf(), L1())}
