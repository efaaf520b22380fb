"""A uniform sample of features that arrive in batches, which does not depend on how they are divided into batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LIMIT", "Reservoir", "fixed_order"]

LIMIT = 10_000
"""The number of features kept for metrics whose cost grows with its square."""


def _priority(index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a pseudo-random uint64 for each image index: the output of SplitMix64 (Steele et al., 2014)."""
    z = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fixed_order(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the numbers 0 … count − 1 in a pseudo-random order, which is always the same.

    The first images or captions of a dataset in this order are a sample of all of it; those of a folder in the order of
    its files would be of the first subfolders alone.
    """
    return np.random.default_rng(seed).permutation(count)


class Reservoir:
    """A uniform sample of at most ``limit`` features (D,) of a stream.

    Each image index has a pseudo-random priority, and the images with the smallest priorities are kept, so that samples
    of several processes can be merged. Features are returned in the order of priority, so that any prefix is itself a
    uniform sample, even if the images were ordered by class.
    """

    def __init__(self, dim: int, limit: int = LIMIT) -> None:
        self.limit = limit
        self._parts = [(np.empty(0, np.int64), np.empty((0, dim), np.float32))]

    def update(self, features: NDArray[Any], start: int) -> None:
        """Add the features (B, D) of images start … start + B − 1."""
        index = start + np.arange(len(features), dtype=np.int64)
        self.merge_state({"index": index, "features": np.asarray(features, np.float32)})

    def merge_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the sample of another instance, given its :meth:`state`."""
        self._parts.append((state["index"], state["features"]))
        # Not for each batch, since it copies the whole sample.
        if sum(len(index) for index, _ in self._parts) >= 2 * self.limit:
            self.state()

    def state(self) -> dict[str, NDArray[Any]]:
        """Return arrays to send to another process: ``index`` (n,) and ``features`` (n, D), n ≤ limit.

        Raises:
            ValueError: If an index was added twice.
        """
        index, features = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.argsort(_priority(index), kind="stable")[: self.limit]
        if len(np.unique(index[order])) < len(order):
            raise ValueError("the same image index came twice; give each batch and each process its own")
        self._parts = [(index[order], features[order])]
        return {"index": index[order], "features": features[order]}

    @property
    def features(self) -> NDArray[np.float32]:
        """Return the sample, (n, D), in the order of priority."""
        return self.state()["features"]
