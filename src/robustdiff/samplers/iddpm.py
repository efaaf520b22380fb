r"""Ancestral sampling of DDPM and IDDPM (Ho et al., 2020; Nichol & Dhariwal, 2021):

    x_s = mean of q(x_s | x_t, x̂_0) + √v z,      z ~ N(0, I), and no noise in the last step,

with v = β̃ of the respaced process, or, where the network has learned it, between β̃ and β. (diffusers' DDPMScheduler is
the same but takes no noise from outside; the tests hold the two together.)

The sampler ``es`` is this one with ε̂ scaled (Ning et al., ICLR 2024; :mod:`robustdiff.samplers.denoiser`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser
from robustdiff.samplers.spacing import evenly_spaced

__all__ = ["iddpm"]


def iddpm(
    denoiser: Denoiser, process: DiffusionProcess, steps: int | str, x: Tensor, noises: Iterator[Tensor]
) -> Tensor:
    """Sample from x_T (B, C, H, W) to x_0 in S steps, with one of ``noises`` (B, C, H, W) in each but the last."""
    respaced = process.respace(evenly_spaced(steps, len(process)))
    for index in reversed(range(len(respaced))):
        t = torch.full((len(x),), index, device=x.device)
        denoised = denoiser(x, index, respaced)
        x = respaced.posterior_mean(denoised.x0, x, t)
        if index > 0:
            log_variance, high = respaced.log_variances(t, x)
            if denoised.variance is not None:
                fraction = (denoised.variance + 1) / 2
                log_variance = fraction * high + (1 - fraction) * log_variance
            x = x + (0.5 * log_variance).exp() * next(noises)
    return x
