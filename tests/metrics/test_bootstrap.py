"""Bootstrap intervals and weights."""

import numpy as np
import pytest

from robustdiff.metrics.bootstrap import block_of, block_weights, interval


def test_interval_is_centred_at_the_estimate():
    replicates = np.random.default_rng(0).normal(7, 2, 20_000)
    low, high = interval(3.0, replicates, 0.9)
    assert low == pytest.approx(3 - 1.645 * 2, abs=0.1)
    assert high == pytest.approx(3 + 1.645 * 2, abs=0.1)


@pytest.mark.parametrize("blocks", [1, 7, 50])
def test_each_round_of_images_goes_through_all_blocks_once(blocks):
    rounds = block_of(np.arange(20 * blocks), blocks).reshape(20, blocks)
    assert np.array_equal(np.sort(rounds, axis=1), np.tile(np.arange(blocks), (20, 1)))


def test_each_replicate_draws_as_many_blocks_as_there_are():
    weights = block_weights(50, 1000, seed=1)
    assert (weights.sum(axis=1) == 50).all()
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.05)
    assert np.array_equal(weights, block_weights(50, 1000, seed=1))
