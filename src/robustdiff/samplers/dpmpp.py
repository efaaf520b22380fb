r"""DPM-Solver++ (2M) (Lu et al., 2022, arXiv 2211.01095), as its authors run it on a discrete process.

Times with logSNR λ = log(α/σ) below −5.1 are cut off, which leaves N of T. Index i is then t = (i + 1)/N in continuous
time, log α is linear between the indices, σ = √(1 − α²). The steps are uniform in λ between t = 0.992 and t = 1/N; the
last is of first order when there are fewer than ten. The network is called at the time T·(t − 1/N), which, as in the
original, differs from the index N·t − 1 by up to T − N where something was cut off. x̂_0 is not clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.objectives.objective import precise
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser
from robustdiff.samplers.spacing import check_steps

__all__ = ["dpmpp"]

_LAST = 0.992
_LEAST_LOGSNR = -5.1


def _logsnr(log_alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))


def _continuous(process: DiffusionProcess, steps: int) -> DiffusionProcess:
    """The process at S + 1 points that are uniform in logSNR, from the noisiest down."""
    log_alphas = np.log(process.alphas.clamp_min(1e-12).numpy())
    log_alphas = log_alphas[_logsnr(log_alphas) >= _LEAST_LOGSNR]
    t = np.arange(1, len(log_alphas) + 1) / len(log_alphas)
    first = np.interp(_LAST, t, log_alphas)
    lambdas = np.linspace(_logsnr(first), _logsnr(log_alphas[0]), steps + 1)
    # α from λ = log(α/σ) with α² + σ² = 1; then the t at which the (descending) table has this α.
    log_alpha = -0.5 * np.logaddexp(0, -2 * lambdas)
    times = len(process) * (np.interp(-log_alpha, -log_alphas, t) - t[0])
    alphas = torch.from_numpy(np.exp(log_alpha))
    return DiffusionProcess(alphas, (1 - alphas**2).sqrt(), torch.from_numpy(times))


def dpmpp(denoiser: Denoiser, process: DiffusionProcess, steps: int, x: Tensor, noises: Iterator[Tensor]) -> Tensor:
    """Sample from x_T (B, C, H, W) to x at t = 1/N in S steps; no noise is used."""
    check_steps(steps, len(process))
    points = _continuous(process, steps)
    points.times = points.times.to(precise(x.dtype))
    scheduler = DPMSolverMultistepScheduler(
        len(process),
        solver_order=2,
        lower_order_final=steps < 10,
        euler_at_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = (points.sigmas / points.alphas).to(torch.float32)
    scheduler.timesteps = points.times[:-1]
    denoiser = replace(denoiser, clip=False)
    for index, time in enumerate(scheduler.timesteps):
        x = scheduler.step(denoiser(x, index, points).noise, time, x).prev_sample
    return x
