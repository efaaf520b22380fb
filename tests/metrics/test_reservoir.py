"""The sample is uniform, and the same however the images are divided."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdiff.metrics.reservoir import Reservoir


@given(n=st.integers(0, 120), limit=st.integers(1, 50), cuts=st.lists(st.integers(0, 120), max_size=6))
@settings(max_examples=60, deadline=None)
def test_reservoir_of_any_division_is_that_of_one_pass(n, limit, cuts):
    features = np.arange(n, dtype=np.float32)[:, None]
    whole = Reservoir(1, limit)
    whole.update(features, 0)
    parts = [Reservoir(1, limit), Reservoir(1, limit)]
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    for turn, (start, stop) in enumerate(itertools.pairwise(edges)):
        parts[turn % 2].update(features[start:stop], start)
    parts[0].merge_state(parts[1].state())
    assert np.array_equal(parts[0].features, whole.features)
    assert len(whole.features) == min(n, limit) == len(np.unique(whole.features))


def test_reservoir_is_uniform_and_so_are_its_prefixes():
    reservoir = Reservoir(1, 5000)
    for start in range(0, 50_000, 500):
        reservoir.update(np.arange(start, start + 500)[:, None], start)
    for prefix in (reservoir.features, reservoir.features[:1000]):
        histogram, _ = np.histogram(prefix, bins=10, range=(0, 50_000))
        assert (abs(histogram - len(prefix) / 10) < 5 * (len(prefix) / 10) ** 0.5).all()


def test_an_index_given_twice_is_noticed():
    reservoir = Reservoir(1, 100)
    reservoir.update(np.zeros((10, 1)), 0)
    reservoir.update(np.zeros((10, 1)), 9)
    with pytest.raises(ValueError, match="came twice"):
        _ = reservoir.features
