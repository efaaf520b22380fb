"""Aspect-ratio buckets: the sizes of the batches in which images of many aspect ratios are trained.

The sizes are those of kohya's sd-scripts. With S the nominal side and s the step, widths are the multiples of s from
S/2 to 2S, and each has the largest height that is a multiple of s, from S/2 to 2S, with width · height ≤ S². The sizes
with height and width exchanged, and the square, belong to them as well. An image is in the bucket whose aspect ratio is
the nearest, that is, with the least |log(w/h) − log(W/H)|.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["bucket_sizes", "nearest_bucket"]


def bucket_sizes(size: int, step: int) -> list[tuple[int, int]]:
    """Return the heights and widths of the buckets, sorted.

    Args:
        size: The nominal side S in pixels.
        step: The step s in pixels, at most S.
    """
    most = 2 * size // step * step
    square = size // step * step
    found = {(square, square)}
    for width in range(math.ceil(size / 2 / step) * step, most + 1, step):
        height = min(most, size * size // width // step * step)
        if height >= size / 2:
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest_bucket(sizes: Tensor, buckets: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the index of the bucket of each image, int64 (N,).

    Args:
        sizes: The heights and widths of the images in pixels, (N, 2).
        buckets: The heights and widths of the buckets.
    """
    ratios = np.log([width / height for height, width in buckets])
    heights, widths = sizes.numpy().astype(np.float64).T
    return np.abs(np.log(widths / heights)[:, None] - ratios).argmin(1).astype(np.int64)
