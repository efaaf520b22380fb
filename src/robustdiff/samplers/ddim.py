r"""DDIM (Song et al., ICLR 2021), x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s) ε̂, over guided-diffusion's "ddimS" times."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import DDIMScheduler
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser
from robustdiff.samplers.spacing import strided

__all__ = ["ddim"]


def ddim(
    denoiser: Denoiser, process: DiffusionProcess, steps: int | str, x: Tensor, noises: Iterator[Tensor]
) -> Tensor:
    """Sample from x_T (B, C, H, W) to x_0 in S steps; no noise is used."""
    respaced = process.respace(strided(steps, len(process)))
    # The scheduler of the respaced process itself: over a subset of the times of the original one, diffusers would
    # take t − T/S for the time before t, which it is not.
    scheduler = DDIMScheduler(len(respaced), trained_betas=respaced.betas.tolist(), clip_sample=False)
    scheduler.set_timesteps(len(respaced))
    for index in scheduler.timesteps.tolist():
        x = scheduler.step(denoiser(x, index, respaced).noise, index, x).prev_sample
    return x
