"""An adversary: the same δ everywhere."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from robustdiff.perturbation import ADVERSARIES, Adversary, AdversaryConfig


class Constant(Adversary):
    def __init__(self, shift):
        super().__init__(steps=1)
        self.shift = shift

    def perturb(self, points, loss):
        yield torch.full_like(points.x_t, self.shift)


@ADVERSARIES.register("constant")
class ConstantConfig(AdversaryConfig):
    name: Literal["constant"] = "constant"
    shift: float = Field(0.25, ge=0)

    def build(self, process):
        return Constant(self.shift)
