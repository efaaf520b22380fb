"""Which of the T training times a sampler of S steps visits, ascending: guided-diffusion's respacing."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.errors import InputError

__all__ = ["check_steps", "evenly_spaced", "strided"]


def check_steps(steps: int, T: int) -> None:
    """Raises InputError if a sampler cannot have so many steps."""
    if not 1 <= steps <= T:
        raise InputError(f"steps must be between 1 and {T}; got {steps}")


def evenly_spaced(steps: int, T: int) -> Tensor:
    """S times from 0 to T − 1 with equal (rounded) gaps: ``space_timesteps(T, [S])`` of Nichol & Dhariwal (2021).

    A single step starts from the noisiest time (there the original would visit only time 0, and leave noise as it is).
    """
    check_steps(steps, T)
    if steps == 1:
        return torch.tensor([T - 1])
    stride = (T - 1) / (steps - 1)
    times, position = [], 0.0
    for _ in range(steps):
        times.append(round(position))  # accumulated, as the original does, so that halves round the same way
        position += stride
    return torch.tensor(times)


def strided(steps: int, T: int) -> Tensor:
    """Every (T/S)-th time from 0 on: the original's "ddimS", and its nearest where S does not divide T."""
    check_steps(steps, T)
    return torch.arange(steps) * T // steps
