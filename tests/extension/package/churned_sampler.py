"""A sampler: DDIM in which a part of the variance of ε̂ is drawn anew."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from robustdiff.samplers.sampler import SAMPLERS, Sampler, Step


@SAMPLERS.register("churned")
class Churned(Sampler):
    part: float = Field(0.1, ge=0, le=1)

    def step(self, step: Step) -> Tensor:
        alpha, sigma = step.after
        if step.index == 0:
            return alpha * step.denoised.x0
        noise = (1 - self.part) ** 0.5 * step.denoised.noise + self.part**0.5 * next(step.noises)
        return alpha * step.denoised.x0 + sigma * noise
