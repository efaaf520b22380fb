"""The notation of numbers in text and tables.

- ``28.97 (15.4 … 54.6)``: a value with its 95 % interval
- ``+1.61 (−0.31 … +3.53)``: a difference with its interval
- ``−12 % (−19 … −4)``: a relative change with its interval in the same unit
- ``×3.8 (3.1 … 4.7)``: a relative change above +100 % as a factor
- ``0.8 ± 4.4``: a value with its standard error
"""

from __future__ import annotations

import math
import re

__all__ = ["Ends", "change", "difference", "interval", "number"]

Ends = tuple[float, float]
"""The ends of an interval."""


def number(value: float, spec: str) -> str:
    """Return a number in a format, as :func:`format` takes it, with the sign "−"."""
    return f"{value:{spec}}".replace("-", "−")


def interval(value: float, ends: Ends | None, spec: str, error: float | None = None) -> str:
    """Return a value with its interval if it has one, or else with its standard error if it has one.

    Both ends have as many decimals as the larger needs for three digits, and not more than the value. A value and its
    standard error have as many as that needs for two.
    """
    if ends is None and error is not None and error > 0:
        decimals = max(0, 1 - math.floor(math.log10(error)))
        return f"{number(value, f'.{decimals}f')} ± {error:.{decimals}f}"
    text = number(value, spec)
    if ends is None:
        return text
    fixed = re.search(r"\.(\d+)f$", spec)
    largest = max(map(abs, ends))
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0
    decimals = min(decimals, int(fixed[1]) if fixed else 6)
    low, high = (number(end, f"{'+' if '+' in spec else ''}.{decimals}f") for end in ends)
    return f"{text} ({low} … {high})"


def change(relative: float, ends: Ends | None = None, decimals: int = 1) -> str:
    """Return a relative change, such as 0.05 for +5 %, with its interval, if it has one; above +100 % as a factor."""

    def factor(value: float) -> str:
        return f"{1 + value:.0f}" if value >= 9 else f"{1 + value:.1f}"

    def percent(value: float) -> str:
        return number(100 * value, f"+.{decimals}f")

    text, show = (f"×{factor(relative)}", factor) if relative > 1 else (f"{percent(relative)} %", percent)
    return text if ends is None else f"{text} ({show(ends[0])} … {show(ends[1])})"


def difference(
    value: float,
    ends: Ends | None,
    spec: str,
    relative: float | None = None,
    relative_ends: Ends | None = None,
    decimals: int = 1,
) -> str:
    """Return a difference: as a relative change where that has an interval, else as it is.

    Args:
        value: The difference.
        ends: Its interval, or None.
        spec: The format of the number.
        relative: The relative change, or None.
        relative_ends: Its interval, or None.
        decimals: The decimals of a relative change in per cent.
    """
    if relative is not None and relative_ends is not None:
        return change(relative, relative_ends, decimals)
    return interval(value, ends, f"+{spec}")
