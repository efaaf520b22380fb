r"""Ancestral sampling of DDPM and IDDPM (Ho et al., 2020; Nichol & Dhariwal, 2021):

    x_s = mean of q(x_s | x_t, x̂_0) + √v z,      z ~ N(0, I), and no noise in the last step,

with v = β̃ of the respaced process ("fixed_small"), v = β ("fixed_large"), or a learned v between the two. (diffusers'
DDPMScheduler computes the same but does not accept given noise; the tests compare the two.)
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler, Step
from robustdiff.samplers.spacing import evenly_spaced

__all__ = ["IDDPM"]


@SAMPLERS.register("iddpm")
class IDDPM(Sampler):
    """The ancestral sampler of DDPM and IDDPM."""

    variance: Literal["fixed_small", "fixed_large"] = Field(
        "fixed_small", description="the variance of a step, unless it is learned: β̃ (small) or β (large)"
    )

    def own(self, steps: int, process: DiffusionProcess) -> Path:
        return self.along(evenly_spaced(steps, len(process)), process)

    def step(self, step: Step) -> Tensor:
        points, denoised = step.path.points, step.denoised
        if denoised.variance is not None and "variance" in self.model_fields_set:
            raise InputError(f"variance={self.variance} has no effect, as this network learns it: leave variance out")
        t = torch.full((len(step.x),), step.index, device=step.x.device)
        x = points.posterior_mean(denoised.x0, step.x, t)
        if step.index == 0:
            return x
        low, high = points.log_variances(t, x)
        log_variance = high if self.variance == "fixed_large" else low
        if denoised.variance is not None:
            fraction = (denoised.variance + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
        return x + (0.5 * log_variance).exp() * next(step.noises)
