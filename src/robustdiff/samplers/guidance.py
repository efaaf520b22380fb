r"""Classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598) of a network's output F:

    F = F(x, t, ∅) + g · (F(x, t, c) − F(x, t, ∅)),

with c the condition and ∅ the empty condition. ε, v and x_0 are linear in one another at a given x_t, so that the
result is the same for each parameterisation. A learned variance is taken from the conditional output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.objectives.objective import predict

__all__ = ["guided"]


def guided(
    model: Callable[..., Any], guidance: float, condition: Mapping[str, Any], unconditional: Mapping[str, Any]
) -> Callable[..., Tensor]:
    """Return a guided model, which evaluates the given one with and without the condition in one batch.

    Arguments:
        model: The model, called as diffusers calls it.
        guidance: The guidance scale g ≥ 0, finite.
        condition: The condition that the guided model will be called with.
        unconditional: The empty condition ∅, under the names of the condition. Each value is a tensor with one row, a
            tensor with one row for each sample, or a number.

    Raises:
        InputError: If the scale is out of range, the condition is empty, or a name is missing from ``unconditional``.
    """
    if not (guidance >= 0 and math.isfinite(guidance)):
        raise InputError(f"guidance must be at least 0 and finite; got {guidance}")
    if not condition:
        raise InputError("guidance needs a model with a condition, such as classes: leave it out")
    if missing := [name for name in condition if name not in unconditional]:
        raise InputError(f"guidance needs the empty {missing[0]}: the model must have been trained with a null class")

    def call(x: Tensor, t: Tensor, **given: Any) -> Tensor:
        both = {}
        for name, value in given.items():
            empty = unconditional[name]
            if not isinstance(empty, Tensor):
                empty = torch.full_like(value, empty)
            both[name] = torch.cat([value, empty.to(value).expand_as(value)])
        conditional, empty = predict(model, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        channels = x.shape[1]
        mean = empty[:, :channels] + guidance * (conditional[:, :channels] - empty[:, :channels])
        return torch.cat([mean, conditional[:, channels:]], dim=1)

    return call
