"""The files of the watch (:mod:`robustdiff.training.watch`), and what a finished run says of it in words.

    watch.jsonl    a :class:`Line` for each measurement, in increasing order of updates
    start.json     :class:`Start`, what was measured of the starting checkpoint
    result.json    its fields ``best``, :class:`Best`, and ``signs``, a list of :class:`FiredSign`

A file may come from somebody else: everything in it is validated.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from robustdiff.errors import InputError, printable
from robustdiff.files import read_json_lines
from robustdiff.metrics.bootstrap import REPLICATES, direction
from robustdiff.metrics.metric import number_named
from robustdiff.notation import difference as shown_difference
from robustdiff.notation import number as shown_number
from robustdiff.recipe import Recipe

__all__ = [
    "LONGEST_LINE",
    "REMEDY",
    "Best",
    "FiredSign",
    "Line",
    "Record",
    "Sign",
    "Start",
    "WatchedCell",
    "dump",
    "read_lines",
    "summary",
]

LONGEST_LINE = 2**20

REMEDY = "remove it to resume without what it has"
"""Name the remedy for a damaged file of the watch, at the end of an error's message."""


class Record(BaseModel):
    """The base class of records, in which nothing is unknown, and no number is NaN or infinite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Ends = Annotated[tuple[float, float], Field(strict=False)]  # a list in JSON


class WatchedCell(Record):
    """The number of a model at one sampler and number of steps, with its difference to the starting checkpoint's.

    Attributes:
        metric: The key of the number, as in :class:`robustdiff.metrics.metric.Number`.
        ci, difference_ci: The 95 % intervals, or None without bootstrap replicates.
        difference: None without a starting checkpoint, and for itself.
        relative, relative_ci: The difference divided by the starting checkpoint's number, with its interval, or None
            for a number that is not compared by ratios, and in files of robustdiff 0.2.0 and before.
        guidance: The scale of classifier-free guidance; left out of files if it is None.
        replicates: The bootstrap replicates of the number, which are in ``start.json`` alone.
        blocks: The number of blocks that they resample, there alone too.
    """

    sampler: str
    steps: PositiveInt
    metric: str
    value: float
    ci: Ends | None = None
    difference: float | None = None
    difference_ci: Ends | None = None
    relative: float | None = None
    relative_ci: Ends | None = None
    guidance: float | None = None
    replicates: Annotated[list[float], Field(min_length=REPLICATES, max_length=REPLICATES)] | None = None
    blocks: Annotated[int, Field(ge=2)] | None = None

    @property
    def place(self) -> str:
        """Return the sampler and the scale of guidance, if there is one."""
        return self.sampler if self.guidance is None else f"{self.sampler}, guidance {self.guidance:g}"


class Sign(Record):
    """A sign that fired."""

    name: str
    message: str
    action: str


class Line(Record):
    """A line of ``watch.jsonl``.

    Attributes:
        step: The number of updates; 0 for the starting checkpoint.
        mean: The mean of the cells' values.
        best: Whether this mean is better than those of all lines before.
        seconds: The time that the measurement took.
        images: The number of images that were generated: those of all cells, and twice as many of the start.
        every: The number of updates between measurements.
        noise: The name of the images' noise, or None for that of robustdiff 0.2.0 and before.
    """

    step: NonNegativeInt
    cells: Annotated[list[WatchedCell], Field(min_length=1, max_length=10_000)]
    mean: float
    best: bool
    seconds: Annotated[float, Field(ge=0)]
    images: PositiveInt
    every: PositiveInt | None = None
    signs: list[Sign] = []
    noise: str | None = None


class Best(Record):
    """The model in ``best/``, measured on fresh noise, as in ``result.json``.

    Attributes:
        step: The number of updates; 0 for the starting checkpoint.
        start: Whether it is the starting checkpoint.
        mean: The mean of the cells' values.
        seed: The seed of the noise.
        noise: The name of the noise, as in a line.
        images: The number of images of all cells.
        difference, difference_ci, relative, relative_ci: Those of the mean, as in the cells.
    """

    step: NonNegativeInt
    start: bool
    mean: float
    seed: NonNegativeInt
    images: PositiveInt
    cells: Annotated[list[WatchedCell], Field(min_length=1, max_length=10_000)]
    difference: float | None = None
    difference_ci: Ends | None = None
    relative: float | None = None
    relative_ci: Ends | None = None
    noise: str | None = None


class FiredSign(Sign):
    """A sign that fired, and the update at which it did, as in ``result.json``."""

    step: NonNegativeInt


class Start(Record):
    """The contents of ``start.json``: the starting checkpoint's cells on the noise of the watch, and on fresh noise."""

    seconds: Annotated[float, Field(gt=0)]
    cells: list[WatchedCell]
    fresh: list[WatchedCell]
    noise: str | None = None


