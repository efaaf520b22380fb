r"""Perturbations δ of noisy points: norms, radii, and adversaries.

Training on the worst point of a ball around each x_t is distributionally robust optimisation over the points
that a sampler may produce (Wang et al., 2025, arXiv 2502.17099, Theorem 1). The inner maximisation is projected
steepest ascent, for each sample, from δ⁰ = 0:

    δ ← Π_r( δ + α · d ),        d = argmax_{‖d‖ ≤ 1} ⟨∇_δ L, d⟩,        Π_r(z) = argmin_{‖δ‖ ≤ r} ‖δ − z‖₂.

An adversary is called with a batch of noisy points and yields perturbations; the caller trains on each::

    for delta in adversary(x_t):
        loss = ...                      # of the model at x_t + delta
        loss.backward()                 # fills the parameters' gradients and delta.grad
        optimizer.step()
        optimizer.zero_grad()

After each iteration, :class:`FreeAdversary` reads ``delta.grad`` and ascends, and so needs no backward pass of its own.
"""

from __future__ import annotations

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AdversaryConfig, AscentConfig
from robustdiff.perturbation.free import FreeAdversary
from robustdiff.perturbation.none import NoAdversary
from robustdiff.perturbation.norms import NORMS, Norm
from robustdiff.perturbation.pgd import PGDAdversary
from robustdiff.perturbation.radii import (
    Constant,
    NoiseLevel,
    PerDimension,
    Points,
    RadiusSchedule,
    Ramp,
    SamplerDistance,
    Within,
)
from robustdiff.perturbation.random import RandomAdversary

__all__ = [
    "ADVERSARIES",
    "NORMS",
    "Adversary",
    "AdversaryConfig",
    "AscentConfig",
    "Constant",
    "FreeAdversary",
    "NoAdversary",
    "NoiseLevel",
    "Norm",
    "PGDAdversary",
    "PerDimension",
    "Points",
    "RadiusSchedule",
    "Ramp",
    "RandomAdversary",
    "SamplerDistance",
    "Within",
]
