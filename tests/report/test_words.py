"""Numbers as the pages of studies show them."""

from __future__ import annotations

from robustdiff.report.words import effect_row, filled, mean_over_seeds
from robustdiff.study.analysis import Effect


def test_a_negative_mean_has_a_minus_sign():
    assert mean_over_seeds([-0.5, -0.7], ".2f") == "−0.60 ± 0.14"


def test_the_row_of_an_effect_has_dashes_for_what_few_trainings_do_not_tell():
    assert effect_row("a vs b", "ddim", Effect({0: 0.0}), None) == ["a vs b", "ddim", "1", "+0.0%", "–", "–"]
    row = effect_row("a vs b", "ddim", Effect({0: 0.1, 1: 0.1, 2: 0.1}), 0.01)
    assert row == ["a vs b", "ddim", "3", "**+10.5%**", "+10.5% … +10.5%", "0.01"]


def test_rows_without_numbers_are_left_out():
    assert filled([["a", "–", "–"], ["b", "–", "1"]]) == [["b", "–", "1"]]
