r"""Ancestral sampling of DDPM and IDDPM (Ho et al., 2020; Nichol & Dhariwal, 2021):

    x_s = mean of q(x_s | x_t, x̂_0) + √v z,      z ~ N(0, I), and no noise in the last step,

with v = β̃ of the respaced process ("fixed_small") or its β ("fixed_large"), or, where the network has learned it,
between the two. (diffusers' DDPMScheduler is the same but takes no noise from outside; the tests compare the two.)

The sampler ``es`` is this one with ε̂ scaled (Ning et al., ICLR 2024; :mod:`robustdiff.samplers.denoiser`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser

__all__ = ["FIXED_VARIANCES", "FixedVariance", "iddpm"]

FixedVariance = Literal["fixed_small", "fixed_large"]
FIXED_VARIANCES: tuple[str, ...] = get_args(FixedVariance)


def iddpm(
    denoiser: Denoiser,
    process: DiffusionProcess,
    times: Tensor,
    x: Tensor,
    noises: Iterator[Tensor],
    *,
    variance: FixedVariance = "fixed_small",
) -> Tensor:
    """Sample from x_T (B, C, H, W) to x_0, with one of ``noises`` (B, C, H, W) in each step but the last.

    Arguments:
        times: Indices in [0, T), ascending, with shape (S,).
        variance: v, where the network has not learned it.
    """
    path = process.respace(times)
    for index in reversed(range(len(path))):
        t = torch.full((len(x),), index, device=x.device)
        denoised = denoiser(x, index, path)
        x = path.posterior_mean(denoised.x0, x, t)
        if index > 0:
            low, high = path.log_variances(t, x)
            log_variance = high if variance == "fixed_large" else low
            if denoised.variance is not None:
                fraction = (denoised.variance + 1) / 2
                log_variance = fraction * high + (1 - fraction) * low
            x = x + (0.5 * log_variance).exp() * next(noises)
    return x
