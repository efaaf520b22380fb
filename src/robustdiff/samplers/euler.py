"""Euler's method on the probability-flow ODE of flow matching, x_s = x_t + (s − t)(ε̂ − x̂_0), at uniform times."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser

__all__ = ["euler", "uniform"]


def uniform(steps: int | str, T: int) -> Tensor:
    """Return the indices of S times with equal gaps from the noisiest on, the last a whole gap above 0; ascending."""
    return T - 1 - (torch.arange(int(steps)) * T // int(steps)).flip(0)


def euler(denoiser: Denoiser, process: DiffusionProcess, times: Tensor, x: Tensor, noises: Iterator[Tensor]) -> Tensor:
    """Sample from x_1 (B, C, H, W) to x_0; no noise is used.

    Arguments:
        times: Indices in [0, T), ascending, with shape (S,); or levels σ in (0, 1], floating-point, descending.
    """
    if times.is_floating_point():
        sigmas = times.to(torch.float64)
        path = DiffusionProcess(1 - sigmas, sigmas, sigmas * (process.times[-1] / process.sigmas[-1]))
    else:
        path = process.respace(times.flip(0))
    for index, (t, s) in enumerate(zip(path.sigmas.tolist(), [*path.sigmas.tolist()[1:], 0.0], strict=True)):
        denoised = denoiser(x, index, path)
        x = x + (s - t) * (denoised.noise - denoised.x0)
    return x
