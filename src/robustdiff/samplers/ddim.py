r"""DDIM (Song et al., ICLR 2021), x_s = α_s x̂_0 + σ_s ε̂, by default at the "ddimS" times of guided-diffusion.

No term is divided by α, so a schedule with zero terminal SNR (α_T = 0) needs no special case.
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
    """The DDIM sampler."""

    default: ClassVar[bool] = True

    set_alpha_to_one: bool = Field(
        True, description="true: the last step ends at x̂_0; false: at the noise level of index 0"
    )

    def along(self, times: Tensor, process: DiffusionProcess) -> Path:
        end = (1.0, 0.0) if self.set_alpha_to_one else (float(process.alphas[0]), float(process.sigmas[0]))
        return Path(process.respace(times), process, times, end)
