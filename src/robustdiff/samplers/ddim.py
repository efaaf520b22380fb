r"""DDIM (Song et al., ICLR 2021), x_s = α_s x̂_0 + σ_s ε̂, over guided-diffusion's "ddimS" times unless told otherwise.

No term divides by α, so a schedule that ends without any signal (zero terminal SNR) needs no special case.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser

__all__ = ["ddim"]


def ddim(
    denoiser: Denoiser,
    process: DiffusionProcess,
    times: Tensor,
    x: Tensor,
    noises: Iterator[Tensor],
    *,
    set_alpha_to_one: bool = True,
) -> Tensor:
    """Sample from x_T (B, C, H, W) to x_0; no noise is used.

    Arguments:
        times: Indices in [0, T), ascending, with shape (S,).
        set_alpha_to_one: Whether the last step ends at x̂_0; otherwise at the noise level of index 0, as diffusers'
            option of this name has it.
    """
    path = process.respace(times)
    end = (1.0, 0.0) if set_alpha_to_one else (float(process.alphas[0]), float(process.sigmas[0]))
    levels = [end, *zip(path.alphas.tolist(), path.sigmas.tolist(), strict=True)]
    for index in reversed(range(len(path))):
        denoised = denoiser(x, index, path)
        alpha, sigma = levels[index]
        x = alpha * denoised.x0 + sigma * denoised.noise
    return x
