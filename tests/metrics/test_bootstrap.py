"""Bootstrap intervals and weights."""

import numpy as np
import pytest

from robustdiff.metrics.bootstrap import block_of, block_weights, direction, interval, relative_interval


def test_interval_is_centred_at_the_estimate():
    replicates = np.random.default_rng(0).normal(7, 2, 20_000)
    low, high = interval(3.0, replicates, 8, level=0.9)
    assert low == pytest.approx(3 - 1.895 * 2, abs=0.1), "1.895 is the quantile of Student's t with 7 degrees"
    assert high == pytest.approx(3 + 1.895 * 2, abs=0.1)


def test_interval_of_three_replicates_by_hand():
    """t₃ = 3.18245 and, around 2, SD(2/3, 5/3, 11/3) = √(7/3), and 0.853172 of their logarithms."""
    replicates = np.array([1.0, 2.0, 4.0])
    assert interval(2.0, replicates, 4) == pytest.approx((2 - 4.861267, 2 + 4.861267), abs=1e-6)
    assert interval(2.0, replicates, 4, log=True) == pytest.approx((2 / 15.107263, 2 * 15.107263), rel=1e-6)


def test_interval_of_a_logarithm_is_symmetric_in_ratios():
    replicates = 3 * np.exp(np.random.default_rng(0).normal(0, 0.2, 20_000))
    low, high = interval(3.0, replicates, 50, log=True)
    assert high / 3 == pytest.approx(3 / low)
    assert np.log(high / 3) == pytest.approx(2.01 * 0.2, rel=0.05)
    assert interval(3.0, replicates * 9, 50, log=True) == interval(3.0, replicates * 9, 50), "not of negative numbers"


def test_intervals_of_blocks_cover_as_often_as_they_say():
    """The mean of 20 skewed blocks: quantiles of the replicates, without t, cover in about 91 % of experiments."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        blocks = generator.gamma(4, 0.25, 20)
        low, high = interval(float(blocks.mean()), block_weights(20) @ blocks / 20, 20, log=True)
        covered += low <= 1 <= high
    assert covered == pytest.approx(950, abs=20)


def test_intervals_of_ratios_cover_as_often_as_they_say_and_lie_above_minus_1():
    """Compare by the ratio two skewed estimates with common blocks, whose own parts are skewed as well."""
    generator, covered, weights = np.random.default_rng(0), 0, block_weights(20)
    for _ in range(1000):
        common, one, other = generator.gamma(2, 0.5, (3, 20))
        a, b = 0.7 * common * one, common * other
        ends = relative_interval(float(a.mean()), weights @ a / 20, float(b.mean()), weights @ b / 20, 20)
        assert ends is None or ends[0] > -1
        covered += ends is not None and ends[0] <= -0.3 <= ends[1]
    assert covered == pytest.approx(950, abs=20)


def test_the_interval_of_a_ratio_is_that_of_the_paired_logarithms():
    generator = np.random.default_rng(0)
    common, own = np.exp(generator.normal(0, 0.3, 20_000)), np.exp(generator.normal(0, 0.1, 20_000))
    one, other = 2 * common * own, 4 * common
    low, high = relative_interval(one.mean(), one, other.mean(), other, 50)
    assert (1 + low) * (1 + high) == pytest.approx((one.mean() / other.mean()) ** 2)
    assert np.log((1 + high) / (1 + low)) == pytest.approx(2 * 2.01 * 0.1, rel=0.02), "what both share cancels"
    assert relative_interval(2.0, 2 * common, 0.0, common, 50) is None
    assert relative_interval(0.1, 2 * common, 4.0, 4 * common, 50) is None, "a recentred replicate is negative"


@pytest.mark.parametrize(
    ("ends", "relative_ends", "expected"),
    [
        (None, None, 0),
        ((0.1, 1.0), None, 1),
        ((-1.0, -0.1), None, -1),
        ((0.1, 1.0), (-0.1, 1.0), 0),
        ((-0.1, 1.0), (0.1, 1.0), 1),
        ([-1.0, 0.0], [-1.0, 0.0], 0),
    ],
)
def test_a_difference_is_judged_by_the_interval_of_the_ratio_if_there_is_one(ends, relative_ends, expected):
    assert direction(ends, relative_ends) == expected


@pytest.mark.parametrize("blocks", [1, 7, 50])
def test_each_round_of_images_goes_through_all_blocks_once(blocks):
    rounds = block_of(np.arange(20 * blocks), blocks).reshape(20, blocks)
    assert np.array_equal(np.sort(rounds, axis=1), np.tile(np.arange(blocks), (20, 1)))


def test_each_replicate_draws_as_many_blocks_as_there_are():
    weights = block_weights(50, 1000, seed=1)
    assert (weights.sum(axis=1) == 50).all()
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.05)
    assert np.array_equal(weights, block_weights(50, 1000, seed=1))
