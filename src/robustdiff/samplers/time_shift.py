r"""DDIM with shifted times, the Time-Shift Sampler (Li et al., "Alleviating Exposure Bias in Diffusion Models through
Sampling with Shifted Time Steps", ICLR 2024, arXiv 2305.15583).

After a step to the time s, x_s is not quite as noisy as x at s was in training. The network is called, and the next
step departs, at the time in a window around s whose noise variance is nearest to the variance of x_s,

    t_s = argmin over τ in [s − w/2, s + w/2] of | var(x_s) − σ_τ² |,      var(x) = Σ_i (x_i − x̄)²/(d − 1),

for every sample on its own; the step goes to the time after s as if nothing had been shifted. var(x_s) estimates the
variance of the noise (their Theorem 3.1) as long as the data's own share α² var(x_0) of it is small, so times s ≤ t_c,
the cut-off, are not shifted; nor is the first, where x is the prior's own noise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser

__all__ = ["time_shift"]


def _matching_time(x: Tensor, time: int, window: int, process: DiffusionProcess) -> Tensor:
    """The time around a given one at which the noise has the variance of each of x (B, C, H, W), with shape (B,)."""
    first = max(time - window // 2, 0)
    variances = process.sigmas[first : time + window // 2 + 1].to(x) ** 2
    return first + (x.flatten(1).var(1)[:, None] - variances).abs().argmin(1)


def time_shift(
    denoiser: Denoiser,
    process: DiffusionProcess,
    times: Tensor,
    x: Tensor,
    noises: Iterator[Tensor],
    *,
    window: int = 30,
    cutoff: int = 300,
) -> Tensor:
    """Sample from x_T (B, C, H, W) to x_0; no noise is used.

    Arguments:
        times: Indices in [0, T), ascending, with shape (S,).
        window: The width w ≥ 0 of the window, in training times; 0 is DDIM.
        cutoff: t_c ≥ 0, a training time.

    Raises:
        InputError: If the window or the cut-off is negative.
    """
    if window < 0 or cutoff < 0:
        raise InputError(f"time-shift needs window ≥ 0 and cutoff ≥ 0; got {window} and {cutoff}")
    *earlier, last = times.tolist()
    t = torch.full((len(x),), last, device=x.device)
    for after in reversed(earlier):
        denoised = denoiser(x, t, process)
        alpha, sigma = float(process.alphas[after]), float(process.sigmas[after])
        x = alpha * denoised.x0 + sigma * denoised.noise
        shifted = window > 0 and after > cutoff
        t = _matching_time(x, after, window, process) if shifted else torch.full_like(t, after)
    return denoiser(x, t, process).x0
