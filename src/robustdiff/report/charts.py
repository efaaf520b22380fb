"""Geometry of line charts that the HTML page draws as inline SVG.

A chart is computed here and written by the page's template, which escapes all text. A chart needs no script: its lines
have markers of different shapes, and a table has its numbers. The page's script shows the numbers of the column under
the pointer, or of the one that the arrow keys lead to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Chart", "Column", "Drawn", "Mark", "Point", "Series", "draw"]

WIDTH, HEIGHT = 480, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 466, 16, 262
_COLOURS = 7
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",  # a circle
    "M-3.7-3.7H3.7V3.7H-3.7Z",
    "M0-4.8L4.6 3.4H-4.6Z",
    "M0-5L5 0L0 5L-5 0Z",
    "M0 4.8L4.6-3.4H-4.6Z",
)
_DASHES = ("", "7 3", "2 3")
_MOST_MARKERS = 24  # a line with more points has none, and a band in place of bars
_APART = 5.0


@dataclass(frozen=True)
class Point:
    """A value at x, with the ends of its interval if it has one."""

    x: float
    y: float
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A line, by its label."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a short label."""

    x: float
    label: str
    kind: str = "sign"


@dataclass(frozen=True)
class Drawn:
    """A line as it is drawn: the number of its colour, its dashes, and paths in the chart's coordinates."""

    name: str
    colour: int
    dashes: str
    shape: str
    path: str
    band: str
    bars: str
    markers: list[tuple[float, float]]


@dataclass(frozen=True)
class Column:
    """The numbers at one x, and the strip of the chart that shows them."""

    left: float
    width: float
    x: float
    heading: str
    values: list[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """A chart for the template."""

    title: str
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Drawn]
    columns: list[Column]
    marks: list[tuple[float, str, str]]
    zero: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def _with_interval(value: float, ends: tuple[float, float] | None, show: Callable[[float], str]) -> str:
    """Return a value with its interval in brackets, if it has one."""
    return show(value) if ends is None else f"{show(value)} ({show(ends[0])} … {show(ends[1])})"


def _rounded(value: float) -> float:
    return round(value, 1)


def _linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten from low to high, or round numbers if there are fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(powers) > 7:
        return [10.0**power for power in powers if low <= 10.0**power <= high]
    found = [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= m * 10.0**power <= high]
    return found if len(found) > 2 else [tick for tick in _linear_ticks(low, high, 4) if tick > 0]


class _Axis:
    """A scale from values to coordinates, linear or logarithmic."""

    def __init__(self, values: Iterable[float], start: float, stop: float, log: bool, room: float) -> None:
        values = list(values)
        low, high = min(values), max(values)
        self.log = log and low > 0
        if self.log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # a single value
            half = 0.5 if self.log or not low else abs(low) * 0.1
            low, high = low - half, high + half
        gap = (high - low) * room
        self.low, self.high, self.start, self.stop = low - gap, high + gap, start, stop

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return _rounded(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start))

    def ticks(self) -> list[float]:
        return _log_ticks(10**self.low, 10**self.high) if self.log else _linear_ticks(self.low, self.high)


def _path(points: Iterable[tuple[float, float]]) -> str:
    text = "L".join(f"{x:g} {y:g}" for x, y in points)
    return f"M{text}" if text else ""


def _short(value: float) -> str:
    """Return the label of a tick."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def draw(
    title: str,
    x_title: str,
    y_title: str,
    series: Sequence[Series],
    *,
    show: Callable[[float], str],
    log_x: bool = False,
    log_y: bool = False,
    zero_label: str | None = None,
    marks: Sequence[Mark] = (),
    only_steps: bool = False,
) -> Chart:
    """Return a chart of lines. Series without points are kept in the legend's order and take a colour.

    Args:
        title: The title.
        x_title: The title of the horizontal axis, the unit of x in the columns.
        y_title: The title of the vertical axis.
        series: The lines; one of them has a point.
        show: The function that writes a value.
        log_x: Whether the horizontal axis is logarithmic, if all x are positive.
        log_y: The same for the vertical axis.
        zero_label: The label of the tick at y = 0, which has a line; None for no line.
        marks: Vertical lines.
        only_steps: Whether ticks are at the x of points alone.
    """
    points = [point for one in series for point in one.points]
    ends = [end for point in points if point.ends is not None for end in point.ends]
    xs = sorted({point.x for point in points})
    y_values = [*(point.y for point in points), *ends, *([0.0] if zero_label is not None else [])]
    if log_y and any(end <= 0 for end in ends) and all(point.y > 0 for point in points):
        least = min(point.y for point in points) / 2
        y_values = [max(value, least) for value in y_values]  # an interval that reaches 0 has no end on the axis
    x = _Axis([*xs, *(mark.x for mark in marks)], _LEFT, _RIGHT, log_x, 0.04)
    y = _Axis(y_values, _BOTTOM, _TOP, log_y, 0.06)
    floor = 10**y.low if y.log else -math.inf

    drawn = []
    apart = _APART if ends and 1 < len(series) <= len(_SHAPES) else 0.0
    for i, one in enumerate(series):
        own = sorted(one.points, key=lambda point: point.x)
        aside = apart * (i - (len(series) - 1) / 2)  # bars of several lines stand side by side
        at = [(_rounded(x(point.x) + aside), y(point.y)) for point in own]
        few = len(own) <= _MOST_MARKERS
        with_ends = [
            (px, y(max(p.ends[0], floor)), y(p.ends[1]))
            for (px, _), p in zip(at, own, strict=True)
            if p.ends is not None
        ]
        bars = "".join(f"M{px:g} {low:g}V{high:g}" for px, low, high in with_ends) if few else ""
        there_and_back = [(px, low) for px, low, _ in with_ends], [(px, high) for px, _, high in reversed(with_ends)]
        band = "" if few else _path(there_and_back[0] + there_and_back[1])
        shape, dashes = _SHAPES[i % len(_SHAPES)], _DASHES[i // _COLOURS % len(_DASHES)]
        drawn.append(Drawn(one.name, i % _COLOURS, dashes, shape, _path(at), band, bars, at if few else []))

    centres = [x(value) for value in xs]
    edges = [float(_LEFT), *((a + b) / 2 for a, b in itertools.pairwise(centres)), float(_RIGHT)]
    columns = []
    for k, value in enumerate(xs):
        found = [(one.name, point) for one in series for point in one.points if point.x == value]
        texts = [(name, _with_interval(point.y, point.ends, show)) for name, point in found]
        width = _rounded(edges[k + 1] - edges[k])
        columns.append(Column(_rounded(edges[k]), width, centres[k], f"{value:g} {x_title}", texts))

    x_values = xs if only_steps else x.ticks()
    x_ticks: list[tuple[float, str]] = []
    for value in x_values:
        if not x_ticks or x(value) - x_ticks[-1][0] > 26:  # labels do not overlap
            x_ticks.append((x(value), f"{value:g}" if abs(value) < 1e6 else f"{value:.2g}"))
    return Chart(
        title,
        x_title,
        y_title,
        x_ticks,
        [(y(value), zero_label if zero_label and not value else _short(value)) for value in y.ticks()],
        drawn,
        columns,
        [(x(mark.x), mark.label, mark.kind) for mark in marks],
        y(0.0) if zero_label is not None else None,
    )
