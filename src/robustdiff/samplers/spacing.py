"""The T training times that a sampler visits, ascending: guided-diffusion's respacing, and diffusers' spacings.

Steps are a number S, spaced as the sampler's authors did or as a checkpoint's scheduler says (:func:`scheduled`), or
one of guided-diffusion's strings, which mean the same times for every sampler: "10" (evenly over all times), "10,20,30"
(sections: so many steps in each third of the times, the least noisy first), "ddim25" (a whole stride from 0 on).
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
"""own: as the sampler's authors space its times."""


def check_steps(steps: int, T: int | None) -> None:
    """Check a number of network evaluations, in [1, T], or any where time is continuous.

    Raises:
        InputError: If it is out of range.
    """
    if steps < 1 or (T is not None and steps > T):
        raise InputError(f"steps must be {'at least 1' if T is None else f'between 1 and {T}'}; got {steps}")


def _section(steps: int, size: int) -> list[int]:
    """Return S positions from 0 to size − 1 with equal (rounded) gaps."""
    stride = (size - 1) / (steps - 1) if steps > 1 else 1
    times, position = [], 0.0
    for _ in range(steps):
        times.append(round(position))  # accumulated, as the original does, so that halves round the same way
        position += stride
    return times


def respaced(spacing: str, T: int) -> Tensor:
    """Return the times of a respacing string: ``space_timesteps(T, spacing)`` of Nichol & Dhariwal (2021).

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
    """Return S times from 0 to T − 1 with equal (rounded) gaps; or those of a string."""
    if isinstance(steps, int):
        check_steps(steps, T)
    return respaced(str(steps), T)


def strided(steps: int | str, T: int) -> Tensor:
    """Return every (T/S)-th time from 0 on: "ddimS", its nearest where S does not divide T; or those of a string."""
    if isinstance(steps, str):
        return respaced(steps, T)
    check_steps(steps, T)
    return torch.arange(steps) * T // steps


def scheduled(spacing: Spacing, steps: int, T: int, offset: int = 0, left_out: int = 0) -> Tensor:
    """Return the S times of diffusers' ``timestep_spacing`` (Lin et al., 2024, arXiv 2305.08891, table 2), ascending.

    Arguments:
        spacing: "leading" (a whole stride from ``offset`` on), "trailing" (from the last time down) or "linspace" (from
            the first to the last).
        steps: S, in [1, T].
        T: The number of times.
        offset: ``steps_offset`` of a scheduler, for "leading".
        left_out: With 1 the first of S + 1 times is left out, as the multistep solvers of diffusers do; not for
            "trailing".

    Raises:
        InputError: If S is out of range, or the times reach beyond the last one.
    """
    check_steps(steps, T)
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
