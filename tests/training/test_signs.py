"""The signs: each fires at its threshold, and not below."""

from __future__ import annotations

import pytest

from robustdiff.recipe import SignsConfig
from robustdiff.training.signs import SIGNS, History


def cell(steps=50, value=12.0, difference=2.0, ends=(1.0, 3.0), metric="fid", sampler="ddim"):
    return {
        "sampler": sampler,
        "steps": steps,
        "metric": metric,
        "value": value,
        "difference": difference,
        "difference_ci": None if ends is None else list(ends),
    }


def history(*cells, metrics=(), ascents=0.0, before=()):
    return History([*before, {"step": 20, "cells": list(cells)}], metrics, ascents)


def test_every_threshold_has_its_rule():
    assert {name.replace("-", "_") for name in SIGNS} | {"action"} == set(SignsConfig.model_fields)


@pytest.mark.parametrize(
    ("cells", "fires"),
    [
        ([cell()], True),
        ([cell(value=100.0)], False),  # 2 % above the start
        ([cell(ends=(-0.1, 4.0))], False),
        ([cell(ends=None)], False),
        ([{**cell(), "relative_ci": [-0.02, 0.5]}], False),  # the interval of the ratio decides
        ([{**cell(ends=(-0.1, 4.0)), "relative_ci": [0.02, 0.5]}], True),
        ([cell(difference=-2.0, ends=(-3.0, -1.0))], False),
        ([cell(steps=5), cell(difference=0.0, ends=(-1.0, 1.0))], False),  # at few steps alone
        ([cell(difference=0.0, ends=(-1.0, 1.0)), cell(sampler="es")], True),
        ([cell(metric="clip_score")], False),
        ([{**cell(), "difference": None, "difference_ci": None}], False),
    ],
)
def test_long_sampling(cells, fires):
    message = SIGNS["long-sampling"](history(*cells), 0.05)
    assert (message is not None) == fires
    if fires:
        assert "50 steps is 12, 20 % above the start's 10" in message


@pytest.mark.parametrize(
    ("found", "fires"),
    [
        (cell(metric="clip_score", value=30.0, difference=-0.4, ends=(-0.6, -0.2)), True),
        (cell(metric="clip_score", value=30.0, difference=-0.4, ends=(-0.9, 0.1)), False),
        (cell(metric="clip_score", value=30.0, difference=0.4, ends=(0.2, 0.6)), False),
        (cell(difference=-0.4, ends=(-0.6, -0.2)), False),
    ],
)
def test_the_clip_score(found, fires):
    assert (SIGNS["clip-score"](history(found), 0.0) is not None) == fires
    assert SIGNS["clip-score"](history(found), 0.5) is None


def test_at_radius_is_a_mean_since_the_last_measurement():
    metrics = [{"step": 10, "at_radius": 0.0}, {"step": 15, "at_radius": 0.9}, {"step": 20, "at_radius": 1.0}]
    found = history(cell(), metrics=metrics, before=[{"step": 10, "cells": []}])
    assert "95 %" in SIGNS["at-radius"](found, 0.95)
    assert SIGNS["at-radius"](found, 0.96) is None
    assert SIGNS["at-radius"](history(cell(), metrics=metrics), 0.95) is None
    assert SIGNS["at-radius"](history(cell(), metrics=[{"step": 20}]), 0.0) is None


@pytest.mark.parametrize(
    ("name", "counter", "each"), [("skipped-ascents", "skipped", 8), ("skipped-updates", "skipped_updates", 1)]
)
def test_counters_are_those_since_the_last_measurement(name, counter, each):
    metrics = [{"step": 10, counter: 100}, {"step": 20, counter: 100 + 4 * each}]
    before = [{"step": 10, "cells": []}]
    found = history(cell(), metrics=metrics, ascents=8.0, before=before)
    assert "40 %" in SIGNS[name](found, 0.3)
    assert SIGNS[name](found, 0.4) is None
    assert SIGNS[name](history(cell(), metrics=metrics[:1], ascents=8.0, before=before), 0.0) is None


def test_skipped_ascents_of_an_adversary_without_any():
    assert SIGNS["skipped-ascents"](history(cell(), metrics=[{"step": 20, "skipped": 0}]), 0.0) is None


def test_the_ratio_of_passes_is_compared_with_that_of_the_beginning():
    metrics = [{"step": 10, "pass_ratio": 1.2}, {"step": 20, "pass_ratio": 2.4}]
    before = [{"step": 0, "cells": []}, {"step": 10, "cells": []}]
    found = history(cell(), metrics=metrics, before=before)
    assert "2.4 times that of the first, up from 1.2" in SIGNS["pass-ratio"](found, 1.9)
    assert SIGNS["pass-ratio"](found, 2.0) is None
    assert SIGNS["pass-ratio"](history(cell(), metrics=metrics, before=before[:1]), 1.0) is None
