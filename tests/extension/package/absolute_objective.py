"""An objective: the denoising loss of x_0-prediction, times a factor, and its root beside it."""

from __future__ import annotations

from typing import ClassVar, Literal

from robustdiff.objectives.denoising import DenoisingConfig, DenoisingObjective
from robustdiff.objectives.objective import OBJECTIVES, ObjectiveConfig


class Absolute(DenoisingObjective):
    def __init__(self, process, factor):
        super().__init__(process, prediction="sample")
        self.factor = factor

    def __call__(self, model, draw, delta=None):
        losses = super().__call__(model, draw, delta)
        return {**losses, "loss": self.factor * losses["loss"], "absolute": losses["loss"].sqrt()}


@OBJECTIVES.register("absolute")
class AbsoluteConfig(ObjectiveConfig):
    prediction: ClassVar = "sample"
    name: Literal["absolute"] = "absolute"
    factor: float = 2.0

    def new_process(self, process, steps):
        return DenoisingConfig(prediction="sample").new_process(process, steps)

    def build(self, process, steps, target=None, teacher=None):
        return Absolute(process, self.factor)
