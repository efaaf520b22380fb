"""The demonstration: three fine-tunings of one checkpoint on real images, and the evidence.

The shipped base checkpoint is fine-tuned on fashion-16 plainly, with a random perturbation of adversarial training's
size, and with free adversarial training. Each makes the same number of optimiser updates, one backward pass each, at
the same batch size, learning rate and moving average; all read the same sequence of batches, times and noise.
Plain fine-tuning makes one update on each batch, the other two K, and so they see the first K-th of the sequence.
Then FID over samplers and steps, from the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from robustdiff.data import load_dataset
from robustdiff.evaluation.features import load_extractor
from robustdiff.evaluation.fidelity import reference_statistics
from robustdiff.evaluation.grid import Grid, evaluate_grid
from robustdiff.files import atomic_write
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.report.figures import fid_against_steps, sample_grid, save_figure
from robustdiff.samplers.generate import Generator
from robustdiff.training.trainer import Status, train

__all__ = ["FULL", "QUICK", "DemoSize", "run_demo"]


METHODS = {"plain": "none", "random": "random", "free AT": "free"}
SAMPLERS = ("ddim", "iddpm", "dpm++")
STEPS = (5, 10, 20, 50)
BATCH = 64  # images at a time: more do not fit into the cache of a core


@dataclass(frozen=True)
class DemoSize:
    """How much the demonstration does. Arguments: updates: of each fine-tuning; images: of each cell."""

    updates: int
    images: int


QUICK = DemoSize(updates=300, images=500)
FULL = DemoSize(updates=1200, images=5000)


def _recipe(method: str, output: Path, size: DemoSize, seed: int) -> Recipe:
    folder = output / "runs" / method.replace(" ", "-").lower()
    return load_recipe(
        "fashion-16-at",
        [
            f"adversary.name={METHODS[method]}",
            f"steps={size.updates}",
            f"seed={seed}",
            f"output={folder}",
        ],
    )


def run_demo(
    output: Path,
    size: DemoSize,
    seed: int = 0,
    *,
    on_part: Callable[[str, float], None] = lambda description, total: None,
    on_progress: Callable[[float, str], None] = lambda done, note: None,
) -> tuple[Grid, dict[str, Any]] | None:
    """Fine-tune, evaluate, and write figures and ``result.json`` into a folder.

    Fine-tunings that are there already are not made again, and those that were interrupted go on.

    Arguments:
        output: The folder.
        size: How much to do.
        seed: Of the batches, the noise and the samples.
        on_part: Called when a part of the work begins, with what it is and its size.
        on_progress: Called with how much of the part is done, and a note.

    Returns:
        The grid and what ``result.json`` holds; None when a signal stopped it.

    Raises:
        InputError: If the folder holds a demonstration of another size or seed.
    """
    generators: dict[str, Generator] = {}
    training: dict[str, Any] = {}
    for method in METHODS:
        recipe = _recipe(method, output, size, seed)
        on_part(f"fine-tuning: {method}", size.updates)

        def on_status(status: Status) -> None:
            note = f"loss {status.loss:.4f}  |δ| {status.delta_norm:.2f}  {status.images_per_second:.0f} images/s"
            on_progress(status.step, note)

        result = train(recipe, resume=True, on_status=on_status)
        if result is None:
            return None
        training[method] = {"recipe": recipe.model_dump(mode="json"), **result}
        generators[method] = Generator.load(recipe.output, seed=seed, precision=recipe.precision, batch_size=BATCH)
    accelerator = Accelerator()
    extractor = load_extractor("fashion-16")
    on_part("statistics of the real images", 1)
    reference = reference_statistics(load_dataset("fashion-16"), extractor)
    on_part("sampling (network evaluations)", len(METHODS) * len(SAMPLERS) * sum(STEPS) * size.images)
    done = 0

    def on_images(evaluations: int, cell: str) -> None:
        nonlocal done
        done += evaluations
        on_progress(done, cell)

    grid = evaluate_grid(
        generators, SAMPLERS, STEPS, size.images, extractor, reference, accelerator, on_images=on_images
    )
    what = f"fashion-16, {size.updates} updates, {size.images} images a cell, seed {seed}"
    save_figure(fid_against_steps(grid.cells, what), output / "fid.png")
    for sampler in SAMPLERS:
        figure = sample_grid(grid.samples, list(METHODS), sampler, STEPS, f"{sampler}: the same noise in every column")
        save_figure(figure, output / f"samples-{sampler.replace('+', 'p')}.png")
    record = {
        "obtained_on": {
            "data": "fashion-16: 60,000 training images of Fashion-MNIST at 16×16",
            "features": extractor.name,
            "device": accelerator.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "seed": seed,
        "training": training,
        "cells": [asdict(cell) for cell in grid.cells],
        "differences": [asdict(difference) for difference in grid.differences],
    }
    with atomic_write(output / "result.json") as file:
        file.write(json.dumps(record, indent=1).encode())
    return grid, record
