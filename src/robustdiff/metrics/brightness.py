"""The mean grey value of the images, in [0, 255], with which FID at few steps is strongly correlated."""

from __future__ import annotations

from typing import Any

import torch

from robustdiff.errors import InputError
from robustdiff.metrics.metric import METRICS, Batch, Metric, Number

__all__ = ["Brightness"]


@METRICS.register("brightness")
class Brightness(Metric):
    """The mean over all images, pixels and channels."""

    numbers = (Number("brightness", "brightness", ".1f"),)

    def reset(self) -> None:
        self._n = 0
        self._sums: list[float] = []  # of each batch: the sum of the means of its images

    def update(self, batch: Batch) -> None:
        self._n += len(batch.images)
        self._sums.append(int(batch.images.sum(dtype=torch.int64)) / batch.images[0].numel())

    def state(self) -> Any:
        return self._n, self._sums

    def merge_state(self, state: Any) -> None:
        n, sums = state
        self._n += n
        self._sums = [*self._sums, *sums]

    def result(self) -> dict[str, float | None]:
        if self._n == 0:
            raise InputError("no images: the mean of nothing is not defined; update first")
        mean = 0.0
        for total in self._sums:
            mean += total / self._n
        return {"brightness": mean}
