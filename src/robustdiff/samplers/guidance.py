r"""Classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598), on what a network predicts:

    F = F(x, t, ∅) + g · (F(x, t, c) − F(x, t, ∅)),

with c the condition and ∅ the empty one. ε, v and x_0 are linear in one another at a given x_t, so it does not matter
which of them is guided. A learned variance is that of the conditional call.
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
    """Return a model that is called as the given one, and evaluates it with and without the condition in one batch.

    Arguments:
        model: Called as diffusers calls it.
        guidance: g ≥ 0, finite.
        condition: The condition that it will be called with.
        unconditional: ∅, by the same names: tensors with one row, or with one for each sample; or one number for all.

    Raises:
        InputError: If the scale is out of range, or there is no condition, or ∅ lacks a part of it.
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
