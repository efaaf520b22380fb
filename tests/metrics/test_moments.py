"""Moments against numpy's, however the images are divided."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdiff.errors import InputError
from robustdiff.metrics.moments import Moments


def moments_of(features, blocks=50):
    moments = Moments(features.shape[1], blocks)
    moments.update(features, 0)
    return moments


@given(
    n=st.integers(2, 60),
    blocks=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    processes=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_moments_of_any_division_are_those_of_one_pass(n, blocks, cuts, processes, seed):
    features = np.random.default_rng(seed).normal(3, 1, (n, 4))
    whole = moments_of(features, blocks)
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    parts = [Moments(4, blocks) for _ in range(processes)]
    for turn, (start, stop) in enumerate(itertools.pairwise(edges)):
        parts[turn % processes].update(features[start:stop], start)
    merged = Moments(4, blocks)
    for part in parts:
        merged.merge_state(part.state())
    assert np.array_equal(merged.count, whole.count)
    for key, value in merged.state().items():
        assert np.allclose(value, whole.state()[key], rtol=1e-12, atol=1e-12)
    assert np.allclose(merged.mean, features.mean(axis=0))
    assert np.allclose(merged.cov, np.cov(features, rowvar=False), atol=1e-10)


def test_features_of_a_block_are_added_many_at_a_time():
    features = np.random.default_rng(0).normal(size=(3000, 2))
    moments = Moments(2, 10)
    for start in range(0, 3000, 60):
        moments.update(features[start : start + 60], start)
        assert (moments._outer[:, 0, 0] != 0).any() == (start + 60 >= 2560), "each block has 6 of 60"
    assert np.allclose(moments.outer.sum(axis=0), features.T @ features)
    assert moments.count.tolist() == [300] * 10


@pytest.mark.parametrize("blocks", [1, 7, 50])
def test_blocks_are_balanced(blocks):
    moments = moments_of(np.zeros((blocks * 6, 1)), blocks)
    assert moments.count.tolist() == [6] * blocks


@pytest.mark.parametrize("classes", [10, 50, 100])
def test_labels_that_go_round_meet_all_blocks(classes):
    """If block k were the images i ≡ k (mod 50), it would hold labels i mod 10 of one class only."""
    n = 10_000
    labels = np.eye(classes)[np.arange(n) % classes]
    shares = moments_of(labels).total / (n / 50 / classes)  # 1 where a class has its share of a block
    assert abs(shares - 1).mean() < 0.55
    assert (shares == 0).mean() < 0.2


@pytest.mark.parametrize(("dim", "blocks"), [(3, 5), (2, 4)])
def test_moments_of_other_shapes_are_not_merged(dim, blocks):
    moments = Moments(3, 4)
    with pytest.raises(ValueError, match="cannot merge"):
        moments.merge_state(Moments(dim, blocks).state())
    assert moments.n == 0


def test_too_few_images():
    moments = Moments(3, 4)
    with pytest.raises(InputError, match="mean of nothing"):
        _ = moments.mean
    moments.update(np.zeros((1, 3)), 0)
    with pytest.raises(InputError, match="covariance needs 2"):
        _ = moments.cov
