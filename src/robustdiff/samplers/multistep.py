r"""Multistep consistency sampling (Song et al., 2023, arXiv 2303.01469, algorithm 1):

    x = σ_{τ_1} z,   x̂ = f(x, σ_{τ_1});    for the other times τ:   x = x̂ + √(σ_τ² − σ_min²) z,   x̂ = f(x, σ_τ).

The times are positions among the N training scales, counted as in the original's sampler from the largest: σ_0 = σ_max,
σ_{N−1} = σ_min. (The objective numbers them in the other direction, from the smallest.) S steps take the evenly spaced
positions 0, ⌊N/S⌋, 2⌊N/S⌋, …, as diffusers' ``CMStochasticIterativeScheduler`` does. A string such as the original's
"0,22,39" gives the positions themselves. A final N − 1 needs no evaluation, since f is the identity there.

The last of the evenly spaced positions is (S − 1)⌊N/S⌋; for N/2 < S < N they are 0, 1, …, S − 1, which excludes the
lowest levels. A string can include them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler, Step, TimeSpacing

__all__ = ["Multistep", "scale_numbers"]


def scale_numbers(steps: int | str, N: int) -> list[int]:
    """Return the positions of the scales at which the network is evaluated, ascending from 0, the noisiest.

    Args:
        steps: The number of steps, in [1, N − 1], or the positions as a string such as "0,22,39".
        N: The number of training scales.

    Raises:
        InputError: If the number is out of range, or the positions do not ascend from 0 to at most N − 1.
    """
    if isinstance(steps, int):
        if not 1 <= steps < N:
            raise InputError(f"steps of this consistency model must be between 1 and {N - 1}; got {steps}")
        return [i * (N // steps) for i in range(steps)]
    try:
        numbers = [int(part) for part in steps.split(",")]
    except ValueError:
        numbers = []
    last = N - 1
    ascending = bool(numbers) and numbers == sorted(set(numbers)) and 0 <= numbers[0] < last >= numbers[-1]
    if not ascending:
        raise InputError(
            f"steps {steps!r}: write a number, or ascending scales from 0 (the noisiest) to {last}, as 0,{N // 2}"
        )
    return numbers[:-1] if numbers[-1] == last else numbers


@SAMPLERS.register("multistep")
class Multistep(Sampler):
    """The multistep sampler of consistency models."""

    model: ClassVar[str] = "consistency model"
    needs: ClassVar[str] = "α = 1"
    default: ClassVar[bool] = True
    strings: ClassVar[bool] = False
    spaced: ClassVar[bool] = False
    default_steps: ClassVar[int] = 2
    grid_steps: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)

    @field_validator("eps_scale")
    @classmethod
    def _unscaled(cls, value: Any) -> Any:
        raise ValueError("it has no predicted noise to scale: leave it out")

    @classmethod
    def suits(cls, process: DiffusionProcess) -> bool:
        return bool((process.alphas == 1).all())

    def path(
        self, steps: int | str, process: DiffusionProcess, spacing: TimeSpacing | None = None, steps_offset: int = 0
    ) -> Path:
        numbers = torch.tensor(scale_numbers(steps, len(process)))
        indices = (len(process) - 1 - numbers).flip(0)
        return Path(process.respace(indices), process, indices, end=(1.0, float(process.sigmas[0])))

    def start(self, x: Tensor, path: Path) -> Tensor:
        return float(path.points.sigmas[-1]) * x

    def step(self, step: Step) -> Tensor:
        x0, (_, sigma), (_, sigma_min) = step.denoised.x0, step.after, step.path.end
        return x0 if step.index == 0 else x0 + (sigma**2 - sigma_min**2) ** 0.5 * next(step.noises)
