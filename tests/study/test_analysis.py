"""The statistics of a study, against independent computations."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from robustdiff.errors import RunError
from robustdiff.study.analysis import (
    BLOCKS,
    Effect,
    _effect,
    _excess,
    adjusted_effects,
    agreeing_digits,
    compare,
    effect,
    holm,
    rank_correlation,
    sensitivity,
    spread,
)
from robustdiff.study.store import Results


def test_an_effect_has_the_interval_and_p_value_of_the_paired_t_test():
    rng = np.random.default_rng(1)
    one, other = rng.normal(2, 0.1, 5), rng.normal(1.9, 0.1, 5)
    found = Effect(dict(enumerate(one - other)))
    expected = scipy.stats.ttest_rel(one, other)
    ends = expected.confidence_interval()
    assert (found.interval.low, found.interval.high) == pytest.approx(np.expm1([ends.low, ends.high]))
    assert found.p == pytest.approx(expected.pvalue)
    assert 1 + found.mean == pytest.approx(scipy.stats.gmean(np.exp(one - other)))
    assert found.changes == pytest.approx(dict(enumerate(np.exp(one - other) - 1)))


def test_the_interval_with_a_shared_error_by_hand():
    """s²/n = 0.01/3 with 2 degrees of freedom and v = 0.02 with 19, together 20.4615, whose t is 2.082951."""
    found = Effect({0: 0.1, 1: 0.2, 2: 0.3}, 0.02, blocks=20).interval
    assert (found.mean, found.low, found.high) == pytest.approx((0.221403, -0.111460, 0.678963), abs=1e-6)


def test_what_trainings_share_is_the_mean_covariance_of_their_replicates_and_not_negative():
    measure = SimpleNamespace(image_noise="shared")
    results = SimpleNamespace(study=SimpleNamespace(measure=measure), cells={"a cell": {"blocks": {}}})
    one = np.array([0.1, 0.2, -0.2])  # the value, and replicates of variance 0.08
    found = [_effect(results, {0: one, 1: sign * one}).shared for sign in (1, -1)]
    assert found == pytest.approx([0.08, 0])


def results_of(**adversaries):
    """Return results on seeds 0 and 1, with an FID that falls by a factor 2 a method; plain was chosen on 0."""
    methods, cells = {}, {}
    for i, (name, adversary) in enumerate(adversaries.items()):
        methods[name] = SimpleNamespace(seeds=[0, 1], chosen_on=[0] if name == "plain" else [], baseline=None)
        for seed in methods[name].seeds:
            fid = (1 + seed) / 2**i
            cells[name, seed, "ddim", 10] = {
                "numbers": {"fid": fid}, "replicates": [fid, fid], "blocks": {}, "recipe": {"adversary": adversary}
            }  # fmt: skip
    measure = SimpleNamespace(image_noise="own")
    study = SimpleNamespace(methods=methods, baseline="plain", measure=measure)
    return Results(study, cells=cells)


def test_seeds_on_which_the_baseline_was_chosen_are_left_out():
    results = results_of(plain={}, free={})
    assert effect(results, "free", "ddim", 10).logs == {1: pytest.approx(-math.log(2))}


def test_sensitivity_is_of_free_training_in_l2_without_a_radius():
    free = {"name": "free", "norm": "l2", "radius": None, "step_size": 0.1, "steps": 3}
    others = {
        "ball": {"radius": {"value": 1.0}},
        "linf": {"norm": "linf"},
        "pgd": {"name": "pgd"},
        "more": {"steps": 5},
    }
    named = {name: {**free, "step_size": 0.2, **changed} for name, changed in others.items()}
    found = sensitivity(results_of(plain={"name": "none"}, free=free, **named), "ddim", 10)
    assert found.changes == {(0.1, 3): pytest.approx(-0.5), (0.2, 5): pytest.approx(2**-5 - 1)}


def test_the_spread_is_by_the_passes_of_the_recipe():
    """Also where a training says nothing of its batches, or ended within one."""
    free = {"name": "free", "steps": 3}
    results = results_of(
        plain={"name": "none"}, free=free, pgd={**free, "name": "pgd"}, random={**free, "name": "random"}
    )
    for (method, seed, *_), record in results.cells.items():
        record["training"] = {"steps": 5, "batches": [None, {"plain": 5, "pgd": 5}.get(method, 2)][seed]}
    deviation = math.log(2) / math.sqrt(2)  # of ln 1 and ln 2
    assert spread(results, "ddim", 10) == {1: (pytest.approx(deviation), 2), 3: (pytest.approx(deviation), 2)}


@pytest.mark.parametrize(("floor", "excess"), [(0.5, -2.0), (-2.0, 0.5), (None, 1.5)])
def test_the_excess_of_a_mismatch_is_over_its_floor(floor, excess):
    assert _excess({"mean": {"x": {"value": -1.5, "floor": floor}}}, "x") == excess


def test_there_is_no_interval_below_three_trainings():
    assert (Effect({0: 0.1, 1: 0.2}).interval, Effect({0: 0.1, 1: 0.2}).p) == (None, None)
    assert Effect({0: 0.1, 1: 0.2, 2: 0.1}).interval is not None
    assert Effect({0: 0.0, 1: 0.0, 2: 0.0}).p == 1
    assert Effect({0: 0.1, 1: 0.1, 2: 0.1}).p < 1e-9


def test_intervals_cover_the_mean_where_trainings_share_the_noise_of_their_images():
    """With a shared error of known variance, 95 % of intervals hold 0, and a good part less of those without it."""
    rng = np.random.default_rng(0)
    n, trainings, shared = 4000, 4, 0.03
    own = rng.normal(0, 0.04, (n, trainings))
    common = rng.normal(0, shared, n)
    estimated = shared**2 * rng.chisquare(BLOCKS - 1, n) / (BLOCKS - 1)
    covered = {True: 0, False: 0}
    for e, c, v in zip(own, common, estimated, strict=True):
        for counts in covered:
            ends = Effect(dict(enumerate(e + c)), v if counts else 0.0).interval
            covered[counts] += ends.low < 0 < ends.high
    assert covered[True] / n == pytest.approx(0.95, abs=0.01)
    assert covered[False] / n < 0.87


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("trainings", [3, 4])
def test_p_values_hold_in_the_tail_where_trainings_share_the_noise_of_their_images(trainings, ratio):
    """At the level that Holm's method asks of the smallest of 40 p-values, with v at a ratio to the trainings' s²/n."""
    rng = np.random.default_rng(trainings)
    n, level = 20_000, 0.05 / 40
    shared = ratio / trainings
    logs = rng.normal(0, 1, (n, trainings)) + rng.normal(0, shared**0.5, (n, 1))
    estimated = shared * rng.chisquare(BLOCKS - 1, n) / (BLOCKS - 1)
    # The trainings that are significant by Satterthwaite's degrees of freedom alone are looked at, which saves time.
    own = logs.var(axis=1, ddof=1) / trainings
    freedom = (own + estimated) ** 2 / (own**2 / (trainings - 1) + estimated**2 / (BLOCKS - 1))
    usual = 2 * scipy.stats.t.sf(np.abs(logs.mean(1)) / np.sqrt(own + estimated), freedom)
    kept = usual < level
    p = [Effect(dict(enumerate(e)), v).p for e, v in zip(logs[kept], estimated[kept], strict=True)]
    assert sum(one < level for one in p) <= scipy.stats.binom.ppf(0.9999, n, level)
    assert all(one >= other for one, other in zip(p, usual[kept], strict=True))
    if 0.1 <= ratio <= 1:
        assert kept.sum() > scipy.stats.binom.ppf(0.9999, n, level), "which is why they are not taken"


def test_p_values_are_adjusted_as_by_holm():
    # From R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []


def test_adjusted_effects_are_those_of_least_squares_with_seeds_as_blocks():
    rng = np.random.default_rng(2)
    seeds = {"plain": [0, 1, 2, 3], "free": [0, 1, 2], "random": [1, 2, 3]}
    block = dict(enumerate(rng.normal(0, 0.3, 4)))
    groups = {}
    for name, own in seeds.items():
        x = rng.uniform(50, 60, len(own))
        y = [
            0.1 * grey + block[s] + rng.normal(0, 0.02) - 0.3 * (name == "free") for s, grey in zip(own, x, strict=True)
        ]
        groups[name] = dict(zip(own, zip(x, y, strict=True), strict=True))
    found = adjusted_effects(groups, [("free", "plain"), ("random", "plain"), ("other", "plain")])
    # The same model with plain and seed 0 as the reference levels.
    rows = [(name, s, *point) for name, own in groups.items() for s, point in own.items()]
    design = np.array(
        [[1, name == "free", name == "random", s == 1, s == 2, s == 3, x] for name, s, x, _ in rows], float
    )
    y = np.array([row[3] for row in rows])
    values, (squares,), *_ = np.linalg.lstsq(design, y, rcond=None)
    covariance = squares / (len(y) - 7) * np.linalg.inv(design.T @ design)
    for column, method in (1, "free"), (2, "random"):
        half = scipy.stats.t.ppf(0.975, len(y) - 7) * np.sqrt(covariance[column, column])
        own = found[method, "plain"]
        expected = np.expm1(values[column] + np.array([0, -half, half]))
        assert (own.mean, own.low, own.high) == pytest.approx(expected)
    assert ("other", "plain") not in found
    assert adjusted_effects({"plain": {0: (1.0, 1.0), 1: (2.0, 2.0)}}, []) == {}, "no degree of freedom"
    apart = {**groups, "apart": {seed + 9: point for seed, point in groups["plain"].items()}}
    assert adjusted_effects(apart, [("apart", "plain")]) == {}, "no common seed"
    assert adjusted_effects(apart, [("free", "plain")])["free", "plain"].mean == pytest.approx(
        found["free", "plain"].mean, abs=0.1
    )
    assert adjusted_effects({}, []) == {}


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
