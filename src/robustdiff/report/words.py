"""Words, numbers and tables of a study's page, as Markdown in which text from files is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from robustdiff.errors import printable
from robustdiff.report.figures import Figure, save_figure
from robustdiff.study.analysis import Effect, Interval

__all__ = [
    "SIGNIFICANT",
    "code_span",
    "escaped",
    "mean_over_seeds",
    "percent",
    "saved_figure",
    "shown_correlation",
    "shown_effect",
    "shown_ends",
    "shown_interval",
    "table",
    "tested_effect",
    "titles",
]

TITLES = {"kid": "KID"}
SIGNIFICANT = 0.05
"""The adjusted p-value below which an effect is significant."""


def escaped(words: str) -> str:
    """Return text from a file in one line, with Markdown, HTML and separators of table cells escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", printable(" ".join(words.split())))


def code_span(word: str) -> str:
    """Return a word from a file as a code span, delimited by more backticks than it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", word)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{printable(word)}{space}{fence}"


def percent(value: float) -> str:
    return f"{value:+.1%}".replace("-", "−")


def shown_ends(interval: Interval) -> str:
    return f"{percent(interval.low)} … {percent(interval.high)}"


def shown_interval(interval: Interval) -> str:
    return f"{percent(interval.mean)} ({shown_ends(interval)})"


def _each(effect: Effect) -> str:
    """Return the change of each seed."""
    return ", ".join(percent(change) for change in effect.changes.values())


def shown_effect(effect: Effect | None) -> str:
    """Return an effect with its interval and the number of trainings, or the change of each if there are too few."""
    if effect is None:
        return "–"
    return _each(effect) if effect.interval is None else f"{shown_interval(effect.interval)}, n = {effect.n}"


def _probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def tested_effect(effect: Effect | None, adjusted: float | None) -> str:
    """Return an effect with its interval and adjusted p-value, in bold below 0.05; without them as ``shown_effect``."""
    if effect is None or effect.interval is None or adjusted is None:
        return shown_effect(effect)
    mark = "**" if adjusted < SIGNIFICANT else ""
    return f"{mark}{percent(effect.mean)}{mark} ({shown_ends(effect.interval)}), {_probability(adjusted)}"


def shown_correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def titles(measures: Iterable[str]) -> list[str]:
    return [TITLES.get(name, name) for name in measures]


def mean_over_seeds(numbers: Sequence[float], shown: str = ".2f") -> str:
    """Return the mean over seeds with the standard deviation."""
    if not numbers:
        return "–"
    deviation = f" ± {np.std(numbers, ddof=1):{shown}}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):{shown}}{deviation}"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def saved_figure(folder: Path, name: str, made: Figure, caption: str) -> str:
    """Write a figure into the page's folder, and return the Markdown that shows it."""
    save_figure(made, folder / f"{name}.png")
    return f"![{caption}]({quote(folder.name)}/{name}.png)"
