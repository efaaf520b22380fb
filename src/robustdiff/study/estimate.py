"""Estimation of the work that is left in a study, and of its time in one process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.prompts import captions_of
from robustdiff.files import scratch_folder
from robustdiff.study.plan import Piece, Run, image_passes, pieces, plan
from robustdiff.study.schema import Study
from robustdiff.study.store import Loss, read, read_cell
from robustdiff.training.build import build_model
from robustdiff.training.run import train
from robustdiff.training.run_files import read_metrics

__all__ = ["Remaining", "remaining", "time_sampling", "time_training"]


@dataclass(frozen=True)
class Remaining:
    """The runs to train and cells to measure of one method or reference, and the time in one process."""

    method: str
    runs: int
    cells: int
    seconds: float


def remaining(study: Study, folder: Path) -> list[Remaining]:
    """Return the work that is left for each method and reference of a study.

    The speed is taken from finished runs and cells. If there are none, a few updates and images are timed.
    """
    runs = plan(study, folder)
    trained = [(run, read(run.path, Loss)) for run in runs if run.path.is_file()]
    measured = [read_cell(cell, study, run) for run in runs for cell in run.cells if cell.done]
    measured = [record for record in measured if None not in (record["seconds"], record["n"], record["steps"])]
    if trained:
        # The study may have more updates now than there were.
        passes = sum(image_passes(run.recipe) / run.recipe.steps * max(record.step[-1], 1) for run, record in trained)
        training = sum(record.seconds for _, record in trained) / passes
    else:
        training = time_training(runs[0])
    # A cell takes a + b·steps for each image: a for its features, b·steps for generating it.
    if len({record["steps"] for record in measured}) > 1:
        each = [record["seconds"] / record["n"] for record in measured]
        fit = np.polynomial.Polynomial.fit([record["steps"] for record in measured], each, 1).convert()
        once, sampling = np.maximum(fit.coef, 0)
    else:
        once, sampling = 0.0, time_sampling(runs[0])

    def left(name: str, own: Sequence[Piece]) -> Remaining:
        cells = [piece.cell for piece in own if piece.cell is not None]
        untrained = [piece.run.recipe for piece in own if piece.kind == "training" and piece.run is not None]
        evaluations = sum(piece.size for piece in own if piece.kind == "mismatch")
        seconds = training * sum(map(image_passes, untrained)) + sampling * evaluations
        seconds += study.measure.num * sum(once + sampling * cell.steps for cell in cells)
        return Remaining(name, len(untrained), len(cells), float(seconds))

    missing = [piece for piece in pieces(study, folder) if not piece.done]
    own = {name: [p for p in missing if p.run is not None and p.run.method == name] for name in study.methods}
    alone = {
        name: [p for p in missing if p.run is None and p.cell is not None and p.cell.network == name]
        for name in study.references
    }
    return [left(name, parts) for name, parts in itertools.chain(own.items(), alone.items())]


def time_training(run: Run) -> float:
    """Measure the seconds that training takes for one image in one pass."""
    with scratch_folder() as scratch:
        recipe = run.recipe.model_copy(
            update={"output": str(scratch / "run"), "steps": 4, "log_every": 1, "trackers": (), "ema": "auto"}
        )
        train(recipe)
        speeds = [line.images_per_second for line in read_metrics(Path(recipe.output) / "metrics.jsonl")]
    passes = image_passes(run.recipe) / (run.recipe.steps * run.recipe.batch_size)
    return 1 / (max(speeds) * passes)  # the first updates include initialisation


def time_sampling(run: Run) -> float:
    """Measure the seconds of one network evaluation for one image, with the initial network."""
    recipe, measure = run.recipe, run.study.measure
    dataset = recipe.data.load()
    generator = Generator.of(
        build_model(recipe, dataset).model,
        sampler=measure.samplers[0],
        steps=2,
        batch_size=measure.batch_size,
        precision=recipe.precision,
        guidance=measure.guidance,
        data_captions=captions_of(dataset),
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        next(generator.images(range(measure.batch_size)))
        seconds.append(time.perf_counter() - start)
    return min(seconds) / (2 * measure.batch_size)
