r"""The bootstrap over blocks of images (Efron, Annals of Statistics 7, 1979).

Images are divided into K blocks, which are independent and identically distributed, so that sums over blocks can be
resampled: a replicate of a statistic is computed from sums with block weights w ~ Multinomial(K, 1/K). The memory does
not grow with the number of images.

Two sets with the same number of images share their weights. The difference of their replicates is therefore a replicate
of their difference, and its interval is narrower if image i of both is made from the same noise.

The interval of an estimate F with replicates F* is F ± t_{K−1}·SD(F*), with Student's t for the K blocks. Quantiles of
replicates of so few blocks would be too narrow. An estimate that is positive and skewed, such as FID, has the interval
F·exp(± t_{K−1}·SD(ln F*)). Replicates are biased as much again as the estimate itself, so that they are recentred at F,
and 2F − mean F* is the estimate without that bias.

The relative change of such an estimate, F/F' − 1, has the interval (F/F')·exp(± t_{K−1}·SD(ln F* − ln F'*)) − 1, which
cannot fall below −1. Both are recentred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

__all__ = [
    "BLOCKS",
    "GOLDEN",
    "REPLICATES",
    "Array",
    "block_of",
    "block_weights",
    "corrected",
    "direction",
    "interval",
    "relative_interval",
]

Array = NDArray[np.float64]

REPLICATES = 200
BLOCKS = 50
"""The number of blocks of a metric, if it does not choose another."""
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


def corrected(estimate: float, replicates: NDArray[Any]) -> float:
    """Return 2F − mean F*, the estimate F without its bias, from its replicates with shape (R,)."""
    return 2 * estimate - float(replicates.mean())


def interval(
    estimate: float, replicates: NDArray[Any], blocks: int, log: bool = False, level: float = 0.95
) -> tuple[float, float]:
    """Return the ends of Student's interval of an estimate, which covers its expectation for this number of images.

    Args:
        estimate: The estimate, computed from all blocks.
        replicates: Its replicates, with shape (R,).
        blocks: The number K ≥ 2 of blocks that the replicates resample.
        log: True to compute the interval of the logarithm, which is not done if the estimate or a recentred replicate
            is not positive.
        level: The probability with which the interval covers.
    """
    centred = replicates - np.mean(replicates) + estimate
    t = student_t.ppf((1 + level) / 2, blocks - 1)
    if log and min(estimate, centred.min()) > 0:
        factor = float(np.exp(t * np.std(np.log(centred), ddof=1)))
        return estimate / factor, estimate * factor
    half = float(t * np.std(centred, ddof=1))
    return estimate - half, estimate + half


def relative_interval(
    estimate: float,
    replicates: NDArray[Any],
    base: float,
    base_replicates: NDArray[Any],
    blocks: int,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Return the ends of Student's interval of F/F' − 1, from that of ln F − ln F', for positive and skewed estimates.

    Args:
        estimate: The estimate F, computed from all blocks.
        replicates: Its replicates, with shape (R,).
        base: The estimate F' that it is compared with.
        base_replicates: Its replicates, with shape (R,), which resample the same blocks.
        blocks: The number K ≥ 2 of blocks that the replicates resample.
        level: The probability with which the interval covers.

    Returns:
        The ends, or None if an estimate or a recentred replicate is not positive.
    """
    logs = []
    for value, drawn in ((estimate, replicates), (base, base_replicates)):
        centred = drawn - np.mean(drawn) + value
        if min(value, centred.min()) <= 0:
            return None
        logs.append(np.log(centred))
    half = student_t.ppf((1 + level) / 2, blocks - 1) * np.std(logs[0] - logs[1], ddof=1)
    middle = np.log(estimate / base)
    return float(np.expm1(middle - half)), float(np.expm1(middle + half))


def direction(ends: Sequence[float] | None, relative_ends: Sequence[float] | None) -> int:
    """Return −1 or 1 if a difference is below or above 0 beyond chance, else 0.

    Args:
        ends: The ends of the interval of the difference, or None.
        relative_ends: Those of the relative change, which decide if there are any, or None.
    """
    low, high = relative_ends or ends or (0.0, 0.0)
    return -1 if high < 0 else 1 if low > 0 else 0
