"""Numbers, changes and intervals as text."""

from __future__ import annotations

import pytest

from robustdiff.notation import change, difference, interval, number


def test_a_minus_is_no_hyphen():
    assert number(-0.5, "+.2f") == "−0.50"


@pytest.mark.parametrize(
    ("value", "ends", "spec", "error", "text"),
    [
        (28.97, (15.37, 54.59), ".2f", None, "28.97 (15.4 … 54.6)"),
        (2.774, (1.528, 5.03), ".2f", None, "2.77 (1.53 … 5.03)"),
        (0.05, (0.031, 0.072), ".2f", None, "0.05 (0.03 … 0.07)"),
        (131.25, (99.9, 1150.1), ".2f", None, "131.25 (100 … 1150)"),
        (-0.45, (-2.2, 1.3), "+.2f", None, "−0.45 (−2.20 … +1.30)"),
        (0.0, (0.0, 0.0), ".2f", None, "0.00 (0 … 0)"),
        (5.496, None, ".4g", 2.83, "5.5 ± 2.8"),
        (-0.00512, None, ".4g", 0.00021, "−0.00512 ± 0.00021"),
        (0.25, None, ".4g", 0.0, "0.25"),
        (0.25, None, ".4g", None, "0.25"),
    ],
)
def test_a_value_has_its_interval_or_its_error_with_as_many_digits_as_are_known(value, ends, spec, error, text):
    assert interval(value, ends, spec, error) == text


@pytest.mark.parametrize(
    ("relative", "ends", "text"),
    [
        (-0.105, None, "−10.5%"),
        (1.32, None, "+132.0%"),
        (1.6, None, "×2.6"),
        (2.996, None, "×4.0"),
        (15.9, None, "×17"),
        (2000.0, None, "×2,001"),
        (-0.125, (-0.19, 0.04), "−12.5% (−19.0% … +4.0%)"),
        (0.6, (-0.1, 1.8), "+60.0% (−10.0% … +180.0%)"),
        (2.8, (-0.2, 3.7), "×3.8 (×0.80 … ×4.7)"),
    ],
)
def test_a_change_is_in_per_cent_and_a_large_one_a_ratio(relative, ends, text):
    assert change(relative, ends) == text


def test_a_difference_is_a_ratio_where_that_has_an_interval():
    assert difference(1.5, (-1, 4), ".2f", 0.05, (-0.03, 0.14)) == "+5.0% (−3.0% … +14.0%)"
    assert difference(1.5, (-1, 4), ".2f", 0.05) == "+1.50 (−1.00 … +4.00)"
    assert difference(1.5, None, ".2f") == "+1.50"
