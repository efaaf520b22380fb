r"""DPM-Solver++ (2M) (Lu et al., 2022, arXiv 2211.01095, algorithm 2). With λ = log(α/σ), h_i = λ_i − λ_{i−1}, and D_i
the network's x̂_0 at point i, a step is

    x_i = (σ_i/σ_{i−1}) x_{i−1} + α_i (1 − e^{−h_i}) (D_{i−1} + (h_i/2h_{i−1}) (D_{i−1} − D_{i−2})).

The first step omits the last term, and so does the last of fewer than ten steps: they are of first order.

The default points are those of the authors' code for a discrete process. Times with λ below −5.1 are removed, which
leaves N of T times. Index i corresponds to t = (i + 1)/N in continuous time, log α is interpolated linearly between
indices, and σ = √(1 − α²). The points are uniform in λ between t = 0.992 and t = 1/N, where sampling ends. The network
is called at the time T·(t − 1/N), which, as in the original, differs from the index N·t − 1 by up to T − N if times
were removed. If the time of the process is continuous, the levels are those of the time at which the network is called.

With given times of the process (such as those of a checkpoint's scheduler), sampling ends at x̂_0.

x̂_0 is not clipped to a fixed range, since that would undo the second-order correction; dynamic thresholding is
possible.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler, Step
from robustdiff.samplers.spacing import check_steps

__all__ = ["DPMSolver"]

_LAST = 0.992
_LEAST_LOGSNR = -5.1


def _logsnr(log_alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))


def _h(step: Step) -> float:
    """Return λ_s − λ_t, which is infinite for α_t = 0 or σ_s = 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = step.before, step.after
    return math.log(alpha_s * sigma_t / (alpha_t * sigma_s)) if alpha_t * sigma_s > 0 else math.inf


@SAMPLERS.register("dpm++")
class DPMSolver(Sampler):
    """The DPM-Solver++ (2M) sampler."""

    strings: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    def own(self, steps: int, process: DiffusionProcess) -> Path:
        """Return the path over points that are uniform in λ = log(α/σ)."""
        check_steps(steps, len(process))
        log_alphas = np.log(process.alphas.clamp_min(1e-12).numpy())
        log_alphas = log_alphas[_logsnr(log_alphas) >= _LEAST_LOGSNR]
        t = np.arange(1, len(log_alphas) + 1) / len(log_alphas)
        first = np.interp(_LAST, t, log_alphas)
        lambdas = np.linspace(_logsnr(first), _logsnr(log_alphas[0]), steps + 1)[::-1]
        # α from λ = log(α/σ) with α² + σ² = 1; then the t of this α in the (descending) table.
        log_alpha = -0.5 * np.logaddexp(0, -2 * lambdas)
        positions = len(process) * (np.interp(-log_alpha, -log_alphas, t) - t[0])
        times = torch.from_numpy(np.interp(positions, np.arange(len(process)), process.times.numpy()))
        alphas = torch.from_numpy(np.exp(log_alpha))
        points = DiffusionProcess(alphas, (1 - alphas**2).sqrt(), times)
        if process.levels_at is not None:
            points = process.respace(times)
        end = float(points.alphas[0]), float(points.sigmas[0])
        return Path(points.respace(torch.arange(1, steps + 1)), process, times[1:], end)

    def step(self, step: Step) -> Tensor:
        (_, sigma_t), (alpha_s, sigma_s) = step.before, step.after
        h, x0, previous = _h(step), step.denoised.x0, step.previous
        if previous is not None and (step.index > 0 or len(step.path) >= 10):
            ratio = h / (2 * _h(previous))
            if math.isfinite(ratio):
                x0 = x0 + ratio * (x0 - previous.denoised.x0)
        return sigma_s / sigma_t * step.x - alpha_s * math.expm1(-h) * x0
