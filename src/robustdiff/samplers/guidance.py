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

__all__ = ["check_guidance", "guided"]


def check_guidance(scale: float) -> None:
    """Check a scale of guidance.

    Raises:
        InputError: If it is not at least 0 and finite.
    """
    if not (scale >= 0 and math.isfinite(scale)):
        raise InputError(f"guidance must be at least 0 and finite; got {scale}")


def guided(
    model: Callable[..., Any], guidance: float, condition: Mapping[str, Any], unconditional: Mapping[str, Any]
) -> Callable[..., Tensor]:
    """Return a guided model, which evaluates the given one with and without the condition in one batch.

    Args:
        model: The model, called as diffusers calls it.
        guidance: The guidance scale g ≥ 0, finite.
        condition: The condition that the guided model will be called with.
        unconditional: The empty condition ∅, under the names of the condition. Each value is a tensor with one row, a
            tensor with one row for each sample, a number, or a mapping of these, where the condition has one. Names
            that a mapping leaves out, such as the size of the images, are those of the condition. A value of another
            kind, such as None, must be the same in both.

    Raises:
        InputError: If the scale is out of range, the condition is empty, a name is missing from ``unconditional``, or a
            value of it does not go with that of the condition.
    """
    check_guidance(guidance)
    if not condition:
        raise InputError("guidance needs a model with a condition, such as classes: leave it out")
    if missing := [name for name in condition if name not in unconditional]:
        raise InputError(f"guidance needs the empty {missing[0]}: the model must have been trained with a null class")

    def call(x: Tensor, t: Tensor, **given: Any) -> Tensor:
        both = {name: _both(name, value, unconditional[name]) for name, value in given.items()}
        conditional, empty = predict(model, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        channels = x.shape[1]
        mean = empty[:, :channels] + guidance * (conditional[:, :channels] - empty[:, :channels])
        return torch.cat([mean, conditional[:, channels:]], dim=1)

    return call


def _both(name: str, value: Any, empty: Any) -> Any:
    """Return a condition followed by the empty one, as the arguments of a batch of twice the size."""
    if isinstance(value, Mapping):
        if not isinstance(empty, Mapping) or not empty.keys() <= value.keys():
            raise InputError(f"guidance needs the empty {name} as a mapping of {', '.join(value)}, or of some of these")
        return {key: _both(f"{name}[{key!r}]", one, empty.get(key, one)) for key, one in value.items()}
    if isinstance(value, Tensor):
        if isinstance(empty, bool | int | float):
            return torch.cat([value, torch.full_like(value, empty)])
        try:
            return torch.cat([value, empty.to(value).expand_as(value)])
        except (AttributeError, RuntimeError):  # no tensor, or one of another shape
            raise InputError(
                f"guidance needs the empty {name} as a number, or as a tensor with one or {len(value)} rows of shape "
                f"{tuple(value.shape[1:])}"
            ) from None
    if isinstance(empty, Tensor | Mapping) or empty != value:
        raise InputError(f"{name}={value!r} is no tensor, and guidance cannot call the model with {empty!r} as well")
    return value
