"""Evaluation of several sources of images: models, sampled with common random numbers, and existing images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from robustdiff.data import ImageDataset
from robustdiff.errors import InputError, printable
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import Grid, evaluate_grid, evaluate_images
from robustdiff.evaluation.images import check_size, load_images, number_of_images
from robustdiff.evaluation.prompts import Prompts, captions_of
from robustdiff.evaluation.real_images import Target
from robustdiff.metrics.metric import MetricCollection
from robustdiff.metrics.reference import FEWEST
from robustdiff.progress import SILENT, Progress
from robustdiff.samplers.sample import SAMPLERS

__all__ = ["evaluate_sources", "load_generators", "load_sources", "name_sources"]


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """Return sources by the last part of their paths, or by the whole path if the last part is not unique.

    Raises:
        InputError: If a source is given twice.
    """
    short = [Path(source).name for source in sources]
    named = {s if short.count(s) == 1 else str(Path(source)): source for s, source in zip(short, sources, strict=True)}
    if len(named) < len(sources):
        raise InputError("the same run, folder or file is given twice: give each once")
    return named


def load_sources(sources: Sequence[str]) -> tuple[dict[str, str], dict[str, ImageDataset]]:
    """Return the models among sources (runs, pipeline folders, shipped models), and the images of the others, by name.

    Raises:
        InputError: If a source is given twice, or images are missing or malformed.
    """
    named = name_sources(sources)
    images = {name: found for name, source in named.items() if (found := load_images(source)) is not None}
    return {name: source for name, source in named.items() if name not in images}, images


def load_generators(
    runs: Mapping[str, str],
    device: torch.device,
    dataset: ImageDataset | None,
    samplers: Sequence[str],
    steps: Sequence[int | None],
    **settings: Any,
) -> dict[str, Generator]:
    """Return the generators of runs by name, with the first of the samplers and of the numbers of steps.

    Without prompts, networks of captions are sampled for those of the dataset.

    Raises:
        InputError: If a run cannot be loaded, a setting does not suit it, or its images have another shape than the
            dataset's.
    """
    # One sampler for all runs, whatever the recipe of one says.
    settings |= {"sampler": samplers[0] if samplers else None, "steps": steps[0], "by_recipe": False}
    if not settings.get("prompts") and "data_captions" not in settings:
        settings["data_captions"] = captions_of(dataset)
    classes = None if dataset is None else dataset.num_classes
    generators = {name: Generator.load(run, device, data_classes=classes, **settings) for name, run in runs.items()}
    if dataset is not None:
        for name, generator in generators.items():
            generator.model.check_shape(dataset.shape, runs[name])
    return generators


def evaluate_sources(
    runs: Mapping[str, str],
    images: Mapping[str, ImageDataset],
    target: Target,
    accelerator: Accelerator,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    num: int | None = None,
    metrics: Sequence[str] = (),
    values: Mapping[str, str] = {},
    prompts: Prompts | None = None,
    guidances: Sequence[float] = (),
    *,
    batch_size: int = 128,
    progress: Progress = SILENT,
    **settings: Any,
) -> Grid:
    """Compare runs, at each sampler, number of steps and scale of guidance, and existing images with real images.

    Args:
        runs: Runs, pipeline folders and shipped models, by name.
        images: Existing images, by name.
        target: The real images and the feature extractor.
        accelerator: The accelerator, whose processes share the images.
        samplers: The names of samplers for all runs; by default one that suits the first run.
        steps: The numbers of network evaluations; by default those of the first sampler.
        num: The number of images of each cell; by default as many as there are prompts, or 5000 without prompts, and
            all existing images.
        metrics: The names of metrics; by default FID, KID, precision, recall and brightness, as far as the target
            allows.
        values: The values of metrics that take one, by name.
        prompts: The captions of all images, generated and existing; by default those of the real images for runs, and
            those in their own folder for existing images.
        guidances: The scales of classifier-free guidance; with several, each is a checkpoint of its own in the grid.
        batch_size: The number of images at a time.
        progress: The receiver of the progress.
        settings: Other fields of :class:`Generator`.

    Returns:
        A grid of the cells of runs, then those of existing images, and the differences between runs.

    Raises:
        InputError: If a setting does not suit a run, or images do not fit the real images or the extractor.
        RunError: If a metric is not finite.
    """
    numbers = {name: number_of_images(dataset, num) for name, dataset in images.items()}
    for option, value in (("--sampler", samplers), ("--steps", steps)):
        if value and not runs:
            raise InputError(f"{option} is how runs are sampled, and only images are given: leave it out")
    settings |= {"samplers": samplers, "steps": steps or [1], "batch_size": batch_size}
    if guidances:
        settings["guidance"] = guidances[0]
    if prompts is not None:
        settings["prompts"] = prompts.texts
    else:  # also where the images are not compared
        settings["data_captions"] = captions_of(target.dataset)
    compared = None if target.extractor is None else target.dataset
    generators = load_generators(runs, accelerator.device, compared, **settings)
    number = num or _number(generators)
    if len(guidances) > 1:
        generators = {
            f"{name}, guidance {scale:g}": replace(generator, guidance=scale)
            for name, generator in generators.items()
            for scale in guidances
        }
    if generators:
        samplers = samplers or [next(iter(generators.values())).sampler]
        steps = steps or SAMPLERS[samplers[0]].grid_steps
    if compared is not None:
        for dataset in images.values():
            check_size(dataset, compared.shape)
    statistics = target.statistics(accelerator, progress)
    collection = MetricCollection(metrics or None, target.extractor, statistics, accelerator.device, values)
    captions: dict[str, Sequence[str] | None] = {}
    for name, dataset in images.items():
        captions[name] = dataset.first_captions(range(len(dataset))) if prompts is None else prompts.of(dataset)
    _check_captions(collection, generators, captions, prompts)
    cells = [  # before the runs, which take longer
        evaluate_images(name, dataset, numbers[name], collection, accelerator, batch_size, progress, captions[name])
        for name, dataset in images.items()
    ]
    grid = evaluate_grid(generators, samplers, steps, number, collection, accelerator, progress=progress)
    return replace(grid, cells=[*grid.cells, *cells])


def _number(generators: Mapping[str, Generator]) -> int:
    """Return the number of images of each cell that is the default."""
    prompts = next((generator.prompts for generator in generators.values() if generator.prompts), None)
    if prompts is None:
        return 5000
    if len(prompts) < FEWEST:
        raise InputError(
            f"{len(prompts)} prompts make as many images, and {FEWEST} or more are needed: give more prompts, or --num "
            "for images that take turns with them"
        )
    return len(prompts)


def _check_captions(
    collection: MetricCollection,
    generators: Mapping[str, Generator],
    captions: Mapping[str, Sequence[str] | None],
    prompts: Prompts | None,
) -> None:
    """Check that the metrics have the captions that they need, and that prompts are of use."""
    metric = collection.needs_captions
    if prompts is not None and metric is None and not generators and not prompts.files:
        raise InputError("--prompts is for models of captions and metrics of captions, and none is given: leave it out")
    lacking = [name for name, generator in generators.items() if not generator.prompts]
    lacking += [name for name, texts in captions.items() if texts is None]
    if metric is not None and lacking:
        raise InputError(
            f"{printable(lacking[0])}: the metric {metric} compares images with captions, and these have none: give "
            "--prompts FILE, or leave the metric out"
        )
