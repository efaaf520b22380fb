"""Euler's method on the probability-flow ODE of flow matching, x_s = x_t + (s − t)(ε̂ − x̂_0), with t = σ."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler, Step
from robustdiff.samplers.spacing import check_steps

__all__ = ["Euler"]


@SAMPLERS.register("euler")
class Euler(Sampler):
    """The Euler sampler, in S steps at the fractions 1, (S − 1)/S, …, 1/S of the process.

    If the time of the process is continuous, any number of steps is possible.
    """

    model: ClassVar[str] = "flow-matching model"
    needs: ClassVar[str] = "α + σ = 1"
    default: ClassVar[bool] = True
    strings: ClassVar[bool] = False

    @classmethod
    def suits(cls, process: DiffusionProcess) -> bool:
        return bool(torch.allclose(process.alphas + process.sigmas, torch.ones_like(process.sigmas), atol=1e-5))

    def own(self, steps: int, process: DiffusionProcess) -> Path:
        check_steps(steps, None if process.time_at else len(process))
        times = process.at(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
        return Path(process.respace(times), process, times)

    def along(self, times: Tensor, process: DiffusionProcess) -> Path:
        """Return the path over ascending indices (S,), or over descending floating-point levels σ (S,) in (0, 1]."""
        if not times.is_floating_point():
            return super().along(times, process)
        sigmas = times.cpu().double().flip(0)
        times = sigmas * (process.times[-1] / process.sigmas[-1])
        return Path(DiffusionProcess(1 - sigmas, sigmas, times), process, times)

    def step(self, step: Step) -> Tensor:
        (_, t), (_, s) = step.before, step.after
        return step.x + (s - t) * (step.denoised.noise - step.denoised.x0)
