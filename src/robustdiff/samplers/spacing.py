"""Which of the T training times a sampler visits, ascending: guided-diffusion's respacing.

Steps are a number S, spaced as the sampler's authors did, or one of guided-diffusion's strings, which mean the same
times for every sampler: "10" (evenly over all times), "10,20,30" (sections: so many steps in each third of the times,
the least noisy first), "ddim25" (a whole stride from 0 on).
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.errors import InputError

__all__ = ["check_steps", "evenly_spaced", "respaced", "strided"]


def check_steps(steps: int | str, T: int) -> int:
    """The number of network evaluations of some steps. Raises InputError if a sampler cannot have them."""
    if isinstance(steps, str):
        return len(respaced(steps, T))
    if not 1 <= steps <= T:
        raise InputError(f"steps must be between 1 and {T}; got {steps}")
    return steps


def _section(steps: int, size: int) -> list[int]:
    """S positions from 0 to size − 1 with equal (rounded) gaps."""
    stride = (size - 1) / (steps - 1) if steps > 1 else 1
    times, position = [], 0.0
    for _ in range(steps):
        times.append(round(position))  # accumulated, as the original does, so that halves round the same way
        position += stride
    return times


def respaced(spacing: str, T: int) -> Tensor:
    """The times of a respacing string: ``space_timesteps(T, spacing)`` of Nichol & Dhariwal (2021).

    A single step is at the noisiest time (there the original would visit only time 0, and leave noise as it is).

    Raises:
        InputError: If the string is none of these, asks for more steps than there are times, or "ddimS" has no stride.
    """
    ddim = spacing.removeprefix("ddim")
    try:
        counts = [int(count) for count in ddim.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or (ddim != spacing and len(counts) > 1):
        raise InputError(f'steps {spacing!r}: write a number, sections such as "10,20,30", or "ddim25"')
    if ddim != spacing:
        stride = next((stride for stride in range(1, T) if len(range(0, T, stride)) == counts[0]), None)
        if stride is None:
            raise InputError(f"steps {spacing!r}: no whole stride over {T} times makes {counts[0]} steps")
        return torch.arange(0, T, stride)
    if counts == [1]:
        return torch.tensor([T - 1])
    times, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if count > size:
            raise InputError(f"steps {spacing!r}: section {i + 1} has {size} times and not {count}")
        times += [start + position for position in _section(count, size)]
        start += size
    return torch.tensor(times)


def evenly_spaced(steps: int | str, T: int) -> Tensor:
    """S times from 0 to T − 1 with equal (rounded) gaps, as iddpm has them; or those of a string."""
    check_steps(steps, T)
    return respaced(str(steps), T)


def strided(steps: int | str, T: int) -> Tensor:
    """Every (T/S)-th time from 0 on: the original's "ddimS", its nearest where S does not divide T; or a string's."""
    check_steps(steps, T)
    if isinstance(steps, str):
        return respaced(steps, T)
    return torch.arange(steps) * T // steps
