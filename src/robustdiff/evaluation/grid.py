r"""The grid: checkpoint × sampler × number of function evaluations (NFE).

All cells use the same random numbers: image i of each has the same x_T and step noise
(:mod:`robustdiff.evaluation.generate`). A number with bootstrap replicates has an interval. For each pair of
checkpoints at equal sampler and NFE, the difference has an interval from replicates that resample the same images of
both, which common random numbers make narrow.

Existing images, in a folder or a file, are measured in the same way and give one cell, without sampler and steps. They
are not paired with the images of another cell, so they have no differences.

On a GPU the metrics of a batch are computed in a thread and on a stream of their own, while the next batch is sampled.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from robustdiff.data import ImageDataset
from robustdiff.data.pixels import tile
from robustdiff.distributed import from_main, of_others
from robustdiff.errors import InputError, RunError
from robustdiff.evaluation.generate import Generator, share_of
from robustdiff.metrics.bootstrap import direction, interval, relative_interval
from robustdiff.metrics.metric import Measured, MetricCollection, Number, number_named
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.notation import difference as shown_difference
from robustdiff.notation import interval as shown_interval
from robustdiff.notebook import html_image, html_table
from robustdiff.progress import SILENT, Progress

__all__ = [
    "FILE",
    "Cell",
    "Difference",
    "Grid",
    "differences",
    "evaluate_cell",
    "evaluate_grid",
    "evaluate_images",
    "numbers_of",
]

FILE = "file"
"""The value of :attr:`Cell.sampler` for existing images."""


@dataclass(frozen=True)
class Cell:
    """The numbers of one checkpoint under one sampler, or of the images of one folder or file.

    Attributes:
        checkpoint: The name of the checkpoint, folder or file.
        sampler: The sampler, or :data:`FILE` for existing images.
        steps: The number of network evaluations for one image, or None for existing images.
        n: The number of images.
        values: The numbers of the metrics by name, with the standard error of NAME as ``NAME_se``. The value is None if
            it is not known, such as KID if the reference has no features.
        intervals: The 95 % intervals, by name, of the numbers that have one.
        replicates: The bootstrap replicates, (R,), of those numbers. Replicate r resamples the same images in all cells
            with the same number of images.
        seconds: The time taken to generate and measure the images, in seconds.
        guidance: The scale of classifier-free guidance, or None without guidance.
        blocks: The number of blocks that the replicates of a number resample, by name.
    """

    checkpoint: str
    sampler: str
    steps: int | None
    n: int
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    replicates: dict[str, Any] = field(repr=False, compare=False)
    seconds: float
    guidance: float | None = None
    blocks: dict[str, int] = field(default_factory=dict, repr=False)

    def record(self) -> dict[str, Any]:
        """Return the record of the cell in ``result.json``, with each interval as ``NAME_ci``, without replicates."""
        record: dict[str, Any] = {key: getattr(self, key) for key in ("checkpoint", "sampler", "steps", "n")}
        if self.guidance is not None:
            record["guidance"] = self.guidance
        for name, value in self.values.items():
            record[name] = value
            if name in self.intervals:
                record[f"{name}_ci"] = list(self.intervals[name])
        return {**record, **({"blocks": self.blocks} if self.blocks else {}), "seconds": self.seconds}

    def _repr_html_(self) -> str:
        return _table([self])


@dataclass(frozen=True)
class Difference:
    """A number of one checkpoint minus that of a baseline, at equal sampler, steps and random numbers.

    Attributes:
        value: The difference, whose 95 % interval is ``interval``.
        relative: The difference divided by the baseline's number, or None if that is not positive.
        relative_interval: The 95 % interval of ``relative``, for a positive number that is compared by ratios
            (:attr:`robustdiff.metrics.metric.Number.log`), or None.
    """

    checkpoint: str
    baseline: str
    sampler: str
    steps: int | None
    number: str
    value: float
    interval: tuple[float, float]
    relative: float | None
    relative_interval: tuple[float, float] | None = None

    @property
    def sign(self) -> int:
        """Return −1 or 1 if the difference is below or above 0 beyond chance, else 0."""
        return direction(self.interval, self.relative_interval)

    def text(self) -> str:
        """Return the relative change with its interval in words, or the difference if that has none."""
        spec = number_named(self.number).format
        return shown_difference(self.value, self.interval, spec, self.relative, self.relative_interval)

    def record(self) -> dict[str, Any]:
        """Return the record of the difference in ``result.json``, with the keys of a cell's record and ``relative``.

        The interval of the relative change is ``relative_ci``, or null.
        """
        pair = {"checkpoint": self.checkpoint, "baseline": self.baseline, "sampler": self.sampler, "steps": self.steps}
        ends = self.relative_interval and list(self.relative_interval)
        own = {self.number: self.value, f"{self.number}_ci": list(self.interval)}
        return {**pair, **own, "relative": self.relative, "relative_ci": ends}


@dataclass(frozen=True)
class Grid:
    """The cells, the differences of all pairs, and the first images of each cell, uint8 (k, C, H, W).

    Attributes:
        captions: The captions of the first images, or an empty list if no model takes captions.
    """

    cells: list[Cell]
    differences: list[Difference]
    samples: dict[tuple[str, str, int], Tensor]
    captions: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        text = _table(self.cells)
        if self.differences:
            heading = ["", "vs", "sampler", "steps", "number", "change, with its 95 % interval"]
            rows = [
                [one.checkpoint, one.baseline, one.sampler, one.steps, number_named(one.number).title, one.text()]
                for one in self.differences
            ]
            text += html_table("on common random numbers", heading, rows)
        for (checkpoint, sampler, steps), images in self.samples.items():
            if len(images):
                pixels = tile(images, min(8, len(images)), scale=max(1, 64 // images.shape[-1]))
                text += html_image(pixels, f"{checkpoint}, {sampler}, {steps} steps")
        return text


def numbers_of(cells: Sequence[Cell]) -> list[Number]:
    """Return the numbers of which a cell has a value, without the standard errors of others."""
    names = dict.fromkeys(name for cell in cells for name in cell.values)
    return [number_named(name) for name in names if not (name.endswith("_se") and name.removesuffix("_se") in names)]


def _table(cells: Sequence[Cell]) -> str:
    """Return a table of cells with all of their numbers as HTML."""
    numbers, rows = numbers_of(cells), []
    for cell in cells:
        row: list[object] = [cell.checkpoint, cell.sampler, "–" if cell.steps is None else cell.steps, cell.n]
        for number in numbers:
            value, error = cell.values.get(number.name), cell.values.get(f"{number.name}_se")
            ends = cell.intervals.get(number.name)
            row.append("–" if value is None else shown_interval(value, ends, number.format, error))
        rows.append(row)
    heading = ["", "sampler", "steps", "images", *(number.title for number in numbers)]
    return html_table("95 % intervals in brackets, standard errors after ±", heading, rows)


def evaluate_cell(
    name: str,
    generator: Generator,
    num: int,
    metrics: MetricCollection,
    accelerator: Accelerator,
    keep: int = 16,
    progress: Progress = SILENT,
) -> tuple[Cell, Tensor]:
    """Generate the images of one cell and measure them.

    Args:
        name: The name of the checkpoint.
        generator: The source of the images, whose ``steps`` is a number.
        num: The number of images.
        metrics: The metrics, which are reset.
        accelerator: The accelerator, whose processes share the images.
        keep: The number k of first images to return.
        progress: The receiver of the progress, in images of all processes.

    Raises:
        InputError: If a metric does not take the images.
        RunError: If a number is not finite.
    """
    sampler, steps = generator.sampler, int(generator.steps)
    progress.begin(f"{name} · {sampler} {steps}", num)
    made = generator.images(share_of(num, accelerator))
    batches = ((batch, images, generator.labels(batch), generator.captions(batch)) for batch, images in made)
    cell, first = _measure(batches, name, sampler, steps, num, metrics, accelerator, keep, progress)
    return replace(cell, guidance=generator.guidance), first


def evaluate_images(
    name: str,
    dataset: ImageDataset,
    num: int,
    metrics: MetricCollection,
    accelerator: Accelerator,
    batch_size: int = 128,
    progress: Progress = SILENT,
    captions: Sequence[str] | None = None,
) -> Cell:
    """Measure existing images. Other arguments and errors are those of :func:`evaluate_cell`.

    The first ``num`` images of the dataset in a fixed pseudo-random order are measured, and their labels are the
    condition for metrics. ``captions`` has one of each image, in the order of the dataset, or is None.

    Raises:
        InputError: If an image cannot be read.
    """

    order = fixed_order(len(dataset)).tolist()

    def batches() -> Iterator[_Measured]:
        share = share_of(num, accelerator)
        for start in range(share.start, share.stop, batch_size):
            batch = range(start, min(start + batch_size, share.stop))
            chosen = order[batch.start : batch.stop]
            images, labels = dataset.__getitems__(chosen)[:2]
            yield batch, images, labels, None if captions is None else [captions[i] for i in chosen]

    progress.begin(name, num)
    return _measure(batches(), name, FILE, None, num, metrics, accelerator, 0, progress)[0]


_Measured = tuple[range, Tensor, Tensor | None, Sequence[str] | None]
"""The indices of images, the images, their classes and their captions."""


class _Within:
    """The progress of a cell as a part of the grid's, in network evaluations."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps, self.note = progress, steps, ""

    def begin(self, description: str, total: float) -> None:
        self.note = description

    def advance(self, amount: float, note: str = "") -> None:
        self.progress.advance(amount * self.steps, self.note)


