r"""DDIM (Song et al., ICLR 2021), x_s = α_s x̂_0 + σ_s ε̂, over guided-diffusion's "ddimS" times unless told otherwise.

No term divides by α, so a schedule that ends without any signal (zero terminal SNR) needs no special case.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from robustdiff.process import DiffusionProcess
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler

__all__ = ["DDIM"]


@SAMPLERS.register("ddim")
class DDIM(Sampler):
    """DDIM."""

    default: ClassVar[bool] = True

    set_alpha_to_one: bool = Field(True, description="whether the last step ends at x̂_0, or at the noise of index 0")

    def along(self, times: Tensor, process: DiffusionProcess) -> Path:
        path = super().along(times, process)
        if self.set_alpha_to_one:
            return path
        return replace(path, end=(float(process.alphas[0]), float(process.sigmas[0])))
