r"""The grid: checkpoint × sampler × number of function evaluations (NFE).

Every cell is made from the same random numbers: image i of each has the same x_T and step noise
(:mod:`robustdiff.evaluation.generate`). A number with bootstrap replicates has an interval, and each pair of
checkpoints has, at equal sampler and NFE, an interval of its difference, from replicates that resample the same images
of both. Common random numbers make that interval narrower than the two intervals suggest.

Images that are there already, in a folder or a file, are measured in the same way and give one cell, without sampler
and steps. Nothing pairs them with the images of another cell, so they have no differences.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import TypeAdapter
from torch import Tensor

from robustdiff.data import ImageDataset
from robustdiff.evaluation.generate import Generator, share_of
from robustdiff.metrics.bootstrap import Array, interval
from robustdiff.metrics.metric import MetricCollection
from robustdiff.progress import SILENT, Progress

__all__ = ["FILE", "Cell", "Difference", "Grid", "differences", "evaluate_cell", "evaluate_grid", "evaluate_images"]

FILE = "file"
"""The sampler of a cell whose images were there already."""


@dataclass(frozen=True)
class Cell:
    """One checkpoint under one sampler, or the images of one folder or file.

    Attributes:
        checkpoint: Its name.
        sampler: The sampler; :data:`FILE` for images that were there already.
        steps: Network evaluations for one image; None for images that were there already.
        n: Images.
        values: The numbers of the metrics by name, and the standard error of NAME as ``NAME_se``. None is a number that
            is not known, as KID is where the reference has no features.
        intervals: The 95 % intervals of some of them.
        replicates: The bootstrap replicates, (R,), of those numbers. They belong one to one to those of any other cell
            with as many images.
        seconds: The time that making and measuring the images took.
    """

    checkpoint: str
    sampler: str
    steps: int | None
    n: int
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    replicates: dict[str, Any] = field(repr=False, compare=False)
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return the cell as ``result.json`` holds it, each interval as ``NAME_ci``, and without replicates."""
        record: dict[str, Any] = {key: getattr(self, key) for key in ("checkpoint", "sampler", "steps", "n")}
        for name, value in self.values.items():
            record[name] = value
            if name in self.intervals:
                record[f"{name}_ci"] = list(self.intervals[name])
        return {**record, "seconds": self.seconds}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], replicates: dict[str, Array]) -> Cell:
        """Return the cell of a record.

        Raises:
            ValueError: If it is none.
        """
        head = ("checkpoint", "sampler", "steps", "n", "seconds")
        numbers = {key: record[key] for key in record if key not in head}
        intervals = {key.removesuffix("_ci"): numbers.pop(key) for key in list(numbers) if key.endswith("_ci")}
        fields = {key: record[key] for key in record if key in head}
        return TypeAdapter(cls).validate_python(
            {**fields, "values": numbers, "intervals": intervals, "replicates": replicates}
        )


@dataclass(frozen=True)
class Difference:
    """A number of one checkpoint minus that of a baseline, at equal sampler, steps and random numbers.

    Attributes:
        value: The difference, with its 95 % ``interval``.
        relative: The difference over the baseline's number; None where that is not positive.
    """

    checkpoint: str
    baseline: str
    sampler: str
    steps: int | None
    number: str
    value: float
    interval: tuple[float, float]
    relative: float | None

    def record(self) -> dict[str, Any]:
        """Return the difference as ``result.json`` holds it, under the keys of a cell's record, with ``relative``."""
        pair = {"checkpoint": self.checkpoint, "baseline": self.baseline, "sampler": self.sampler, "steps": self.steps}
        return {**pair, self.number: self.value, f"{self.number}_ci": list(self.interval), "relative": self.relative}


@dataclass(frozen=True)
class Grid:
    """The cells, the differences of all pairs, and the first images of each cell, uint8 (k, C, H, W)."""

    cells: list[Cell]
    differences: list[Difference]
    samples: dict[tuple[str, str, int], Tensor]


def evaluate_cell(
    name: str,
    generator: Generator,
    num: int,
    metrics: MetricCollection,
    accelerator: Accelerator,
    keep: int = 16,
    progress: Progress = SILENT,
) -> tuple[Cell, Tensor]:
    """Make the images of one cell and measure them.

    Arguments:
        name: The checkpoint's name.
        generator: The source of the images; its ``steps`` are a number.
        num: Images.
        metrics: The metrics, which begin a new set of images.
        accelerator: Each of its processes makes its share of the images.
        keep: The number of the first images that are returned, uint8 (k, C, H, W).
        progress: Told of the images, over all processes.

    Raises:
        InputError: If images do not suit a metric.
        RunError: If a number is not finite.
    """
    sampler, steps = generator.sampler, int(generator.steps)
    progress.begin(f"{name} · {sampler} {steps}", num)
    made = generator.images(share_of(num, accelerator))
    batches = ((batch, images, generator.labels(batch)) for batch, images in made)
    return _measure(batches, name, sampler, steps, num, metrics, accelerator, keep, progress)


