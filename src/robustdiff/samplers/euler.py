"""Euler's method on the probability-flow ODE of flow matching, x_s = x_t + (s − t)(ε̂ − x̂_0), at uniform times."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser
from robustdiff.samplers.spacing import strided

__all__ = ["euler"]


def euler(denoiser: Denoiser, process: DiffusionProcess, steps: int, x: Tensor, noises: Iterator[Tensor]) -> Tensor:
    """Sample from x_1 (B, C, H, W) to x_0 in S steps; no noise is used."""
    indices = len(process) - 1 - strided(steps, len(process))
    points = process.respace(indices)
    scheduler = FlowMatchEulerDiscreteScheduler(len(process))
    scheduler.set_timesteps(sigmas=points.sigmas.tolist())
    for index, time in enumerate(scheduler.timesteps):
        denoised = denoiser(x, index, points)
        x = scheduler.step(denoised.noise - denoised.x0, time, x).prev_sample
    return x
