"""Reading of the files of runs, and of the folders of `evaluate` and `mismatch`, for the report.

A run's folder may come from somebody else, so that every file is validated. A run need not be finished: what a killed
process left of the last line of a file is not read, and files that are not there are None or empty.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustdiff.errors import InputError, printable
from robustdiff.evaluation.sources import name_sources
from robustdiff.files import open_regular, read_json
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.study.schema import first_mistake
from robustdiff.training.watch_files import Best, FiredSign, Line, read_lines

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


class _Result(_Record):
    """The ``result.json`` of a finished run."""

    steps: Whole
    batches: Whole
    batch_size: Whole
    backward_passes: Whole
    loss: Number | None
    delta_norm: Number | None
    skipped: Whole
    skipped_updates: Whole
    parameters: Whole
    processes: Whole
    device: Words
    torch: Words
    best: Best | None = None
    signs: list[FiredSign] | None = None


class _Data(_Record):
    """The ``data.json`` of a run."""

    name: Words
    images: Whole
    shape: tuple[Whole, Whole, Whole]
    classes: Whole | None
    captions: Words | None = None


class _Metrics(_Record):
    """A line of ``metrics.jsonl``."""

    step: Whole
    loss: Number
    delta_norm: Number
    images_per_second: Annotated[Number, Field(gt=0)]


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


_Kind = TypeVar("_Kind", bound=_Record)


def _read(path: Path, kind: type[_Kind], remedy: str) -> _Kind | None:
    """Return the contents of a file, or None if there is none."""
    try:
        return kind.model_validate(read_json(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InputError(f"{printable(path)}: {first_mistake(error)}: {remedy}") from None


def _read_metrics(path: Path) -> list[_Metrics]:
    """Return the whole lines of ``metrics.jsonl``, whose updates ascend, or nothing if there is none."""
    found: list[_Metrics] = []
    try:
        with open_regular(path) as file:
            contents = file.read(_BYTES + 1)
    except FileNotFoundError:
        return found
    if len(contents) > _BYTES:
        raise InputError(f"{printable(path)} has more than {_BYTES >> 20} MiB, which no file of its kind has")
    for number, line in enumerate(contents.split(b"\n")[:-1], 1):  # what follows the last break was torn by a kill
        try:
            found.append(_Metrics.model_validate(json.loads(line)))
        except (ValueError, RecursionError) as error:
            reason = first_mistake(error) if isinstance(error, ValidationError) else printable(str(error))
            raise InputError(f"{printable(path)}, line {number}, is damaged ({reason}): remove the line") from None
    steps = [line.step for line in found]
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise InputError(f"{printable(path)} is damaged (its updates do not ascend): remove the lines out of order")
    return found


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
    data: _Data | None
    metrics: list[_Metrics]
    watch: list[Line]
    result: _Result | None
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
        steps = [0, *(line.step for line in self.metrics)]
        size = self.recipe.batch_size
        return sum(
            (line.step - before) * size / line.images_per_second
            for before, line in zip(steps, self.metrics, strict=False)
        )


def _read_run(name: str, source: str) -> RunFiles:
    folder = Path(source)
    if not (folder / "recipe.yaml").is_file():
        raise InputError(
            f"{printable(source)} is no run, since it has no recipe.yaml: give folders of runs, or a study file that "
            "ends in .yaml"
        )
    remedy = "remove the file, and resume the run"
    places = (folder / "mismatch.json", folder / "mismatch" / "mismatch.json")
    return RunFiles(
        name,
        source,
        load_recipe(str(folder / "recipe.yaml")),
        _read(folder / "data.json", _Data, remedy),
        _read_metrics(folder / "metrics.jsonl"),
        read_lines(folder / "watch.jsonl"),
        _read(folder / "result.json", _Result, remedy),
        next((found for path in places if (found := _read(path, Mismatches, "measure it again")) is not None), None),
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
    return _read(folder / "result.json", Evaluated, "run robustdiff evaluate again")


def read_mismatch(folder: Path) -> Mismatches | None:
    """Read the ``mismatch.json`` that `mismatch` wrote into a folder, or return None if there is none.

    Raises:
        InputError: If the file is malformed.
    """
    return _read(folder / "mismatch.json", Mismatches, "run robustdiff mismatch again")