@contextmanager
def _beside(function: Callable[..., None], stream: torch.cuda.Stream | None) -> Iterator[Callable[..., None]]:
    """Yield a function whose calls return at once, while a thread makes them on a stream, one after the other.

    A call waits for the one before. An error is raised by the next call, or at the end of the block.
    """
    pending: list[Future[None]] = []

    def on_stream(*arguments: Any) -> None:
        with torch.cuda.stream(stream):
            function(*arguments)

    def call(*arguments: Any) -> None:
        while pending:
            pending.pop().result()
        pending.append(thread.submit(on_stream, *arguments))

    # A new thread has the first GPU as its current one, and entering a stream of another would open a context there.
    if stream is None:
        pool = ThreadPoolExecutor(1)
    else:
        pool = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(stream.device,))
    with pool as thread:
        yield call
        while pending:
            pending.pop().result()


def _measure(
    batches: Iterable[_Measured],
    name: str,
    sampler: str,
    steps: int | None,
    num: int,
    metrics: MetricCollection,
    accelerator: Accelerator,
    keep: int,
    progress: Progress,
) -> tuple[Cell, Tensor]:
    """Measure batches of this process, and merge the metrics of all processes."""
    start = time.perf_counter()
    metrics.reset()
    first: list[Tensor] = []
    device = accelerator.device
    on_gpu = device.type == "cuda"
    with _beside(metrics.update, torch.cuda.Stream(device)) if on_gpu else nullcontext(metrics.update) as update:
        for batch, images, condition, captions in batches:
            update(images, batch.start, condition, captions)
            first += list(images[: max(0, keep - batch.start)])
            progress.advance(len(batch) * accelerator.num_processes)
    found = _merged(metrics, f"{name}, {sampler}" if steps is None else f"{name}, {sampler} {steps}", accelerator)
    seconds = time.perf_counter() - start
    cell = Cell(
        name, sampler, steps, num, found.values, found.intervals, found.replicates, seconds, blocks=found.blocks
    )
    return cell, torch.stack(first) if first else torch.empty(0)


