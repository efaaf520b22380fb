"""The choice of the times that a sampler visits out of T training times: guided-diffusion's and diffusers' spacings.

The steps are a number S, spaced as the sampler's authors did or as a diffusers scheduler does (:func:`scheduled`), or
a string of guided-diffusion, which means the same times for every sampler: "10" (evenly over all times), "10,20,30"
(10, 20 and 30 steps in the three thirds of the times, the least noisy first), "ddim25" (an integer stride from 0).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.errors import InputError

__all__ = ["SPACINGS", "Spacing", "check_steps", "evenly_spaced", "respaced", "scheduled", "strided"]

Spacing = Literal["own", "leading", "trailing", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)
"""The names of the spacings; "own" is that of the sampler's authors."""


def check_steps(steps: int, T: int | None) -> None:
    """Check that a number of network evaluations is in [1, T], or at least 1 if T is None (continuous time).

    Raises:
        InputError: If the number is out of range.
    """
    if steps < 1 or (T is not None and steps > T):
        raise InputError(f"steps must be {'at least 1' if T is None else f'between 1 and {T}'}; got {steps}")


def _section(steps: int, size: int) -> list[int]:
    """Return S positions from 0 to size − 1 with equal (rounded) gaps."""
    stride = (size - 1) / (steps - 1) if steps > 1 else 1
    times, position = [], 0.0
    for _ in range(steps):
        times.append(round(position))  # accumulated as in the original, so that halves are rounded the same way
        position += stride
    return times


def respaced(spacing: str, T: int) -> Tensor:
    """Return the times of a respacing string, as ``space_timesteps(T, spacing)`` of Nichol & Dhariwal (2021).

    Unlike the original, which visits time 0 alone and so returns noise, a single step is at the noisiest time.

    Raises:
        InputError: If the string is malformed, a section has more steps than times, or no integer stride makes the S
            steps of "ddimS".
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


def evenly_spaced(steps: int, T: int) -> Tensor:
    """Return S times from 0 to T − 1 with equal (rounded) gaps."""
    check_steps(steps, T)
    return respaced(str(steps), T)


def strided(steps: int, T: int) -> Tensor:
    """Return the S times ⌊iT/S⌋, i = 0 … S − 1; if S divides T, they are those of "ddimS".

    A single step is at the noisiest time T − 1, since at time 0 it would return noise.
    """
    check_steps(steps, T)
    return torch.tensor([T - 1]) if steps == 1 else torch.arange(steps) * T // steps


def scheduled(spacing: Spacing, steps: int, T: int, offset: int = 0, left_out: int = 0) -> Tensor:
    """Return the S times of diffusers' ``timestep_spacing`` (Lin et al., 2024, arXiv 2305.08891, table 2), ascending.

    Unlike diffusers' DDIM and DDPM, whose only step of "leading" and "linspace" is at the least noisy time and returns
    the noise that it is given, a single step is at the noisiest time. With ``left_out`` it is where diffusers has it.

    Args:
        spacing: The spacing: "leading" (an integer stride from ``offset``), "trailing" (from the last time down) or
            "linspace" (from the first time to the last).
        steps: The number S of steps, in [1, T].
        T: The number of times.
        offset: The ``steps_offset`` of a scheduler, for "leading".
        left_out: 1 to omit the first of S + 1 times, as the multistep solvers of diffusers do, otherwise 0; without
            effect for "trailing".

    Raises:
        InputError: If S is out of range, or the times are not S distinct times in [0, T).
    """
    check_steps(steps, T)
    if steps == 1 and not left_out:
        return torch.tensor([T - 1])
    n = steps + left_out
    times: NDArray[Any]
    if spacing == "trailing":
        times = (np.round(T - np.arange(steps) * (T / steps)) - 1)[::-1]
    elif spacing == "leading":
        times = np.arange(n)[left_out:] * (T // n) + offset
    else:
        times = np.linspace(0, T - 1, n).round()[left_out:]
    if not (times[0] >= 0 and times[-1] < T and len(set(times)) == steps):
        raise InputError(f"spacing={spacing} with an offset of {offset} has no {steps} of {T} times: choose another")
    return torch.from_numpy(times.astype(np.int64))
