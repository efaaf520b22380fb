r"""A greedy search for the times of multistep consistency sampling (Song et al., 2023, arXiv 2303.01469, section 3).

The search starts at τ_1 = 0 (σ_max). Given τ_1 … τ_{k−1}, τ_k is the scale between τ_{k−1} and σ_min that minimises the
FID of k-step samples, found by ternary search, which assumes that the FID is a unimodal function of τ_k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robustdiff.errors import InputError

__all__ = ["TimeSearch", "search_times"]


@dataclass(frozen=True)
class TimeSearch:
    """The result of a search.

    Attributes:
        numbers: The scales τ_1 … τ_S, ascending, counted from the noisiest: the argument ``steps`` of multistep.
        value: The objective at ``numbers``.
        evaluated: The objective at every candidate, in the order of evaluation.
    """

    numbers: tuple[int, ...]
    value: float
    evaluated: dict[tuple[int, ...], float]


def search_times(objective: Callable[[tuple[int, ...]], float], steps: int, N: int) -> TimeSearch:
    """Find S scales that minimise an objective, one after the other.

    Args:
        objective: A function that maps (τ_1, …, τ_k) to the value to minimise, such as an FID of samples with the same
            noise for all candidates. It is called once for each.
        steps: The number S of scales to find, in [1, N − 1].
        N: The number of training scales.

    Raises:
        InputError: If S is out of range.
    """
    if not 1 <= steps < N:
        raise InputError(f"steps of this consistency model must be between 1 and {N - 1}; got {steps}")
    evaluated: dict[tuple[int, ...], float] = {}

    def value(numbers: tuple[int, ...]) -> float:
        if numbers not in evaluated:
            evaluated[numbers] = objective(numbers)
        return evaluated[numbers]

    found: tuple[int, ...] = (0,)
    value(found)
    for k in range(2, steps + 1):
        # N − 1 is σ_min, where f is the identity; the S − k times after this one need room as well.
        low, high = found[-1] + 1, N - 2 - (steps - k)
        while high - low > 2:
            third = (high - low) // 3
            left, right = low + third, high - third
            if value((*found, left)) <= value((*found, right)):
                high = right - 1
            else:
                low = left + 1
        found = min(((*found, time) for time in range(low, high + 1)), key=value)
    return TimeSearch(found, value(found), evaluated)
