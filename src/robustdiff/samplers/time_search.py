r"""The times of multistep consistency sampling, found greedily (Song et al., 2023, arXiv 2303.01469, section 3).

With τ_1 = 0 (σ_max) and τ_1 … τ_{k−1} found, τ_k is the scale between τ_{k−1} and σ_min at which the FID of k-step
samples is least, by ternary search, which takes the FID to be a unimodal function of τ_k. Samples of all candidates
come from common noise, so that their FIDs can be compared.
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
        numbers: The scales τ_1 … τ_S, ascending, counted from the noisiest: ``steps`` of the sampler multistep.
        value: The objective there.
        evaluated: The objective of everything that was tried, in order.
    """

    numbers: tuple[int, ...]
    value: float
    evaluated: dict[tuple[int, ...], float]


def search_times(objective: Callable[[tuple[int, ...]], float], steps: int, N: int) -> TimeSearch:
    """Find the S scales that minimise an objective, one after the other.

    Arguments:
        objective: (τ_1, …, τ_k) ↦ what is to be small, such as an FID; called once for each tuple.
        steps: S, from 1 to N − 1.
        N: The number of scales.

    Raises:
        InputError: If there are not so many scales.
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
        # The last N − 1 is σ_min, where nothing is left to do, and the times after this one need room as well.
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
