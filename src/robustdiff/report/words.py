"""Words, numbers and tables of a study's page, as Markdown in which text from files is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from robustdiff.errors import printable
from robustdiff.notation import change, change_ends, number
from robustdiff.report.figures import Figure, save_figure
from robustdiff.study.analysis import Effect
from robustdiff.study.store import Results

__all__ = [
    "EFFECT_COLUMNS",
    "NOTHING",
    "SIGNIFICANT",
    "code_span",
    "columns",
    "count",
    "effect_row",
    "escaped",
    "filled",
    "mean_over_seeds",
    "saved_figure",
    "shown_correlation",
    "shown_effect",
    "table",
    "tested_effect",
    "threads",
    "titles",
    "versus",
]

TITLES = {"kid": "KID"}
SIGNIFICANT = 0.05
"""The adjusted p-value below which an effect is significant."""
NOTHING = "–"
EFFECT_COLUMNS = ("comparison", "sampler", "trainings", "change", "95 % interval", "p")


def escaped(words: str) -> str:
    """Return text from a file in one line, with Markdown, HTML and separators of table cells escaped."""
    # Some renderers, among them that of the documentation, show a backslash before these as it is.
    text = re.sub(r"[<&~$]", lambda found: f"&#{ord(found[0])};", printable(" ".join(words.split())))
    return re.sub(r"([\\`*_{}\[\]>|]|(?<!&)#)", r"\\\1", text)


def code_span(word: str) -> str:
    """Return a word from a file as a code span, delimited by more backticks than it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", word)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{printable(word)}{space}{fence}"


def versus(pair: Sequence[str]) -> str:
    """Return the name of a comparison: a method, and what it is compared with."""
    return f"{pair[0]} vs {pair[1]}"


def count(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def threads(n: int) -> str:
    """Return a number of threads in words."""
    return "one thread" if n == 1 else f"{n} threads"


def _each(effect: Effect) -> str:
    """Return the change of each seed."""
    return ", ".join(map(change, effect.changes.values()))


def shown_effect(effect: Effect | None) -> str:
    """Return an effect with its interval and the number of trainings, or the change of each if there are too few."""
    if effect is None:
        return NOTHING
    return _each(effect) if effect.interval is None else f"{change(effect.mean, effect.interval.ends)}, n = {effect.n}"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def tested_effect(effect: Effect | None, adjusted: float | None) -> str:
    """Return an effect with its interval and adjusted p-value, in bold below 0.05; without them as ``shown_effect``."""
    if effect is None or effect.interval is None or adjusted is None:
        return shown_effect(effect)
    p = _probability(adjusted)
    shown = p if p.startswith("<") else f"= {p}"
    return f"{_marked(effect, adjusted)} ({change_ends(effect.mean, effect.interval.ends)}), p {shown}"


def _marked(effect: Effect, adjusted: float | None) -> str:
    """Return the mean of an effect, in bold if it is significant."""
    mark = "**" if adjusted is not None and adjusted < SIGNIFICANT else ""
    return f"{mark}{change(effect.mean)}{mark}"


def effect_row(name: str, sampler: str, effect: Effect, adjusted: float | None) -> list[str]:
    """Return the row of an effect in a table of ``EFFECT_COLUMNS``, with the change of each of too few trainings."""
    if effect.interval is None:
        return [name, sampler, str(effect.n), _each(effect), NOTHING, NOTHING]
    p = NOTHING if adjusted is None else _probability(adjusted)
    return [name, sampler, str(effect.n), _marked(effect, adjusted), change_ends(effect.mean, effect.interval.ends), p]


def shown_correlation(value: float | None) -> str:
    return NOTHING if value is None else number(value, "+.2f")


def titles(measures: Iterable[str]) -> list[str]:
    return [TITLES.get(name, name) for name in measures]


def mean_over_seeds(numbers: Sequence[float], form: str = ".2f") -> str:
    """Return the mean over seeds with the standard deviation."""
    if not numbers:
        return NOTHING
    deviation = f" ± {np.std(numbers, ddof=1):{form}}" if len(numbers) > 1 else ""
    return number(float(np.mean(numbers)), form) + deviation


def columns(results: Results) -> list[tuple[str, list[str], list[tuple[str, int]]]]:
    """Return the tables of numbers by sampler and steps: one for each number of steps, or one for a single sampler.

    Returns:
        The heading of the first column, those of the others, and the sampler and steps of each of these.
    """
    if len(results.samplers) == 1:
        (sampler,) = results.samplers
        return [(f"{sampler}, steps", [str(n) for n in results.steps], [(sampler, n) for n in results.steps])]
    return [(count(n), results.samplers, [(sampler, n) for sampler in results.samplers]) for n in results.steps]


def filled(rows: Iterable[list[str]]) -> list[list[str]]:
    """Return the rows with numbers."""
    return [row for row in rows if any(cell != NOTHING for cell in row[1:])]


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def saved_figure(folder: Path, name: str, made: Figure, caption: str) -> str:
    """Write a figure into the page's folder, and return the Markdown that shows it."""
    save_figure(made, folder / f"{name}.png")
    return f"![{caption}]({quote(folder.name)}/{name}.png)"
