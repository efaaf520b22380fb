"""The geometry of charts: where points, bars and ticks stand."""

from __future__ import annotations

import re

import pytest

from robustdiff.report.charts import HEIGHT, WIDTH, Mark, Point, Series, draw


def show(value: float) -> str:
    return f"{value:g}"


def test_points_stand_in_proportion_and_inside():
    chart = draw("t", "updates", "y", [Series("a", [Point(0, 1), Point(10, 3), Point(20, 2)])], show=show)
    (x0, y0), (x1, y1), (x2, y2) = chart.lines[0].markers
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.11), "y grows upwards"
    assert chart.left < x0 < x2 < chart.right
    assert chart.top < y1 < y0 < chart.bottom
    assert [label for _, label in chart.x_ticks] == ["0", "5", "10", "15", "20"]
    assert chart.columns[1].heading == "10 updates"
    assert chart.columns[1].values == [("a", "3")]
    assert sum(column.width for column in chart.columns) == pytest.approx(chart.right - chart.left, abs=0.3)


def test_a_logarithmic_axis_has_equal_ratios_and_the_steps_as_ticks():
    points = [Point(5, 4, (2, 8)), Point(10, 8), Point(20, 16)]
    chart = draw("t", "steps", "y", [Series("a", points)], show=show, log_x=True, log_y=True, only_steps=True)
    (x0, y0), (x1, y1), (x2, y2) = chart.lines[0].markers
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert [label for _, label in chart.x_ticks] == ["5", "10", "20"]
    low, high = map(float, re.fullmatch(rf"M{x0:g} (.*)V(.*)", chart.lines[0].bars).groups())
    assert low - y0 == pytest.approx(y0 - high, abs=0.11), "half and twice are equally far"
    assert high == pytest.approx(y1, abs=0.11)
    assert chart.columns[0].values == [("a", "4 (2 … 8)")]


def test_an_interval_that_reaches_below_zero_ends_at_the_edge_of_a_logarithmic_axis():
    points = [Point(5, 4, (-1, 8)), Point(10, 8, (7, 9))]
    chart = draw("t", "steps", "y", [Series("a", points)], show=show, log_x=True, log_y=True)
    assert chart.columns[0].values == [("a", "4 (-1 … 8)")]
    numbers = [float(number) for number in re.findall(r"[\d.]+", chart.lines[0].bars)]
    assert all(0 <= number <= WIDTH for number in numbers)


@pytest.mark.parametrize("y", [0.0, 5.0, -3.0, 1e-9, 1e9])
@pytest.mark.parametrize("log", [True, False])
def test_a_single_point_has_a_chart(y, log):
    chart = draw("t", "x", "y", [Series("a", [Point(0, y)])], show=show, log_x=log, log_y=log, marks=[Mark(0, "best")])
    ((x, height),) = chart.lines[0].markers
    assert chart.left <= x <= chart.right
    assert chart.top <= height <= chart.bottom
    assert chart.y_ticks


def test_lines_differ_in_shape_or_dashes_as_well_as_in_colour():
    chart = draw("t", "x", "y", [Series(str(i), [Point(1, i), Point(2, i)]) for i in range(20)], show=show)
    looks = [(line.colour, line.shape, line.dashes) for line in chart.lines]
    assert len(set(looks)) == 20


def test_bars_of_a_few_lines_stand_side_by_side():
    series = [Series(name, [Point(1, 1, (0, 2)), Point(2, 2, (1, 3))]) for name in "abc"]
    chart = draw("t", "x", "y", series, show=show)
    xs = [line.markers[0][0] for line in chart.lines]
    assert len(set(xs)) == 3
    assert xs[1] == chart.columns[0].x


def test_a_long_line_has_a_band_in_place_of_bars():
    chart = draw("t", "x", "y", [Series("a", [Point(i, i, (i - 1, i + 1)) for i in range(50)])], show=show)
    assert (chart.lines[0].bars, chart.lines[0].markers) == ("", [])
    assert chart.lines[0].band.count("L") == 99
    assert chart.height == HEIGHT
