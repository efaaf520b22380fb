"""Numbers as the pages of studies show them."""

from __future__ import annotations

import pytest

from robustdiff.report.words import effect_row, filled, mean_over_seeds, percent, shown_interval
from robustdiff.study.analysis import Effect, Interval


@pytest.mark.parametrize(
    ("change", "shown"),
    [(-0.105, "−10.5%"), (1.32, "+132.0%"), (1.6, "×2.6"), (2.996, "×4.0"), (15.9, "×17"), (2000.0, "×2,001")],
)
def test_a_large_change_is_a_ratio(change, shown):
    assert percent(change) == shown


def test_the_ends_of_an_interval_are_shown_as_its_mean_is():
    assert shown_interval(Interval(2.8, -0.2, 3.7)) == "×3.8 (×0.80 … ×4.7)"
    assert shown_interval(Interval(0.6, -0.1, 1.8)) == "+60.0% (−10.0% … +180.0%)"


def test_a_negative_mean_has_a_minus_sign():
    assert mean_over_seeds([-0.5, -0.7], ".2f") == "−0.60 ± 0.14"


def test_the_row_of_an_effect_has_dashes_for_what_few_trainings_do_not_tell():
    assert effect_row("a vs b", "ddim", Effect({0: 0.0}), None) == ["a vs b", "ddim", "1", "+0.0%", "–", "–"]
    row = effect_row("a vs b", "ddim", Effect({0: 0.1, 1: 0.1, 2: 0.1}), 0.01)
    assert row == ["a vs b", "ddim", "3", "**+10.5%**", "+10.5% … +10.5%", "0.01"]


def test_rows_without_numbers_are_left_out():
    assert filled([["a", "–", "–"], ["b", "–", "1"]]) == [["b", "–", "1"]]
