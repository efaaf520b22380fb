"""Reading of the files of runs, and of the folders of `evaluate` and `mismatch`, for the report.

A run's folder may come from somebody else, so that every file is validated. A run need not be finished: what a killed
process left of the last line of a file is not read, and files that are not there are None or empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from robustdiff.errors import InputError, printable
from robustdiff.evaluation.sources import name_sources
from robustdiff.files import read_record
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.training.run_files import (
    DataRecord,
    Metrics,
    Result,
    read_data,
    read_metrics,
    read_result,
    training_seconds,
)
from robustdiff.training.watch_files import FiredSign, Line, read_lines

__all__ = [
    "Evaluated",
    "EvaluatedCell",
    "MeasuredPath",
    "Mismatches",
    "RunFiles",
    "read_evaluation",
    "read_mismatch",
    "read_runs",
]

_BYTES = 2**28

Number = Annotated[float, Field(strict=True, ge=-1e300, le=1e300)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Words = Annotated[str, Field(strict=True, max_length=8192)]
_Ends = tuple[Number, Number]


class _Record(BaseModel):
    """The contents of a file that the report shows; further fields are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Estimate(_Record):
    value: Number
    low: Number
    high: Number
    floor: Number | None


class MeasuredPath(_Record):
    """The mismatch of one checkpoint with one sampler: the mean over steps of each measure."""

    checkpoint: Words
    sampler: Words
    steps: Whole
    n: Whole
    mean: dict[Words, _Estimate]


class Mismatches(_Record):
    """A ``mismatch.json``."""

    data: Words
    seed: Whole
    paths: Annotated[tuple[MeasuredPath, ...], Field(min_length=1, max_length=10_000)]


class EvaluatedCell(_Record):
    """A cell of `evaluate`. In the file, each of ``numbers`` and ``intervals`` is a field of its own."""

    checkpoint: Words
    sampler: Words
    steps: Whole | None
    n: Whole
    seconds: Annotated[Number, Field(ge=0)]
    guidance: Number | None = None
    numbers: dict[Words, Number | None]
    intervals: dict[Words, _Ends]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {name: value for name, value in values.items() if name in cls.model_fields}
        known = {*cls.model_fields, "blocks"}  # of the bootstrap, which the page does not need
        others = {name: value for name, value in values.items() if name not in known}
        intervals = {name.removesuffix("_ci"): value for name, value in others.items() if name.endswith("_ci")}
        numbers = {name: value for name, value in others.items() if not name.endswith("_ci")}
        return {**own, "numbers": numbers, "intervals": intervals}


class Evaluated(_Record):
    """The ``result.json`` of `evaluate`."""

    data: Words | None
    features: Words | None
    seed: Whole
    cells: Annotated[tuple[EvaluatedCell, ...], Field(min_length=1, max_length=100_000)]


_Contents = TypeVar("_Contents")


def _if_there(reader: Callable[..., _Contents], *arguments: Any) -> _Contents | None:
    """Return the contents of a file, or None if there is none."""
    try:
        return reader(*arguments)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class RunFiles:
    """A run: its configuration, what was logged and watched, and its result if it is finished.

    Attributes:
        name: A name that no other run of the report has.
        source: The folder as it was given.
    """

    name: str
    source: str
    recipe: Recipe
    data: DataRecord | None
    metrics: list[Metrics]
    watch: list[Line]
    result: Result | None
    mismatch: Mismatches | None

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return Path(self.source)

    @property
    def start(self) -> str | None:
        """Return the checkpoint that the training began with, or None for a new network."""
        source: str | None = self.recipe.model.source
        return source

    @property
    def updates(self) -> int:
        """Return the number of updates that are logged."""
        if self.result is not None:
            return self.result.steps
        return self.metrics[-1].step if self.metrics else 0

    @cached_property
    def signs(self) -> list[FiredSign]:
        """Return the signs that fired, with their updates."""
        if self.result is not None and self.result.signs is not None:
            return self.result.signs
        return [FiredSign(step=line.step, **sign.model_dump()) for line in self.watch for sign in line.signs]

    @property
    def best_step(self) -> int | None:
        """Return the update of the kept checkpoint, or None if nothing was watched."""
        if self.result is not None and self.result.best is not None:
            return self.result.best.step
        return next((line.step for line in reversed(self.watch) if line.best), None)

    @property
    def training_seconds(self) -> float:
        """Return the time of the logged updates in seconds."""
        return training_seconds(self.metrics, self.recipe.batch_size)


def _read_run(name: str, source: str) -> RunFiles:
    folder = Path(source)
    if not (folder / "recipe.yaml").is_file():
        raise InputError(
            f"{printable(source)} is no run, since it has no recipe.yaml: give folders of runs, or a study file that "
            "ends in .yaml"
        )
    measured = Mismatches, "measure it again"
    places = (folder / "mismatch.json", folder / "mismatch" / "mismatch.json")
    return RunFiles(
        name,
        source,
        load_recipe(str(folder / "recipe.yaml")),
        _if_there(read_data, folder / "data.json"),
        _if_there(read_metrics, folder / "metrics.jsonl") or [],
        read_lines(folder / "watch.jsonl"),
        _if_there(read_result, folder / "result.json"),
        next((found for path in places if (found := _if_there(read_record, path, *measured)) is not None), None),
    )


def read_runs(sources: list[str]) -> list[RunFiles]:
    """Read the folders of runs, finished or not.

    Raises:
        InputError: If a folder is given twice or is no run, or a file in it is malformed.
    """
    return [_read_run(name or ".", source) for name, source in name_sources(sources).items()]


def read_evaluation(folder: Path) -> Evaluated | None:
    """Read the ``result.json`` that `evaluate` wrote into a folder, or return None if there is none.

    Raises:
        InputError: If the file is malformed.
    """
    return _if_there(read_record, folder / "result.json", Evaluated, "run robustdiff evaluate again")


def read_mismatch(folder: Path) -> Mismatches | None:
    """Read the ``mismatch.json`` that `mismatch` wrote into a folder, or return None if there is none.

    Raises:
        InputError: If the file is malformed.
    """
    return _if_there(read_record, folder / "mismatch.json", Mismatches, "run robustdiff mismatch again")
