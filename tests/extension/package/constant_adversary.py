"""An adversary: the same δ everywhere."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from robustdiff.perturbation import ADVERSARIES, Adversary, AdversaryConfig


class Constant(Adversary):
    def __init__(self, shift):
        super().__init__(steps=1)
        self.shift = shift

    def __call__(self, x_t, t=None, *, loss=None, training_step=None):
        yield x_t.new_full(x_t.shape, self.shift)


@ADVERSARIES.register("constant")
class ConstantConfig(AdversaryConfig):
    name: Literal["constant"] = "constant"
    shift: float = Field(0.25, ge=0)

    def build(self, process):
        return Constant(self.shift)
