"""A metric: the mean over images of the standard deviation of their grey values."""

from __future__ import annotations

from robustdiff.metrics.metric import METRICS, Metric, Number


@METRICS.register("contrast")
class Contrast(Metric):
    numbers = (Number("contrast", "contrast", ".2f", "higher"),)

    def reset(self):
        self.deviations = []

    def update(self, batch):
        self.deviations += batch.images.double().flatten(1).std(1).tolist()

    def state(self):
        return self.deviations

    def merge_state(self, state):
        self.deviations = self.deviations + state

    def result(self):
        return {"contrast": sum(self.deviations) / len(self.deviations)}
