"""Precision and recall against brute force."""

import numpy as np
import pytest

from robustdiff.errors import InputError
from robustdiff.metrics.precision_recall import precision_recall


def brute_force(generated, real, k):
    def covered(points, centres):
        hits = 0
        radii = [sorted(np.linalg.norm(c - o) for o in centres)[k] for c in centres]
        for p in points:
            hits += any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
        return hits / len(points)

    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize(("n", "m", "k", "chunk"), [(40, 50, 3, 7), (30, 30, 1, 1000), (60, 20, 5, 60)])
def test_precision_recall_equals_brute_force(n, m, k, chunk):
    points = np.random.default_rng(0).normal(size=(n + m, 3))
    x, y = points[:n], points[n:] + 0.5
    found = precision_recall(x, y, k, chunk)
    assert found == pytest.approx(brute_force(x, y, k))
    assert precision_recall(x + 1e8, y + 1e8, k, chunk) == found
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_precision_and_recall_of_a_collapsed_and_of_a_foreign_set():
    real = np.random.default_rng(1).normal(size=(300, 4))
    collapsed = real[:1] + 1e-3 * np.random.default_rng(0).normal(size=(300, 4))
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1
    assert recall < 0.05
    assert precision_recall(real + 1e3, real) == (0, 0)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(np.zeros((6, 2)), np.zeros((6, 2))) == (1, 1), "a ball has its surface"


def test_precision_of_too_few():
    with pytest.raises(InputError, match="more than 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
