r"""The denoising loss of Karras et al. (2022, arXiv 2206.00364, equations 2 and 8), at a perturbed point.

    L(δ) = λ(σ) · mean over elements of ( D(x_0 + σ ε + δ, σ) − x_0 )²,     λ(σ) = (σ² + σ_d²)/(σ σ_d)²,

with ln σ ~ N(P_mean, P_std²). D is a network in their preconditioning (:mod:`robustdiff.objectives.preconditioning`),
and λ makes the loss that of the network itself: mean (F − target)² with a target of unit variance. δ changes the noise,
σ ε' = σ ε + δ, and so not the target x_0 (Wang et al., 2025, equation 16, with α = 1).

σ is one of T levels (:func:`karras_sigmas`), drawn by the log-normal share of what is nearest to it in ln σ. That keeps
the time of a draw an index, as it is for every other process; a thousand levels lie about 0.01 apart in ln σ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.objectives.objective import Draw
from robustdiff.objectives.preconditioning import Preconditioned, karras_process, karras_sigmas
from robustdiff.objectives.timesteps import LogNormal
from robustdiff.process import per_sample

__all__ = ["EDMObjective"]


class EDMObjective(DenoisingObjective):
    """Karras et al.'s loss, as a callable. The model is F: called with (c_in x, 250 ln σ), as diffusers calls it.

    Arguments:
        levels: T.
        sigma_min: The smallest level.
        sigma_max: The largest level.
        rho: ρ of the levels.
        sigma_data: σ_d > 0, the standard deviation of the data.
        mean: P_mean.
        std: P_std > 0.

    Raises:
        ValueError: If the levels are not ascending and positive.
    """

    def __init__(
        self,
        levels: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        mean: float = -1.2,
        std: float = 1.2,
    ) -> None:
        sigmas = karras_sigmas(levels, sigma_min, sigma_max, rho)
        middles = (sigmas[:-1] * sigmas[1:]).sqrt()
        edges = torch.cat([middles.new_zeros(1), middles, middles.new_full((1,), torch.inf)])
        super().__init__(karras_process(sigmas), prediction="sample", timesteps=LogNormal(edges, mean, std))
        self.sigma_data = sigma_data

    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """The losses at x_t + δ: "loss" is λ(σ) · "mse", each with shape (B,)."""
        losses = super().__call__(Preconditioned(model, self.sigma_data), draw, delta)
        sigma = self.process.sigmas
        weights = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return {**losses, "loss": per_sample(weights, draw.t, losses["loss"]) * losses["loss"]}
