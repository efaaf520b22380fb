"""The files of a run besides its checkpoints and those of the watch (:mod:`robustdiff.training.watch_files`).

    data.json        :class:`DataRecord`, the data that the run began with
    metrics.jsonl    a :class:`Metrics` for each line, in increasing order of updates
    result.json      :class:`Result`, once the run is finished

A file may come from somebody else: everything in it is validated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from robustdiff.errors import InputError, printable
from robustdiff.files import read_json_lines, read_record
from robustdiff.notebook import html_table
from robustdiff.training.watch_files import Best, FiredSign, Record

__all__ = [
    "DataRecord",
    "Metrics",
    "Result",
    "RunResult",
    "metrics_lines",
    "read_data",
    "read_metrics",
    "read_result",
    "training_seconds",
]

_LONGEST_LINE = 2**16

Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Words = Annotated[str, Field(max_length=8192)]


class DataRecord(Record):
    """The contents of ``data.json``.

    Attributes:
        shape: (C, H, W) of an image.
        classes: The number of classes, or None without classes.
        labels: The sha256 of the labels, or None without.
        captions: The sha256 of the captions, or None without.
        fingerprint: The sha256 of the images and what goes with them.
    """

    name: Words
    images: Whole
    shape: Annotated[tuple[Whole, Whole, Whole], Field(strict=False)]  # a list in JSON
    classes: Whole | None
    labels: Words | None
    captions: Words | None
    fingerprint: Words


class Metrics(Record):
    """A line of ``metrics.jsonl``. Its further fields, such as the parts of a loss, are numbers.

    Attributes:
        step: The number of updates.
        loss: The mean loss of the updates since the line before.
        delta_norm: The mean ‖δ‖ after the last pass over a batch, over the same updates.
        images_per_second: The number of images that went through forward and backward, by the time.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | Number]

    step: Whole
    loss: Number
    delta_norm: Number
    images_per_second: Annotated[Number, Field(gt=0)]


class Result(Record):
    """The contents of ``result.json``.

    Attributes:
        steps: The number of updates.
        batches: The number of batches that were drawn.
        backward_passes: The number of backward passes, those of the adversary included.
        loss, delta_norm: Those of the last line of ``metrics.jsonl``.
        skipped: The number of ascents of single samples without a gradient that is finite and not zero.
        skipped_updates: The number of updates in fp16 whose gradient overflowed.
        parameters: The number of trained parameters.
        data: The name of the data.
        images: The number of its images.
        processes: The number of processes.
        best, signs: What the watch found; runs that were not watched have neither.
    """

    steps: Whole
    batches: Whole
    batch_size: Whole
    backward_passes: Whole
    loss: Number | None
    delta_norm: Number | None
    skipped: Whole
    skipped_updates: Whole
    parameters: Whole
    data: Words
    images: Whole
    processes: Whole
    device: Words
    torch: Words
    best: Best | None = None
    signs: list[FiredSign] | None = None

    @model_validator(mode="after")
    def _watched(self) -> Result:
        if (self.best is None) != (self.signs is None):
            raise ValueError("best and signs are there together, or neither is")
        return self

    def as_dict(self) -> RunResult:
        """Return the contents of the file."""
        return RunResult(self.model_dump(mode="json", exclude_unset=True))


class RunResult(dict[str, Any]):
    """The contents of the ``result.json`` of a run, which notebooks show as tables."""

    def _repr_html_(self) -> str:
        best, signs = self.get("best"), self.get("signs")
        rows = [[name, value] for name, value in self.items() if name not in ("best", "signs")]
        text = html_table("result of the training", ["", "value"], rows)
        if best is not None:
            whose = "the start" if best["start"] else f"update {best['step']}"
            columns = ["sampler", "steps", "metric", "value", "ci", "difference", "difference_ci"]
            cells = [[cell.get(name) for name in columns] for cell in best["cells"]]
            text += html_table(f"best checkpoint: {whose}, on fresh noise", columns, cells)
        if signs:
            columns = ["step", "name", "message", "action"]
            text += html_table("signs that fired", columns, [[sign[name] for name in columns] for sign in signs])
        return text


def metrics_lines(path: Path) -> Iterator[tuple[bytes, Metrics]]:
    """Yield the lines of ``metrics.jsonl`` as they are and parsed, without a last one that a kill left unfinished.

    Raises:
        InputError: If a line is malformed, or the updates do not increase.
        OSError: If the file cannot be read.
    """
    remedy, before = "remove the line", -1
    for line, values in read_json_lines(path, Metrics, remedy, _LONGEST_LINE):
        if values.step <= before:
            raise InputError(f"{printable(path)} is damaged (step {values.step} comes after {before}): {remedy}")
        before = values.step
        yield line, values


def read_metrics(path: Path) -> list[Metrics]:
    """Return the lines of ``metrics.jsonl``, without a last one that a kill left unfinished.

    Raises:
        InputError: If a line is malformed, or the updates do not increase.
        OSError: If the file cannot be read.
    """
    return [values for _, values in metrics_lines(path)]


def training_seconds(lines: Sequence[Metrics], batch_size: int) -> float:
    """Return the time in seconds of the updates that the lines of ``metrics.jsonl`` are of."""
    steps = [0, *(line.step for line in lines)]
    return sum(
        (line.step - before) * batch_size / line.images_per_second for before, line in zip(steps, lines, strict=False)
    )


def read_data(path: Path) -> DataRecord:
    """Read the ``data.json`` of a run.

    Raises:
        InputError: If the file is malformed.
        OSError: If the file cannot be read.
    """
    return read_record(path, DataRecord, "restore it, or remove it to resume without a check of the data")


def read_result(path: Path) -> Result:
    """Read the ``result.json`` of a run.

    Raises:
        InputError: If the file is malformed.
        OSError: If the file cannot be read.
    """
    return read_record(path, Result, "remove it, and resume the run")
