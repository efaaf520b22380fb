"""The bootstrap over blocks of images (Efron, Annals of Statistics 7, 1979).

Images fall into K groups, the blocks, which are independent and alike, so that sums over blocks can be resampled: a
replicate of a number is the same number of the sums under weights w ~ Multinomial(K, 1/K). Its cost in memory does not
grow with the number of images.

The replicates of two sets of equally many images have the same weights. So the difference of their replicates is a
replicate of their difference, and its interval is the narrower where image i of both is made from the same noise.
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
    """Return the block of each image, from its index and K alone, so that batches and processes do not matter.

    Round r = ⌊i/K⌋ goes through the K blocks once, from block ⌊K·frac(rφ)⌋ on, φ the golden ratio. Without that shift,
    and with labels i mod 10, a block would hold one class, and blocks would not be alike.
    """
    return (index + (blocks * (index // blocks * GOLDEN % 1)).astype(np.int64)) % blocks


def block_weights(blocks: int, replicates: int = REPLICATES, seed: int = 0) -> NDArray[np.int64]:
    """Return how often each block counts in each replicate, (R, K)."""
    return np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=replicates)


def interval(estimate: float, replicates: NDArray[Any], level: float = 0.95) -> tuple[float, float]:
    """Return the lower and the upper end of the interval of a number or difference, from its replicates, (R,).

    The replicates are recentred at the estimate, which takes out a bias that the number has from noise, as FID has, and
    that its replicates have twice. The interval covers the expectation of the number for so many images.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(replicates - np.mean(replicates) + estimate, [tail, 1 - tail])
    return float(low), float(high)
