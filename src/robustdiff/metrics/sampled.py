"""Base class of metrics that compare a sample of the generated features with as many real ones."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robustdiff.metrics.metric import Batch, Metric, Need
from robustdiff.metrics.reservoir import Reservoir

__all__ = ["SampledMetric"]


class SampledMetric(Metric):
    """A metric of a uniform sample of at most 10,000 generated images."""

    needs: ClassVar[Need] = "reference features"

    def reset(self) -> None:
        self._sample = Reservoir(len(self.real.mean))

    def update(self, batch: Batch) -> None:
        self._sample.update(batch.features, batch.start)

    def state(self) -> Any:
        return self._sample.state()

    def merge_state(self, state: Any) -> None:
        self._sample.merge_state(state)

    def samples(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the features of the sampled images, and those of as many real images."""
        assert self.real.features is not None
        generated = self._sample.features
        return generated, self.real.features[: len(generated)]
