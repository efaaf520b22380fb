"""Several sources of images on common random numbers: models that are sampled, and images that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from robustdiff.backbones.build import check_fit
from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import Cell, Grid, evaluate_grid, evaluate_images
from robustdiff.evaluation.images import check_size, load_images, number_of_images
from robustdiff.evaluation.real_images import Target
from robustdiff.progress import SILENT, Progress

__all__ = ["Evaluation", "Sources", "evaluate_sources", "load_generators", "load_sources", "name_sources"]


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """Return sources by the last part of their paths, or by the whole path where that is not unique.

    Raises:
        InputError: If a source is given twice.
    """
    short = [Path(source).name for source in sources]
    named = {s if short.count(s) == 1 else str(Path(source)): source for s, source in zip(short, sources, strict=True)}
    if len(named) < len(sources):
        raise InputError("the same run, folder or file is given twice: give each once")
    return named


@dataclass(frozen=True)
class Sources:
    """Sources of images, by name.

    Attributes:
        runs: The paths of runs and pipeline folders, and the names of shipped models.
        images: The images of folders and ``.npz`` files.
    """

    runs: dict[str, str]
    images: dict[str, ImageDataset]

    @property
    def first_run(self) -> str | None:
        """Return the run whose recipe names the real images; None if there are images alone."""
        return next(iter(self.runs.values()), None)


def load_sources(sources: Sequence[str]) -> Sources:
    """Tell runs from images, and load the images.

    Raises:
        InputError: If a source is given twice, or its images are missing or malformed.
    """
    named = name_sources(sources)
    images = {name: found for name, source in named.items() if (found := load_images(source)) is not None}
    return Sources({name: source for name, source in named.items() if name not in images}, images)


def load_generators(
    runs: Mapping[str, str], device: torch.device, dataset: ImageDataset | None, **settings: Any
) -> dict[str, Generator]:
    """Load the generators of runs.

    Arguments:
        runs: Runs, pipeline folders or shipped models, by name.
        device: The device of the networks.
        dataset: The real images; None where they are not known.
        settings: Fields of :class:`robustdiff.evaluation.generate.Generator`.

    Raises:
        InputError: If a run cannot be loaded, a setting does not suit it, or it makes images of another shape than the
            dataset's.
    """
    classes = None if dataset is None else dataset.num_classes
    generators = {name: Generator.load(run, device, data_classes=classes, **settings) for name, run in runs.items()}
    if dataset is not None:
        for name, generator in generators.items():
            check_fit(generator.unet, dataset.shape, runs[name])
    return generators


@dataclass(frozen=True)
class Evaluation:
    """Sources that were compared with real images.

    Attributes:
        target: The real images and the features.
        grid: The cells of the runs, their differences and first images.
        images: The cells of images that were there already.
        num: The number of images of each cell of the grid.
        seed: The seed of the samples.
    """

    target: Target
    grid: Grid
    images: list[Cell]
    num: int
    seed: int

    @property
    def runs(self) -> list[str]:
        """Return the names of the runs."""
        return list(dict.fromkeys(cell.checkpoint for cell in self.grid.cells))


def evaluate_sources(
    sources: Sources,
    target: Target,
    accelerator: Accelerator,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    num: int | None = None,
    *,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress = SILENT,
    **settings: Any,
) -> Evaluation:
    """Compare sources with real images: runs under each sampler and number of steps, and images as they are.

    Arguments:
        sources: The sources.
        target: The real images and the features.
        accelerator: Each of its processes makes its share of the images.
        samplers: Names of samplers for all runs; by default one that suits the first.
        steps: Numbers of network evaluations; by default 5, 10, 20 and 50, or 1, 2, 4 and 8 for consistency models.
        num: Images of each cell; by default 5000, and all of a folder or file.
        seed: The seed of the samples.
        batch_size: Images at a time.
        progress: Is told of the images that are measured, and of the network evaluations.
        settings: Other fields of the generators.

    Raises:
        InputError: If a setting does not suit a run, or images do not suit the real ones or the features.
        RunError: If a metric is not finite.
    """
    numbers = {name: number_of_images(images, num) for name, images in sources.images.items()}
    num = num or 5000
    for option, value in (("--sampler", samplers), ("--steps", steps)):
        if value and not sources.runs:
            raise InputError(f"{option} is how runs are sampled, and only images are given: leave it out")
    # Steps are given, so that no run's recipe decides how all are sampled.
    settings |= {"sampler": samplers[0] if samplers else None, "steps": steps[0] if steps else 1}
    settings |= {"seed": seed, "batch_size": batch_size}
    generators = load_generators(sources.runs, accelerator.device, target.dataset, **settings)
    if generators:
        samplers = samplers or [next(iter(generators.values())).sampler]
        steps = steps or ([1, 2, 4, 8] if samplers[0] == "multistep" else [5, 10, 20, 50])
    if target.dataset is not None:
        for images in sources.images.values():
            check_size(images, target.dataset.shape)
    measured = target.extractor, target.statistics(accelerator, progress), accelerator
    cells = []
    for name, images in sources.images.items():  # before the runs, which take longer
        progress.begin(name, numbers[name])
        cells.append(evaluate_images(name, images, numbers[name], *measured, batch_size, progress.advance))
    progress.begin("network evaluations", len(generators) * len(samplers) * sum(steps) * num)
    grid = evaluate_grid(generators, samplers, steps, num, *measured, on_images=progress.advance)
    return Evaluation(target, grid, cells, num, seed)
