"""Means and covariances of features that arrive in batches, accumulated by blocks for the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import Array, block_of

__all__ = ["Moments"]

_ROWS = 256
"""The number of features of a block whose outer products are summed at once, since a sum has D² temporary numbers."""


class Moments:
    """The first and second moments of a stream of features, by blocks.

    Args:
        dim: D, the number of features.
        blocks: K, the number of blocks. The memory is 8·K·D (D + 256) bytes.

    Attributes:
        count: The number n_k of images of each block, int64 (K,).
        total: The sum s_k = Σf of the features of each block, float64 (K, D).
    """

    def __init__(self, dim: int, blocks: int = 50) -> None:
        self.count = np.zeros(blocks, np.int64)
        self.total = np.zeros((blocks, dim))
        self._outer = np.zeros((blocks, dim, dim))
        self._rows: list[list[Array]] = [[] for _ in range(blocks)]  # features that are not in the sum yet

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
            self._rows[k].append(rows)
            if sum(map(len, self._rows[k])) >= _ROWS:
                self._add_rows(k)

    def _add_rows(self, k: int) -> None:
        rows = np.concatenate(self._rows[k])
        self._outer[k] += rows.T @ rows
        self._rows[k] = []

    @property
    def outer(self) -> Array:
        """Return the sum S_k = Σff^⊤ of each block, float64 (K, D, D)."""
        for k, rows in enumerate(self._rows):
            if rows:
                self._add_rows(k)
        return self._outer

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
