"""The notation of numbers in text and tables.

- ``28.97 (15.4 … 54.6)``: a value with its 95 % interval
- ``+1.61 (−0.31 … +3.53)``: a difference with its interval
- ``−12.3% (−18.7% … −5.4%)``: a relative change with its interval
- ``×3.8 (×0.80 … ×4.7)``: a relative change above +150% as a ratio, and so are the ends of its interval
- ``0.8 ± 4.4``: a value with its standard error
"""

from __future__ import annotations

import math
import re

__all__ = ["Ends", "change", "change_ends", "difference", "interval", "number"]

Ends = tuple[float, float]
"""The ends of an interval."""

_LARGE = 1.5
"""The relative change above which the ratio is shown, since a rise of 1,591% is harder to read than a factor of 17."""


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


def change(relative: float, ends: Ends | None = None) -> str:
    """Return a relative change, such as +5.0% for 0.05, or the ratio if it is large, with its interval if given."""
    text = _ratio(relative) if relative > _LARGE else _percent(relative)
    return text if ends is None else f"{text} ({change_ends(relative, ends)})"


def change_ends(relative: float, ends: Ends) -> str:
    """Return the ends of the interval of a relative change, as ratios if the change is shown as one."""
    shown = _ratio if relative > _LARGE else _percent
    return f"{shown(ends[0])} … {shown(ends[1])}"


def _percent(relative: float) -> str:
    return number(relative, "+.1%")


def _ratio(relative: float) -> str:
    ratio = 1 + relative
    return f"×{ratio:,.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}"


def difference(
    value: float,
    ends: Ends | None,
    spec: str,
    relative: float | None = None,
    relative_ends: Ends | None = None,
) -> str:
    """Return a difference: as a relative change where that has an interval, else as it is.

    Args:
        value: The difference.
        ends: Its interval, or None.
        spec: The format of the number.
        relative: The relative change, or None.
        relative_ends: Its interval, or None.
    """
    if relative is not None and relative_ends is not None:
        return change(relative, relative_ends)
    return interval(value, ends, f"+{spec}")
