r"""The denoising loss of Karras et al. (2022, arXiv 2206.00364, equations 2 and 8), at a perturbed point.

    L(δ) = λ(σ) · mean over elements of ( D(x_0 + σ ε + δ, σ) − x_0 )²,     λ(σ) = (σ² + σ_d²)/(σ σ_d)²,

with ln σ ~ N(P_mean, P_std²). D is a network F in their preconditioning (:mod:`robustdiff.objectives.preconditioning`).
With the weight λ the loss is mean (F − target)², with a target of unit variance. δ changes the noise,
σ ε' = σ ε + δ, but not the target x_0 (Wang et al., 2025, equation 16, with α = 1).

The gradient with respect to δ is that through F alone: in F's own target, (x_0 − c_skip (x_0 + σ ε + δ))/c_out, δ is a
constant, as it is in the targets of :mod:`robustdiff.objectives.denoising`. With σ_d = 1 F is −v of v-prediction, and
the ascent is the same.

With a teacher, a pretrained diffusion model with denoiser D̂, the target at levels below a bound is
D̂(x_0 + σ ε, σ) ≈ E[x_0 | x_0 + σ ε] instead of x_0. At δ = 0 the minimiser is the same, and the gradient is free of
the variance of x_0 given x_t. (With an adversary the minimisers may differ, since δ depends on the target.) Above the
bound the target is x_0, since the error of a teacher that predicts ε is multiplied by σ in D̂.

As in Karras et al., σ is drawn from the continuous log-normal distribution. It is not truncated to [σ_min, σ_max], the
levels of sampling, outside of which the default distribution has a probability of 2·10⁻⁵.
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
    """The denoising loss of Karras et al. (2022), as a callable.

    The model is the network F, called with (c_in x, 250 ln σ) as diffusers calls it.

    Args:
        levels: The number T of levels in the table of the process. Training does not depend on it, since σ is drawn
            continuously.
        sigma_min: The smallest level of the table, σ_min > 0.
        sigma_max: The largest level of the table, σ_max > σ_min.
        rho: The exponent ρ of the levels, which are uniform in σ^{1/ρ}.
        sigma_data: The standard deviation σ_d > 0 of the data.
        mean: The mean P_mean of ln σ.
        std: The standard deviation P_std > 0 of ln σ.
        teacher: The denoiser D̂, such as a ``DiffusionDenoiser``; None for training on the data alone.
        teacher_below: The bound below which the teacher supplies the target.

    Raises:
        ValueError: If the levels are not ascending and positive.
        InputError: If the distribution reaches levels without a finite loss.
    """

    recordable = True

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
    def draw(self, x0: Tensor, *arguments: Any, **more: Any) -> Draw:
        """Draw as :meth:`DenoisingObjective.draw` does, and evaluate the teacher once for all passes over a batch."""
        draw = super().draw(x0, *arguments, **more)
        if self.teacher is None:
            return draw
        sigma = self.process.sigmas_at(draw.t, x0)
        taught = self.teacher(draw.x_t, sigma, **draw.condition)
        below = broadcast(sigma < self.teacher_below, x0)
        return replace(draw, x0=torch.where(below, taught, draw.x0))

    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses at x_t + δ, each with shape (B,): "mse", and "loss" = λ(σ) · "mse" times given weights."""
        losses = super().__call__(Preconditioned(model, self.sigma_data, through_skip=False), draw, delta)
        sigma = self.process.sigmas_at(draw.t, losses["loss"])
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return {**losses, "loss": weight * losses["loss"]}


@OBJECTIVES.register("edm")
class EdmConfig(LevelsConfig):
    """The denoising loss of Karras et al. (2022)."""

    scheduler: ClassVar[str] = "EDMEulerScheduler"

    name: Literal["edm"] = "edm"
    levels: int = Field(
        1000,
        ge=2,
        le=100_000,
        description="the number of levels in the table of the saved scheduler, which probes use; training draws σ "
        "continuously",
    )
    mean: float = Field(-1.2, description="the mean P_mean of ln σ")
    std: float = Field(1.2, gt=0, description="the standard deviation P_std of ln σ")
    teacher_below: float = Field(
        5.0, gt=0, description="the level σ below which the teacher supplies the target; above it the data do"
    )

    @model_validator(mode="after")
    def _taught(self) -> EdmConfig:
        self._needs_teacher("teacher_below")
        return self

    @property
    def teacher_bound(self) -> tuple[str, float]:
        return "teacher_below", self.teacher_below  # σ is drawn above sigma_max, too

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
