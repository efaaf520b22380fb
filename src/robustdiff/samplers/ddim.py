r"""DDIM (Song et al., ICLR 2021), x_s = α_s x̂_0 + σ_s ε̂, over guided-diffusion's "ddimS" times unless told otherwise.

No term divides by α, so a schedule that ends without any signal (zero terminal SNR) needs no special case.
"""

from __future__ import annotations

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
        end = (1.0, 0.0) if self.set_alpha_to_one else (float(process.alphas[0]), float(process.sigmas[0]))
        return Path(process.respace(times), process, times, end)