def _merged(metrics: MetricCollection, what: str, accelerator: Accelerator) -> Measured:
    """Return the numbers of the images of all processes, which the main process computes, in all of them."""
    if accelerator.num_processes == 1:
        return metrics.result(what)
    for state in of_others(metrics.state(), accelerator):
        metrics.merge_state(state)
    found: Measured | InputError | RunError | None = None
    if accelerator.is_main_process:
        try:
            found = metrics.result(what)
        except (InputError, RunError) as error:  # the others must not wait for numbers
            found = error
    found = from_main(found)
    if isinstance(found, InputError | RunError):
        raise found
    assert found is not None
    return found


def differences(cell: Cell, other: Cell) -> list[Difference]:
    """Return the numbers of a cell minus those of another, with intervals that use the common random numbers.

    A number must have replicates in both cells; others are left out.
    """
    found = []
    for name, replicates in cell.replicates.items():
        value, base = cell.values[name], other.values.get(name)
        if value is not None and base is not None and name in other.replicates:
            ends = interval(value - base, replicates - other.replicates[name], cell.blocks[name])
            relative = (value - base) / base if base > 0 else None
            of_ratio = None
            if number_named(name).log:
                of_ratio = relative_interval(value, replicates, base, other.replicates[name], cell.blocks[name])
            pair = cell.checkpoint, other.checkpoint, cell.sampler, cell.steps
            found.append(Difference(*pair, name, value - base, ends, relative, of_ratio))
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

    Args:
        generators: The generators by the name of the checkpoint. Their sampler and steps are replaced.
        samplers: The names of the samplers.
        steps: The numbers of network evaluations.
        progress: The receiver of the progress, in network evaluations of all processes, with the cell as a note.

    Raises:
        InputError: If a sampler or a number of steps does not suit a checkpoint.
    """
    for generator, sampler, count in itertools.product(generators.values(), samplers, steps):
        replace(generator, sampler=sampler, steps=count)  # runs the checks before any cell is generated
    progress.begin("network evaluations", len(generators) * len(samplers) * sum(steps) * num)
    captions = (generator.captions(range(min(keep, num))) for generator in generators.values())
    grid = Grid([], [], {}, next((found for found in captions if found), []))
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
