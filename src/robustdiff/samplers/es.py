r"""Epsilon scaling (Ning et al., ICLR 2024, arXiv 2308.15321): ancestral sampling with ε̂ divided by λ > 1.

The default λ = 1.017 is theirs for CIFAR-10 at 100 steps; fewer steps need a larger one.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from robustdiff.samplers.iddpm import IDDPM
from robustdiff.samplers.sampler import SAMPLERS

__all__ = ["EpsilonScaling"]


@SAMPLERS.register("es")
class EpsilonScaling(IDDPM):
    """Ancestral sampling with ε̂ divided by λ."""

    linear_scale: ClassVar[bool] = True

    eps_scale: float | tuple[float, float] = Field(
        1.017, description="λ: a number, or k,b for k·i + b at the i-th time"
    )
