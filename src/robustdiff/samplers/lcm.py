r"""Multistep sampling of latent consistency models (Luo et al., 2023, arXiv 2310.04378, algorithm 3):

    x̂ = f(x, t) = c_skip(t) x + c_out(t) x̂_0(x, t),        x_s = α_s x̂ + σ_s z,      z ~ N(0, I),

with c_skip and c_out as in training (:mod:`robustdiff.objectives.latent_consistency`); the last step returns x̂. The S
times are chosen from the N times of the solver of the distillation, as diffusers' ``LCMScheduler`` chooses them: the
j-th, from the noisiest on, is at the position ⌊jN/S⌋.

The strength w of guidance is given to the network as ``timestep_cond``, an embedding of w = g − 1
(:func:`~robustdiff.objectives.latent_consistency.embed_guidance`). A network without it, such as a diffusion model with
an LCM-LoRA, has guidance in its weights.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.objectives.latent_consistency import boundary_scalings, solver_times
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler, Step

__all__ = ["LCM"]


@SAMPLERS.register("lcm")
class LCM(Sampler):
    """The multistep sampler of latent consistency models."""

    needs: ClassVar[str] = "α² + σ² = 1 and times from 0 on"
    strings: ClassVar[bool] = False
    spaced: ClassVar[bool] = False
    default_steps: ClassVar[int] = 4
    grid_steps: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)

    solver_steps: int = Field(50, ge=1, description="number N of the solver's times in the distillation")
    sigma_data: float = Field(0.5, gt=0, description="the constant σ_d of c_skip and c_out")
    timestep_scaling: float = Field(10.0, gt=0, description="the factor of the time in c_skip and c_out")

    @classmethod
    def suits(cls, process: DiffusionProcess) -> bool:
        return process.variance_preserving and bool(process.times[0] == 0)

    def own(self, steps: int, process: DiffusionProcess) -> Path:
        try:
            times = solver_times(self.solver_steps, len(process))
        except ValueError as error:
            raise InputError(str(error)) from None
        if not 1 <= steps <= self.solver_steps:
            raise InputError(f"steps of lcm must be between 1 and solver_steps={self.solver_steps}; got {steps}")
        # In floating point as in LCMScheduler, so that quotients are rounded the same way.
        positions = np.floor(np.linspace(0, self.solver_steps, steps, endpoint=False)).astype(np.int64)
        return self.along(times[self.solver_steps - 1 - torch.from_numpy(positions)].flip(0), process)

    def step(self, step: Step) -> Tensor:
        time = step.path.points.times[step.index].to(torch.float64)
        skip, out = (float(c) for c in boundary_scalings(time, self.sigma_data, self.timestep_scaling))
        denoised = skip * step.x + out * step.denoised.x0
        if step.index == 0:
            return denoised
        alpha, sigma = step.after
        return alpha * denoised + sigma * next(step.noises)
