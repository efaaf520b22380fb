r"""Multistep consistency sampling (Song et al., 2023, arXiv 2303.01469, algorithm 1):

    x = σ_{τ_1} z,   x̂ = f(x, σ_{τ_1});    for the other times τ:   x = x̂ + √(σ_τ² − σ_min²) z,   x̂ = f(x, σ_τ).

Times are numbers of the N training scales, counted as in the original from the largest, σ_0 = σ_max, σ_{N−1} = σ_min.
They are S evenly spaced ones, 0, ⌊N/S⌋, 2⌊N/S⌋, …, as diffusers' ``CMStochasticIterativeScheduler`` has them, or are
given as a string such as the original's "0,22,39". A last N − 1 costs nothing: there f is the identity.

With S near N the evenly spaced ones do not reach the lower levels: where N/2 < S they are 0, 1, …, S − 1, and for any
S the last is (S − 1)⌊N/S⌋. A string reaches them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoiser

__all__ = ["multistep", "scale_numbers"]


def scale_numbers(steps: int | str, N: int) -> list[int]:
    """The numbers of the scales at which the network is evaluated, ascending: from the noisiest on.

    Raises:
        InputError: If they are not ascending numbers from 0 to N − 1, or there are more than N − 1.
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


def multistep(
    denoiser: Denoiser, process: DiffusionProcess, steps: int | str, x: Tensor, noises: Iterator[Tensor]
) -> Tensor:
    """Sample from z (B, C, H, W) to x_0, with one of ``noises`` (B, C, H, W) before each evaluation but the first."""
    sigmas = process.sigmas.tolist()
    indices = [len(process) - 1 - number for number in scale_numbers(steps, len(process))]
    x = sigmas[indices[0]] * x
    for index, after in zip(indices, [*indices[1:], None], strict=True):
        x = denoiser(x, index, process).x0
        if after is not None:
            x = x + (sigmas[after] ** 2 - sigmas[0] ** 2) ** 0.5 * next(noises)
    return x
