"""Means and covariances of features that arrive in batches, accumulated by blocks for the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import Array, block_of

__all__ = ["Moments"]


class Moments:
    """The first and second moments of a stream of features, by blocks.

    Args:
        dim: D, the number of features.
        blocks: K, the number of blocks. The memory is 8·K·D² bytes.

    Attributes:
        count: The number n_k of images of each block, int64 (K,).
        total: The sum s_k = Σf of the features of each block, float64 (K, D).
        outer: The sum S_k = Σff^⊤ of each block, float64 (K, D, D).
    """

    def __init__(self, dim: int, blocks: int = 50) -> None:
        self.count = np.zeros(blocks, np.int64)
        self.total = np.zeros((blocks, dim))
        self.outer = np.zeros((blocks, dim, dim))

    @property
    def n(self) -> int:
        """Return the number of images."""
        return int(self.count.sum())

    def update(self, features: NDArray[Any], start: int) -> None:
        """Add the features (B, D) of images start … start + B − 1."""
        features = np.asarray(features, np.float64)
        block = block_of(start + np.arange(len(features)), len(self.count))
        for k in np.unique(block):
            rows = features[block == k]
            self.count[k] += len(rows)
            self.total[k] += rows.sum(axis=0)
            self.outer[k] += rows.T @ rows

    @property
    def mean(self) -> Array:
        """Return the mean μ of the features, (D,)."""
        if self.n == 0:
            raise InputError("no images: the mean of nothing is not defined; update first")
        return np.asarray(self.total.sum(axis=0) / self.n)

    @property
    def cov(self) -> Array:
        """Return the covariance C, (D, D), with the divisor n − 1, as in numpy.cov and the original FID."""
        if self.n < 2:
            raise InputError(f"{self.n} images: the covariance needs 2 or more; generate more images")
        mean = self.mean
        return np.asarray((self.outer.sum(axis=0) - self.n * np.outer(mean, mean)) / (self.n - 1))

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the arrays ``count``, ``total`` and ``outer`` by name."""
        return {"count": self.count, "total": self.total, "outer": self.outer}

    def merge_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the images of another instance, given its :meth:`state`.

        Raises:
            ValueError: If its D or K is different.
        """
        for name, array in self.state().items():
            if state[name].shape != array.shape:
                raise ValueError(f"cannot merge moments: {name} has shape {state[name].shape}, here {array.shape}")
        for name, array in self.state().items():
            array += state[name]