def evaluate_images(
    name: str,
    dataset: ImageDataset,
    num: int,
    metrics: MetricCollection,
    accelerator: Accelerator,
    batch_size: int = 128,
    progress: Progress = SILENT,
) -> Cell:
    """Measure images that are there already. Other arguments and errors are those of :func:`evaluate_cell`.

    Arguments:
        name: Their name.
        dataset: The images; their labels are the condition that metrics are given.
        num: The number of them, from the first.
        batch_size: Images at a time.

    Raises:
        InputError: If images cannot be read.
    """

    def batches() -> Iterator[tuple[range, Tensor, Any]]:
        share = share_of(num, accelerator)
        for start in range(share.start, share.stop, batch_size):
            batch = range(start, min(start + batch_size, share.stop))
            images, labels = dataset.__getitems__(batch)
            yield batch, images, labels

    progress.begin(name, num)
    return _measure(batches(), name, FILE, None, num, metrics, accelerator, 0, progress)[0]


class _Within:
    """The progress of a cell within that of the grid, in network evaluations."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps, self.note = progress, steps, ""

    def begin(self, description: str, total: float) -> None:
        self.note = description

    def advance(self, amount: float, note: str = "") -> None:
        self.progress.advance(amount * self.steps, self.note)


def _measure(
    batches: Iterable[tuple[range, Tensor, Any]],
    name: str,
    sampler: str,
    steps: int | None,
    num: int,
    metrics: MetricCollection,
    accelerator: Accelerator,
    keep: int,
    progress: Progress,
) -> tuple[Cell, Tensor]:
    """Measure this process's share of the images, (indices, images, condition) by batches, with those of the others."""
    start = time.perf_counter()
    metrics.reset()
    first: list[Tensor] = []
    for batch, images, condition in batches:
        metrics.update(images, batch.start, condition)
        first += list(images[: max(0, keep - batch.start)])
        progress.advance(len(batch) * accelerator.num_processes)
    if accelerator.num_processes > 1:
        states = gather_object([metrics.state()])
        metrics.reset()
        for state in states:
            metrics.merge_state(state)
    found = metrics.result(f"{name}, {sampler}" if steps is None else f"{name}, {sampler} {steps}")
    cell = Cell(name, sampler, steps, num, *found, time.perf_counter() - start)
    return cell, torch.stack(first) if first else torch.empty(0)


def differences(cell: Cell, other: Cell) -> list[Difference]:
    """Return the numbers of a cell minus those of another, with the intervals that common random numbers allow.

    Numbers without replicates in both cells have no difference.
    """
    found = []
    for name, replicates in cell.replicates.items():
        value, base = cell.values[name], other.values.get(name)
        if value is not None and base is not None and name in other.replicates:
            ends = interval(value - base, replicates - other.replicates[name])
            relative = (value - base) / base if base > 0 else None
            pair = cell.checkpoint, other.checkpoint, cell.sampler, cell.steps
            found.append(Difference(*pair, name, value - base, ends, relative))
    return found


def evaluate_grid(
    generators: dict[str, Generator],
    samplers: Sequence[str],
    steps: Sequence[int],
    num: int,
    metrics: MetricCollection,
    accelerator: Accelerator,
    keep: int = 16,
    progress: Progress = SILENT,
) -> Grid:
    """Evaluate every checkpoint under every sampler and number of steps, as :func:`evaluate_cell` does for one.

    Arguments:
        generators: By the checkpoint's name; their sampler and steps are replaced, the rest is used as it is.
        samplers: Names of samplers.
        steps: Numbers of network evaluations.
        progress: Told of the network evaluations, over all processes, and of the cell.

    Raises:
        InputError: If a sampler or a number of steps does not suit a checkpoint.
    """
    for generator, sampler, count in itertools.product(generators.values(), samplers, steps):
        replace(generator, sampler=sampler, steps=count)  # its checks, before anything takes time
    progress.begin("network evaluations", len(generators) * len(samplers) * sum(steps) * num)
    grid = Grid([], [], {})
    for sampler, count in itertools.product(samplers, steps):
        row: list[Cell] = []
        for name, generator in generators.items():
            chosen = replace(generator, sampler=sampler, steps=count)
            cell, grid.samples[name, sampler, count] = evaluate_cell(
                name, chosen, num, metrics, accelerator, keep, _Within(progress, count)
            )
            grid.differences.extend(itertools.chain.from_iterable(differences(cell, other) for other in row))
            row.append(cell)
        grid.cells.extend(row)
    return grid
