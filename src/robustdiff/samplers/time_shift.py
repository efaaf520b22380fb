r"""DDIM with shifted times, the Time-Shift Sampler (Li et al., "Alleviating Exposure Bias in Diffusion Models through
Sampling with Shifted Time Steps", ICLR 2024, arXiv 2305.15583).

After a step to the time s, the noise in x_s differs from that of training points at s. The network is called, and the
next step starts, at the time in a window around s whose noise variance is nearest to the variance of x_s,

    t_s = argmin over τ in [s − w/2, s + w/2] of | var(x_s) − σ_τ² |,      var(x) = Σ_i (x_i − x̄)²/(d − 1),

separately for each sample. The next step still leads to the time after s. var(x_s) estimates the variance of the noise
(their Theorem 3.1) if the share α² var(x_0) of the data is small. Times s ≤ t_c, the cut-off, are therefore not
shifted; nor is the first time, where x is drawn from the prior.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from robustdiff.samplers.denoiser import Denoised, Denoiser
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler

__all__ = ["TimeShift"]


@SAMPLERS.register("time-shift")
class TimeShift(Sampler):
    """DDIM with the network called at the time whose noise variance is nearest to the variance of x."""

    window: int = Field(30, ge=0, description="the width w of the window, in training times; 0 is DDIM")
    cutoff: int = Field(300, ge=0, description="the cut-off t_c: training times up to it are not shifted")

    def denoise(self, denoiser: Denoiser, x: Tensor, index: int, path: Path) -> Denoised:
        process, time = path.process, int(path.process.index(path.times)[index])
        t = torch.full((len(x),), time, device=x.device)
        if self.window > 0 and time > self.cutoff and index + 1 < len(path):
            first = max(time - self.window // 2, 0)
            variances = process.sigmas[first : time + self.window // 2 + 1].to(x) ** 2
            t = first + (x.flatten(1).var(1)[:, None] - variances).abs().argmin(1)
        return denoiser(x, t, process)
