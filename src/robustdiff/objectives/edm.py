r"""The denoising loss of Karras et al. (2022, arXiv 2206.00364, equations 2 and 8), at a perturbed point.

    L(δ) = λ(σ) · mean over elements of ( D(x_0 + σ ε + δ, σ) − x_0 )²,     λ(σ) = (σ² + σ_d²)/(σ σ_d)²,

with ln σ ~ N(P_mean, P_std²). D is a network in their preconditioning (:mod:`robustdiff.objectives.preconditioning`),
and λ makes the loss that of the network itself: mean (F − target)² with a target of unit variance. δ changes the noise,
σ ε' = σ ε + δ, and so not the target x_0 (Wang et al., 2025, equation 16, with α = 1).

With a teacher D̂, a diffusion model whose denoiser is to be had in this preconditioning, the target at levels below a
bound is D̂(x_0 + σ ε, σ) ≈ E[x_0 | x_0 + σ ε] in the place of x_0: at δ = 0 the same minimiser, without the variance of
x_0 given x_t in the gradient. (With an adversary the two may differ, for its δ depends on the target.) Above the bound
it is x_0, since a network that predicts ε has its error times σ in D̂.

σ is any level, drawn from the log-normal distribution itself, as Karras et al. draw it: it is not truncated to
[σ_min, σ_max], the levels of sampling, outside of which the default distribution has a share of 2·10⁻⁵.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import Module

from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.objectives.levels import LevelsConfig
from robustdiff.objectives.objective import OBJECTIVES, Draw
from robustdiff.objectives.preconditioning import Denoise, Preconditioned, karras_process, karras_sigmas
from robustdiff.objectives.timesteps import LogNormalLevels
from robustdiff.process import DiffusionProcess, broadcast

__all__ = ["EDMObjective", "EdmConfig"]


class EDMObjective(DenoisingObjective):
    """Karras et al.'s loss, as a callable. The model is F: called with (c_in x, 250 ln σ), as diffusers calls it.

    Arguments:
        levels: T, the number of levels in the table of the process; training does not depend on it.
        sigma_min: The smallest level.
        sigma_max: The largest level.
        rho: ρ of the levels.
        sigma_data: σ_d > 0, the standard deviation of the data.
        mean: P_mean.
        std: P_std > 0.
        teacher: D̂, such as a ``DiffusionDenoiser``; none is training on the data alone.
        teacher_below: The bound of the levels at which the teacher gives the target.

    Raises:
        ValueError: If the levels are not ascending and positive, or the distribution reaches levels without a finite
            loss.
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
        teacher: Denoise | None = None,
        teacher_below: float = 5.0,
    ) -> None:
        process = karras_process(karras_sigmas(levels, sigma_min, sigma_max, rho))
        super().__init__(process, prediction="sample", timesteps=LogNormalLevels(mean, std))
        self.sigma_data = sigma_data
        self.teacher = teacher
        self.teacher_below = teacher_below

    @torch.no_grad()
    def draw(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        input_noise: Tensor | None = None,
        **condition: Any,
    ) -> Draw:
        """Fix t and ε for a batch, as in :class:`DenoisingObjective`. The teacher is called here, and only here."""
        draw = super().draw(x0, t, noise, generator, weight, input_noise, **condition)
        if self.teacher is None:
            return draw
        sigma = self.process.sigmas_at(draw.t, x0)
        taught = self.teacher(draw.x_t, sigma, **draw.condition)
        below = broadcast(sigma < self.teacher_below, x0)
        return replace(draw, x0=torch.where(below, taught, draw.x0))

    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses at x_t + δ: "loss" is λ(σ) · "mse", each with shape (B,)."""
        losses = super().__call__(Preconditioned(model, self.sigma_data), draw, delta)
        sigma = self.process.sigmas_at(draw.t, losses["loss"])
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return {**losses, "loss": weight * losses["loss"]}


@OBJECTIVES.register("edm")
class EdmConfig(LevelsConfig):
    """The denoising loss of Karras et al."""

    scheduler: ClassVar[str] = "EDMEulerScheduler"

    name: Literal["edm"] = "edm"
    levels: int = Field(1000, ge=2, le=100_000, description="the number of levels")
    mean: float = Field(-1.2, description="P_mean of ln σ")
    std: float = Field(1.2, gt=0, description="P_std of ln σ")
    teacher_below: float = Field(5.0, gt=0, description="the levels that the teacher gives; above, from the data")

    @model_validator(mode="after")
    def _taught(self) -> EdmConfig:
        self._needs_teacher("teacher_below")
        return self

    @property
    def teacher_sigma_max(self) -> float:
        return min(self.sigma_max, self.teacher_below)

    def last_levels(self, steps: int) -> int:
        return self.levels

    def build(
        self, process: DiffusionProcess, steps: int, target: Module | None = None, teacher: Denoise | None = None
    ) -> EDMObjective:
        return EDMObjective(
            self.levels,
            mean=self.mean,
            std=self.std,
            teacher=teacher,
            teacher_below=self.teacher_below,
            **self.arguments,
        )
