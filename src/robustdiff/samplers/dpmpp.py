r"""DPM-Solver++ (2M) (Lu et al., 2022, arXiv 2211.01095, algorithm 2). With λ = log(α/σ), h_i = λ_i − λ_{i−1}, and D_i
the network's x̂_0 at point i, a step is

    x_i = (σ_i/σ_{i−1}) x_{i−1} + α_i (1 − e^{−h_i}) (D_{i−1} + (h_i/2h_{i−1}) (D_{i−1} − D_{i−2})).

The first step has D_0 in the last bracket, and so has the last one where there are fewer than ten: first order.

Points are by default those of its authors on a discrete process. Times with logSNR λ below −5.1 are cut off, which
leaves N of T. Index i is then t = (i + 1)/N in continuous time, log α is linear between the indices, σ = √(1 − α²). The
points are uniform in λ between t = 0.992 and t = 1/N, where sampling ends. The network is called at the time
T·(t − 1/N), which, as in the original, differs from the index N·t − 1 by up to T − N where something was cut off.

At given times of the process (as a checkpoint's scheduler may ask for) sampling ends at x̂_0.

x̂_0 is not clipped to a range, in which the correction of second order would be lost; dynamic thresholding applies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser, DynamicThreshold

__all__ = ["dpmpp"]

_LAST = 0.992
_LEAST_LOGSNR = -5.1


def _logsnr(log_alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))


def _continuous(process: DiffusionProcess, steps: int) -> DiffusionProcess:
    """Return the process at S + 1 points that are uniform in logSNR, from the noisiest down."""
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


def dpmpp(
    denoiser: Denoiser, process: DiffusionProcess, times: Tensor | int, x: Tensor, noises: Iterator[Tensor]
) -> Tensor:
    """Sample from x_T (B, C, H, W); no noise is used.

    Arguments:
        times: The number S of steps between its authors' points, or indices in [0, T), ascending, with shape (S,).
    """
    if not isinstance(denoiser.clip, DynamicThreshold):
        denoiser = replace(denoiser, clip=None)
    path = _continuous(process, times) if isinstance(times, int) else process.respace(times.flip(0))
    levels = list(zip(path.alphas.tolist(), path.sigmas.tolist(), strict=True))
    if not isinstance(times, int):
        levels.append((1.0, 0.0))
    steps = len(levels) - 1
    before: tuple[Tensor, float] | None = None  # x̂_0 of the last step, and its h
    for i in range(steps):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[i], levels[i + 1]
        x0 = denoiser(x, i, path).x0
        # h = λ_s − λ_t; from no signal, or to no noise, it is infinite.
        h = math.log(alpha_s * sigma_t / (alpha_t * sigma_s)) if alpha_t * sigma_s > 0 else math.inf
        first_order = before is None or math.isinf(h) or math.isinf(before[1]) or (i == steps - 1 and steps < 10)
        direction = x0 if first_order or before is None else x0 + h / (2 * before[1]) * (x0 - before[0])
        x = sigma_s / sigma_t * x - alpha_s * math.expm1(-h) * direction
        before = x0, h
    return x
