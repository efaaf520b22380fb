"""The statistics of a study, against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from robustdiff.errors import RunError
from robustdiff.study.analysis import (
    Change,
    adjusted_differences,
    agreeing_digits,
    change_of_logs,
    compare,
    rank_correlation,
    student_interval,
)


def test_a_change_is_the_geometric_mean_over_seeds_with_the_quantiles_of_the_replicates():
    rng = np.random.default_rng(0)
    logs = rng.normal(0.1, 0.2, (3, 201))
    logs[:, 1:] += logs[:, :1] - logs[:, 1:].mean(axis=1, keepdims=True)  # centred, as of cells
    found = change_of_logs(list(logs))
    assert 1 + found.mean == pytest.approx(scipy.stats.gmean(np.exp(logs[:, 0])))
    expected = np.exp(np.quantile(logs[:, 1:].mean(axis=0), [0.025, 0.975])) - 1
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.seeds == pytest.approx(np.exp(logs[:, 0]) - 1)
    assert change_of_logs([]) is None


def test_the_interval_over_trainings_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(1)
    one, other = rng.normal(2, 0.1, 5), rng.normal(1.9, 0.1, 5)
    found = student_interval(one - other)
    expected = scipy.stats.ttest_rel(one, other).confidence_interval()
    assert (found.low, found.high) == pytest.approx(np.expm1([expected.low, expected.high]))
    assert found.sign == 0 or found.low * found.high > 0


@pytest.mark.parametrize(
    ("low", "high", "seeds", "direction"),
    [
        (-0.3, -0.1, (-0.2, -0.1), -1),
        (-0.3, -0.1, (-0.4, 0.1), 0),
        (-0.3, -0.1, (-0.4, 0.0), 0),
        (0.1, 0.3, (0.2,), 1),
        (-0.1, 0.3, (0.2,), 0),
    ],
)
def test_a_direction_needs_the_interval_and_all_seeds(low, high, seeds, direction):
    assert Change((low + high) / 2, low, high, seeds).direction == direction


def test_adjusted_differences_are_those_of_least_squares_with_a_column_for_each_group():
    rng = np.random.default_rng(2)
    sizes = {"plain": 3, "free": 2, "random": 1}
    x = {name: rng.uniform(50, 60, n) for name, n in sizes.items()}
    groups = {
        name: np.stack([own, 0.1 * own - 4 + rng.normal(0, 0.02, len(own)) - 0.3 * (name == "free")], axis=1)
        for name, own in x.items()
    }
    found = adjusted_differences(groups, [("free", "plain"), ("random", "plain"), ("other", "plain")])
    design = np.array([[*(name == other for other in sizes), grey] for name, own in x.items() for grey in own], float)
    logs = np.concatenate([points[:, 1] for points in groups.values()])
    values, (squares,), *_ = np.linalg.lstsq(design, logs, rcond=None)
    covariance = squares / (len(logs) - 4) * np.linalg.inv(design.T @ design)
    for method, contrast in ("free", [-1, 1, 0, 0]), ("random", [-1, 0, 1, 0]):
        half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(contrast @ covariance @ contrast)
        own = found[method, "plain"]
        expected = np.expm1(contrast @ values + np.array([0, -half, half]))
        assert (own.mean, own.low, own.high) == pytest.approx(expected)
    assert ("other", "plain") not in found
    assert adjusted_differences({"plain": groups["plain"]}, []) == {}, "one degree of freedom"


def test_ranks_are_correlated_as_by_hand():
    assert rank_correlation([(1, 10), (2, 30), (3, 20), (4, 50)]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation([(1, 1), (2, 2)]) is None


@pytest.mark.parametrize(
    ("one", "other", "digits"),
    [
        (2.37323, 2.37324, 5),
        (2.37323, 2.37323, math.inf),
        (-0.5, -0.5, math.inf),
        (0.0, 0.0, math.inf),
        (2.0, 2.001, 3),
        (1.99996, 2.00001, 5),
        (0.0123456, 0.0123455, 5),
        (5.525, 5.52503, 5),
        (1.0, -1.0, 0),
        (0.0, 1e-9, 0),
        (1e11, 1e11 + 1, 11),
    ],
)
def test_digits_to_which_numbers_agree(one, other, digits):
    assert agreeing_digits(one, other) == agreeing_digits(other, one) == digits


def record(**changes):
    return {
        "fid": 2.37323,
        "kid": 0.1,
        "precision": 0.5,
        "recall": 0.5,
        "replicates": [2.0, 2.1],
        "weights": "a",
    } | changes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "the same to the last digit"),
        ({"fid": 2.37324}, "the same to 5 digits"),
        ({"replicates": [2.0, 2.10001]}, "the same to 5 digits"),
        ({"weights": "b"}, "the same to the last digit, from weights that differ"),
    ],
)
def test_a_cell_made_again_is_the_same_to_four_digits(changes, text):
    assert compare(record(), record(**changes)) == text


@pytest.mark.parametrize("changes", [{"fid": 2.38}, {"kid": 0.1005}, {"recall": 0.501}, {"replicates": [2.0, 2.11]}])
def test_a_cell_that_agrees_to_fewer_digits_is_another(changes):
    with pytest.raises(RunError, match=r"agree to [23] significant digits"):
        compare(record(), record(**changes))
