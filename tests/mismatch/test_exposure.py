"""Streaming moments by blocks are numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustdiff.mismatch.distances import IMAGE_BLOCKS, half_samples, image_block_of
from robustdiff.mismatch.exposure import BlockMoments


@pytest.mark.parametrize("sizes", [[100], [1, 63, 36], [50, 50]])
def test_moments_are_those_of_numpy_however_the_images_come(sizes):
    x = 5 + torch.randn(100, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments, start = BlockMoments(6), 0
    for size in sizes:
        moments.update(x[start : start + size], range(start, start + size))
        start += size
    subsets = half_samples(3)
    flat = x.flatten(1).numpy()
    for subset, mean, std in zip(subsets, moments.mean(subsets), moments.std(subsets), strict=True):
        chosen = flat[subset[image_block_of(np.arange(100))]]
        assert mean == pytest.approx(chosen.mean(), rel=1e-12)
        assert std == pytest.approx(chosen.std(axis=0, ddof=1).mean(), rel=1e-9)


def test_elements_that_do_not_vary_have_no_spread():
    moments = BlockMoments(2)
    moments.update(torch.full((2 * IMAGE_BLOCKS, 2), 0.1), range(2 * IMAGE_BLOCKS))
    assert moments.std(half_samples(2)) == pytest.approx(np.zeros(3), abs=1e-8)
