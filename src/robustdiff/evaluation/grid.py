r"""The grid: checkpoint × sampler × number of function evaluations (NFE).

Every cell is made from the same random numbers: image i of each has the same x_T and step noise
(:mod:`robustdiff.evaluation.generate`). A cell has a bootstrap interval, and each pair of checkpoints has, at equal
sampler and NFE, an interval of its difference, from replicates that resample the same images of both. Common random
numbers make that interval narrower than the two intervals suggest.

Images that are there already, in a folder or a file, are measured in the same way and give one cell, without sampler
and steps. Nothing pairs them with the images of another cell, so they have no differences.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.data import ImageDataset
from robustdiff.evaluation.features import FeatureExtractor
from robustdiff.evaluation.fidelity import Fidelity, Reference, bootstrap_frechet, check_finite, interval
from robustdiff.evaluation.generate import Generator, share_of

__all__ = ["FILE", "Cell", "Difference", "Grid", "difference", "evaluate_cell", "evaluate_grid", "evaluate_images"]

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
        fid: Fréchet distance, with its 95 % interval ``fid_ci``.
        kid: Kernel distance, with its standard error ``kid_se``. None, as precision and recall, where the reference
            has no features.
        precision: In [0, 1].
        recall: In [0, 1].
        brightness: The mean grey value of the images, in [0, 255]. Few-step FID follows it closely.
        seconds: What it took to make and measure the images.
    """

    checkpoint: str
    sampler: str
    steps: int | None
    n: int
    fid: float
    fid_ci: tuple[float, float]
    kid: float | None
    kid_se: float | None
    precision: float | None
    recall: float | None
    brightness: float
    seconds: float


@dataclass(frozen=True)
class Difference:
    """FID of one checkpoint minus that of another, at equal sampler, steps and random numbers.

    Attributes:
        checkpoint: The one.
        baseline: The other.
        sampler: The sampler.
        steps: Network evaluations for one image.
        fid: The difference, with its 95 % interval ``fid_ci``.
        relative: The difference over the other's FID; None where that is 0.
    """

    checkpoint: str
    baseline: str
    sampler: str
    steps: int | None
    fid: float
    fid_ci: tuple[float, float]
    relative: float | None


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
    extractor: FeatureExtractor,
    reference: Reference,
    accelerator: Accelerator,
    keep: int = 16,
    on_images: Callable[[int], None] = lambda n: None,
) -> tuple[Cell, NDArray[np.float64], Tensor]:
    """Make the images of one cell and measure them.

    Arguments:
        name: The checkpoint's name.
        generator: How the images are made; ``steps`` is a number.
        num: Images.
        extractor: The features.
        reference: The real images under the same features.
        accelerator: Each of its processes makes its share of the images.
        keep: How many images to return.
        on_images: Called after each batch with the number of images made since the last call, over all processes.

    Returns:
        The cell; its bootstrap replicates of FID, which belong one to one to those of any other cell with as many
        images; the first images, uint8 (k, C, H, W).

    Raises:
        InputError: If images do not suit the features.
        RunError: If a metric is not finite.
    """
    batches = generator.images(share_of(num, accelerator))
    return _measure(
        batches, name, generator.sampler, int(generator.steps), num, extractor, reference, accelerator, keep, on_images
    )


def evaluate_images(
    name: str,
    dataset: ImageDataset,
    num: int,
    extractor: FeatureExtractor,
    reference: Reference,
    accelerator: Accelerator,
    batch_size: int = 128,
    on_images: Callable[[int], None] = lambda n: None,
) -> Cell:
    """Measure images that are there already.

    Arguments:
        name: Their name.
        dataset: The images; labels are not used.
        num: How many of them, from the first.
        extractor: The features.
        reference: The real images under the same features.
        accelerator: Each of its processes reads its share of the images.
        batch_size: Images at a time.
        on_images: Called after each batch with the number of images read since the last call, over all processes.

    Raises:
        InputError: If images cannot be read or do not suit the features.
        RunError: If a metric is not finite.
    """

    def batches() -> Iterator[tuple[range, Tensor]]:
        share = share_of(num, accelerator)
        for start in range(share.start, share.stop, batch_size):
            batch = range(start, min(start + batch_size, share.stop))
            yield batch, dataset.__getitems__(batch)[0]

    cell, _, _ = _measure(batches(), name, FILE, None, num, extractor, reference, accelerator, 0, on_images)
    return cell


