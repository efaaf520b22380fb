"""The bootstrap over blocks of images (Efron, Annals of Statistics 7, 1979).

Images are divided into K blocks, which are independent and identically distributed, so that sums over blocks can be
resampled: a replicate of a statistic is computed from sums with block weights w ~ Multinomial(K, 1/K). The memory does
not grow with the number of images.

Two sets with the same number of images share their weights. The difference of their replicates is therefore a replicate
of their difference, and its interval is narrower if image i of both is made from the same noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["REPLICATES", "Array", "block_of", "block_weights", "interval"]

Array = NDArray[np.float64]

REPLICATES = 200
GOLDEN = (5**0.5 - 1) / 2


def block_of(index: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
    """Return the block of each image, which depends on its index and K alone, not on batches or processes.

    Each K successive images, i = rK … rK + K − 1, go to the K blocks in order, starting from block ⌊K·frac(rφ)⌋, with
    the golden ratio φ. Without this shift, blocks of images with labels i mod 10 would each hold one class.
    """
    return (index + (blocks * (index // blocks * GOLDEN % 1)).astype(np.int64)) % blocks


def block_weights(blocks: int, replicates: int = REPLICATES, seed: int = 0) -> NDArray[np.int64]:
    """Return the weight of each block in each replicate, with shape (R, K)."""
    return np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=replicates)


def interval(estimate: float, replicates: NDArray[Any], level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the interval of an estimate, from its replicates with shape (R,).

    The replicates are recentred at the estimate. An estimate such as FID is biased by noise, and its replicates are
    biased twice as much; recentring removes the additional bias. The interval covers the expectation of the estimate
    for this number of images.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(replicates - np.mean(replicates) + estimate, [tail, 1 - tail])
    return float(low), float(high)
