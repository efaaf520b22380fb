"""Ordinary training, without a perturbation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from robustdiff.perturbation.adversary import ADVERSARIES, Adversary, AdversaryConfig, LossOfDelta
from robustdiff.perturbation.radii import Points
from robustdiff.process import DiffusionProcess

__all__ = ["NoAdversary", "NoConfig"]


class NoAdversary(Adversary):
    """Ordinary training: one pass at δ = 0."""

    moves = False
    recordable = True

    def __init__(self) -> None:
        super().__init__(steps=1)

    def perturb(self, points: Points, loss: LossOfDelta | None) -> Iterator[Tensor]:
        yield torch.zeros_like(points.x_t)


@ADVERSARIES.register("none")
class NoConfig(AdversaryConfig):
    """Ordinary training. Settings of other adversaries are dropped, so that a recipe can switch its adversary off by
    the name alone."""

    name: Literal["none"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _switched_off(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value and "name" not in value:
            raise ValueError(f"adversary.{next(iter(value))} is set and adversary.name is not: give one, such as free")
        others = {name for kind in ADVERSARIES.values() for name in kind.model_fields} - cls.model_fields.keys()
        return {name: setting for name, setting in value.items() if name not in others}

    def build(self, process: DiffusionProcess) -> NoAdversary:
        return NoAdversary()