def dump(record: Record) -> dict[str, Any]:
    """Return a record as JSON values, without replicates, and without a scale of guidance where there is none."""
    values = record.model_dump(mode="json", exclude={"cells": {"__all__": {"replicates", "blocks"}}})
    for cell in values.get("cells", []):
        if cell["guidance"] is None:
            del cell["guidance"]
    return values


def read_lines(path: Path) -> list[Line]:
    """Return the lines of ``watch.jsonl``, without a last one that a kill left unfinished; none if there is no file.

    Raises:
        InputError: If a line is malformed, or the steps do not increase.
    """
    lines: list[Line] = []
    with suppress(FileNotFoundError):
        for _, line in read_json_lines(path, Line, REMEDY, LONGEST_LINE):
            if lines and line.step <= lines[-1].step:
                raise InputError(
                    f"{printable(path)} is damaged (step {line.step} comes after {lines[-1].step}): {REMEDY}"
                )
            lines.append(line)
    return lines


def _said(cell: Mapping[str, Any]) -> str:
    """Return a cell of ``result.json`` in words."""
    spec = number_named(cell["metric"]).format
    words = f"{cell['sampler']} at {cell['steps']} steps {shown_number(cell['value'], spec)}"
    if cell["difference"] is None:
        return words
    changed = shown_difference(
        cell["difference"], cell["difference_ci"], spec, cell.get("relative"), cell.get("relative_ci")
    )
    return f"{words}, {changed}"


def summary(recipe: Recipe, result: Mapping[str, Any]) -> list[str]:
    """Return what a finished run says of its watch, in lines."""
    best, signs = result.get("best"), result.get("signs") or []
    if best is None:
        if recipe.model.source is None:
            return []
        return [
            "this fine-tuning was not watched, so nothing says that it is better than what it started from: "
            "--set watch.every=auto measures it while it trains"
        ]
    lines = []
    if signs and signs[-1]["action"] == "stop":
        lines.append(f"stopped at update {signs[-1]['step']} by the sign {signs[-1]['name']}: {signs[-1]['message']}")
    elif signs:
        names = dict.fromkeys(sign["name"] for sign in signs)
        lines.append(f"signs that fired: {', '.join(names)} (watch.jsonl has them)")
    if best["start"]:
        lines.append("no checkpoint of this run was better than the one it started from: best/ holds that one")
        return lines
    number = number_named(best["cells"][0]["metric"])
    title = number.title if best["difference"] is None else f"{number.title} and its change vs the start"
    lines.append(
        f"best/ holds the model of update {best['step']}; {title}, on fresh noise: "
        f"{'; '.join(map(_said, best['cells']))}"
    )
    sign = direction(best["difference_ci"], best.get("relative_ci"))
    if best["difference_ci"] is not None and sign == 0:
        lines.append("on fresh noise it does not differ significantly from the one it started from")
    elif sign == (1 if number.better == "lower" else -1):
        lines.append("on fresh noise it is worse than the one it started from: use that one")
    return lines