def _measure(
    batches: Iterable[tuple[range, Tensor]],
    name: str,
    sampler: str,
    steps: int | None,
    num: int,
    extractor: FeatureExtractor,
    reference: Reference,
    accelerator: Accelerator,
    keep: int,
    on_images: Callable[[int], None],
) -> tuple[Cell, NDArray[np.float64], Tensor]:
    """Measure this process's share of the images with those of the others; as :func:`evaluate_cell`."""
    start = time.perf_counter()
    fidelity = Fidelity(extractor, reference)
    first: list[Tensor] = []
    brightness = 0.0
    processes = accelerator.num_processes
    for batch, images in batches:
        fidelity.update(images, batch.start)
        brightness += int(images.sum(dtype=torch.int64)) / images[0].numel() / num
        first += list(images[: max(0, keep - batch.start)])
        on_images(len(batch) * processes)
    if processes > 1:
        parts = gather_object([(fidelity.state(), brightness)])
        fidelity = Fidelity(extractor, reference)
        for state, _ in parts:
            fidelity.merge_state(state)
        brightness = sum(part for _, part in parts)
    replicates = bootstrap_frechet(fidelity.moments, reference)
    result = fidelity.result(replicates)
    low, high = result["fid_ci"]
    what = f"{name}, {sampler}" if steps is None else f"{name}, {sampler} {steps}"
    check_finite(what, {name: result[name] for name in ("fid", "kid", "kid_se", "precision", "recall")})
    check_finite(what, {"the interval of fid": high - low})
    seconds = time.perf_counter() - start
    cell = Cell(name, sampler, steps, brightness=brightness, seconds=seconds, **result)
    return cell, replicates, torch.stack(first) if first else torch.empty(0)


def difference(
    cell: Cell, replicates: NDArray[np.float64], other: Cell, other_replicates: NDArray[np.float64]
) -> Difference:
    """FID of a cell minus that of another, with the interval that common random numbers allow."""
    gain = cell.fid - other.fid
    ends = interval(gain, replicates - other_replicates)
    relative = gain / other.fid if other.fid else None
    return Difference(cell.checkpoint, other.checkpoint, cell.sampler, cell.steps, gain, ends, relative)


def evaluate_grid(
    generators: dict[str, Generator],
    samplers: Sequence[str],
    steps: Sequence[int],
    num: int,
    extractor: FeatureExtractor,
    reference: Reference,
    accelerator: Accelerator,
    keep: int = 16,
    on_images: Callable[[int, str], None] = lambda nfe, cell: None,
) -> Grid:
    """Evaluate every checkpoint under every sampler and number of steps.

    Arguments:
        generators: By the checkpoint's name; their sampler and steps are replaced, the rest is used as it is.
        samplers: Names of samplers.
        steps: Numbers of network evaluations.
        num: Images of a cell.
        extractor: The features.
        reference: The real images under the same features.
        accelerator: Each of its processes makes its share of the images of each cell.
        keep: How many images of each cell to return.
        on_images: Called after each batch with the network evaluations that it took, over all processes, and the name
            of the cell.

    Raises:
        InputError: If a sampler or a number of steps does not suit a checkpoint, or images do not suit the features.
        RunError: If a metric is not finite.
    """
    for generator, sampler, count in itertools.product(generators.values(), samplers, steps):
        replace(generator, sampler=sampler, steps=count)  # its checks, before anything takes time
    cells, differences, samples = [], [], {}
    for sampler, count in itertools.product(samplers, steps):
        measured: dict[str, tuple[Cell, NDArray[np.float64]]] = {}
        for name, generator in generators.items():

            def report(n: int, label: str = f"{name} · {sampler} {count}", count: int = count) -> None:
                on_images(n * count, label)

            cell, replicates, samples[name, sampler, count] = evaluate_cell(
                name,
                replace(generator, sampler=sampler, steps=count),
                num,
                extractor,
                reference,
                accelerator,
                keep,
                report,
            )
            cells.append(cell)
            for other, other_replicates in measured.values():
                differences.append(difference(cell, replicates, other, other_replicates))
            measured[name] = (cell, replicates)
    return Grid(cells, differences, samples)
