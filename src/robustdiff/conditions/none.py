"""The condition of unconditional networks, which has no arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError

__all__ = ["Unconditional"]


@dataclass(frozen=True)
class Unconditional(Condition):
    """The condition of a network that takes only x_t and t."""

    def batch(
        self,
        labels: Tensor | None,
        captions: Sequence[str] | None,
        dropped: Tensor | None,
        geometry: Tensor | None = None,
    ) -> dict[str, Any]:
        return {}

    def empty(self) -> dict[str, Any]:
        raise InputError("guidance needs a model with a condition, such as classes: leave it out")

    def check(self, num_classes: int | None, captions: bool, path: str) -> None:
        return None
