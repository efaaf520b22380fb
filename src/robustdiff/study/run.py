"""Execution of a study in one process or several, and reproduction of a single cell.

All cells start from the same noise (:mod:`robustdiff.evaluation.generate`), and all runs of one seed use the same
batches, times and noise (:mod:`robustdiff.training.stream`). An interrupted study continues from its files.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from robustdiff import __version__
from robustdiff.data import DataConfig
from robustdiff.data.pixels import tile
from robustdiff.distributed import make_accelerator
from robustdiff.errors import InputError, NotFiniteError, RunError, printable
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import Cell as Measured
from robustdiff.evaluation.grid import evaluate_cell, evaluate_images
from robustdiff.evaluation.noise import NOISE, check_noise
from robustdiff.evaluation.prompts import captions_of
from robustdiff.files import atomic_write, held, make_folder, read_json
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.metric import DEFAULT, MetricCollection, parse_metrics
from robustdiff.metrics.reference import reference_statistics
from robustdiff.mismatch.measure import measure_mismatch
from robustdiff.progress import SILENT, Progress
from robustdiff.recipe import Recipe
from robustdiff.study.plan import Cell, Piece, Run, pieces, plan
from robustdiff.study.schema import Measurement, Study
from robustdiff.study.store import (
    MEASURES,
    Training,
    cell_settings,
    check_results,
    claim_study,
    read,
    read_real,
    real_path,
    reproducible,
    write,
)
from robustdiff.training.build import build_model
from robustdiff.training.run import network_settings, train
from robustdiff.training.run_files import read_metrics, training_seconds
from robustdiff.workers import run_workers
from robustdiff.yaml_reader import parse_yaml

__all__ = ["reproduce", "run_study"]


def run_study(
    study: Study,
    folder: Path,
    *,
    processes: int | None = None,
    progress: Progress = SILENT,
    wait: float = 1.0,
    tolerant: bool = False,
) -> bool:
    """Work on a study until nothing of it is missing.

    Args:
        study: The study.
        folder: The folder of runs and cells.
        processes: The number of single-threaded processes that share the work. By default it is done in this process.
        progress: The receiver of the progress of each piece of work, or with ``processes`` of the percentage of the
            whole.
        wait: The time in seconds between checks of the locks of other processes, when no other work is left.
        tolerant: Whether trainings may fail. By default their failure is an error after all other work is done.

    Returns:
        False when a signal stopped it.

    Raises:
        InputError: If a run cannot be built from its recipe, a sampler does not suit the networks, existing results
            were made with other settings, or the folder holds something else.
        RunError: If a training failed, or its network cannot be measured, or if a process is killed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a study is shared by processes of its own: start robustdiff once, without accelerate")
    check_results(study, folder)
    first = plan(study, folder)[0]
    if first.missing:
        _check_samplers(study, first)
    claim_study(folder)
    for part in ("cells", "locks", "mismatch", "runs", "trainings"):  # raises if one is a link out of the folder
        make_folder(folder / part)
    _measure_real(study, folder)
    if processes is None:
        finished = _work(study, folder, wait, progress)
    else:
        missing = [piece for piece in pieces(study, folder) if not piece.done]
        whole = _Whole(f"{study.title} (%)", missing, progress)
        parts = [_Share(whole) for _ in range(min(processes, len(missing)))]
        finished = run_workers(partial(_work, study, folder, wait), parts)
    failed = [run for run in plan(study, folder) if run.error is not None]
    if finished and failed and not tolerant:
        first = failed[0]
        raise RunError(
            f"the rest is done, but {len(failed)} trainings failed; {printable(first.failure)}: {first.error}; to try "
            f"again, change its settings and delete {printable(first.output)}, or delete both as it is"
        )
    return finished


def _check_samplers(study: Study, run: Run) -> None:
    """Check that the samplers suit the initial networks of the study, before anything is trained."""
    dataset, measure = run.recipe.data.load(), study.measure
    captions = captions_of(dataset if measure.data is None else measure.data.load())
    built = build_model(run.recipe, dataset)
    if measure.mismatch and built.model.condition.takes_captions:
        raise InputError("measure.mismatch is not for text-to-image models: leave it out")
    for sampler, steps in itertools.product(measure.samplers, run.steps):
        Generator.of(built.model, sampler=sampler, steps=steps, guidance=measure.guidance, data_captions=captions)


def _work(study: Study, folder: Path, wait: float, progress: Progress) -> bool:
    """Do the pieces that no other process holds until none is missing. Return False if a signal stopped the work."""
    left = pieces(study, folder)
    while left := [piece for piece in left if not piece.done]:
        for piece in left:
            if not piece.ready:
                continue
            with held(folder / "locks" / piece.name) as mine:
                if mine and not piece.done:
                    if not _do(study, piece, progress):
                        return False
                    if not piece.done:  # it would be begun again for ever
                        raise RunError(f"{piece.name} is finished, but its files are not in {folder}: is it changed?")
                    break  # pieces that have become ready may be larger than the next one
        else:
            time.sleep(wait)
    return True


def _do(study: Study, piece: Piece, progress: Progress) -> bool:
    """Do a piece of work. Return False if a signal stopped it."""
    if piece.kind == "training":
        assert piece.run is not None
        return _train_run(piece.run, progress)
    recipe = (piece.run or plan(study, Path())[0]).recipe
    if recipe.threads is not None:  # as in training
        torch.set_num_threads(recipe.threads)
    try:
        if piece.cell is not None:
            _measure_cell(study, piece.run, piece.cell, recipe, progress)
        else:
            assert piece.run is not None
            _measure_mismatch(piece.run, piece.name, progress)
    except NotFiniteError as error:
        if piece.run is None:
            raise
        _fail(piece.run, error)
    return True


def _train_run(run: Run, progress: Progress) -> bool:
    """Train a run, and write its record: at most 100 values of the loss, and the time taken."""
    try:
        if not _train(run.recipe, progress):
            return False
    except NotFiniteError as error:
        _fail(run, error)
        return True
    lines = read_metrics(run.output / "metrics.jsonl")
    seconds = training_seconds(lines, run.recipe.batch_size)
    thinned = lines[:: -(-len(lines) // 100)]
    losses = {"step": [line.step for line in thinned], "loss": [round(line.loss, 5) for line in thinned]}
    write(run.path, {"method": run.method, "seed": run.seed, "seconds": round(seconds, 1), **losses})
    run.failure.unlink(missing_ok=True)  # of other settings
    return True


def _fail(run: Run, error: NotFiniteError) -> None:
    """Write why a run failed: its loss, or what the network makes of noise, is not finite. It is not tried again with
    the same settings."""
    settings = network_settings(run.recipe)
    write(run.failure, {"method": run.method, "seed": run.seed, "error": str(error), "settings": settings})


def _measure_cell(study: Study, run: Run | None, cell: Cell, recipe: Recipe, progress: Progress) -> None:
    """Measure a cell and write its file, and for the first seed of a method a picture of the first images."""
    measure = study.measure
    progress.begin(cell.name, measure.num)
    if run is None:
        reference = study.references[cell.network]
        record, _ = _measure(
            reference.path,
            measure,
            recipe.data,
            cell.sampler,
            cell.steps,
            reference.precision,
            progress,
            measure.seed if reference.seed is None else reference.seed,
            guidance=reference.guidance,
        )
        settings = {"name": cell.network, "path": reference.path, "data": recipe.data.model_dump(mode="json")}
        sampling = {"precision": reference.precision, "guidance": reference.guidance, "seed": reference.seed}
        # In a section of their own, since ``precision`` of a cell is that of precision and recall.
        write(cell.path, {"reference": {**settings, **sampling}, **record})
        return
    noise = measure.noise_seed(run.seed)
    record, images = _measure(
        recipe.output, measure, recipe.data, cell.sampler, cell.steps, recipe.precision, progress, noise
    )
    if run.first:
        with atomic_write(cell.path.with_suffix(".png")) as file:
            Image.fromarray(tile(images, measure.pictured).squeeze()).save(file, format="png")
    write(cell.path, {"method": run.method, "seed": run.seed, **record, **_training_settings(recipe)})


def _measure_real(study: Study, folder: Path) -> None:
    """Measure the other real images of a study as generated ones, and write their numbers, if that is to be done."""
    measure, path = study.measure, real_path(folder)
    if measure.real is None:
        return
    with held(folder / "locks" / "real") as mine:
        if not mine or read_real(study, folder) is not None:
            return
        dataset = measure.real.load()
        if len(dataset) < measure.num:
            raise InputError(
                f"measure.real: {dataset.name} has {len(dataset)} images, fewer than measure.num={measure.num}"
            )
        state = make_accelerator()
        metrics, _ = _real_images(measure, plan(study, folder)[0].recipe.data, state.device)
        captions = dataset.first_captions(range(len(dataset)))
        cell = evaluate_images("real", dataset, measure.num, metrics, state, measure.batch_size, captions=captions)
        numbers = _numbers(cell)
        del numbers["sampler"], numbers["steps"]
        write(path, {**numbers, "measure": measure.model_dump(mode="json")})


def _numbers(cell: Measured) -> dict[str, Any]:
    """Return the numbers of a cell with their replicates, for its file."""
    numbers = cell.record()
    del numbers["checkpoint"]
    others = {name: values.tolist() for name, values in cell.replicates.items() if name != MEASURES[0]}
    numbers["replicates"] = cell.replicates[MEASURES[0]].tolist()
    return {**numbers, **({"other_replicates": others} if others else {})}


def _measure_mismatch(run: Run, name: str, progress: Progress) -> None:
    """Measure the distance of a run's sampler states from q(x_t), and write the mean over steps of each measure."""
    recipe, measure = run.recipe, run.study.measure
    assert run.mismatch_path is not None
    generator = Generator.load(
        recipe.output,
        "cuda" if torch.cuda.is_available() else "cpu",
        sampler=measure.samplers[0],
        steps=run.mismatch_steps[0],
        batch_size=measure.batch_size,
        precision=recipe.precision,
        guidance=measure.guidance,
    )
    progress.begin(name, measure.mismatch * len(measure.samplers) * len(run.mismatch_steps))
    mismatch = measure_mismatch(
        {run.name: generator},
        recipe.data.load(),
        measure.samplers,
        run.mismatch_steps,
        measure.mismatch,
        probes=0,
        seed=measure.noise_seed(run.seed),
        progress=_Piece(progress),
    )
    kept = ("sampler", "steps", "mean", "last")
    paths = [{name: value for name, value in asdict(path).items() if name in kept} for path in mismatch.paths]
    record = {
        "method": run.method,
        "seed": run.seed,
        "n": measure.mismatch,
        "images_seed": measure.noise_seed(run.seed),
        "noise": NOISE,
        "updates": recipe.steps,
    }
    write(run.mismatch_path, {**record, "weights": generator.model.fingerprint(), "paths": paths})


def _train(recipe: Recipe, progress: Progress, cpu: bool = False) -> bool:
    """Start or continue the training of a run. Return False if a signal stopped it."""
    make_folder(Path(recipe.output))  # before anything is loaded, since it may be a link out of the study's folder
    progress.begin(f"training {Path(recipe.output).name}", recipe.steps)
    return train(recipe, resume=True, cpu=cpu, progress=_Piece(progress)) is not None


def _training_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what a cell's file says of its network's training."""
    path = Path(recipe.output) / "result.json"
    read(path, Training, f"delete the run {recipe.output}")
    return {"training": read_json(path), "recipe": {**parse_yaml(recipe.to_yaml(), "the recipe"), "output": ""}}


@lru_cache(maxsize=4)  # shared by the cells of one process
def _real_images(
    measure: Measurement, data: DataConfig, device: torch.device
) -> tuple[MetricCollection, tuple[str, ...]]:
    """Return the metrics of a measurement, with the statistics of the real images, and the captions of the images."""
    weights = None if measure.weights is None else Path(measure.weights)
    extractor = load_extractor(measure.features, weights=weights, device=device)
    dataset = (measure.data or data).load()
    reference = reference_statistics(dataset, extractor)
    names, values = parse_metrics(measure.metrics)
    return MetricCollection([*DEFAULT, *names], extractor, reference, device, values), captions_of(dataset)


def _measure(
    network: str,
    measure: Measurement,
    data: DataConfig,
    sampler: str,
    steps: int,
    precision: str,
    progress: Progress,
    noise: int,
    cpu: bool = False,
    guidance: float | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Measure a network under one sampler, and return the numbers for a cell's file and the first images.

    ``noise`` is the seed of the images' noise. The scale of guidance is by default that of the measurement.
    """
    state = make_accelerator(cpu)  # used for the device alone, with one process
    metrics, captions = _real_images(measure, data, state.device)
    assert metrics.reference is not None
    generator = Generator.load(
        network,
        state.device,
        sampler=sampler,
        steps=steps,
        seed=noise,
        batch_size=measure.batch_size,
        precision=precision,
        guidance=measure.guidance if guidance is None else guidance,
        data_captions=captions,
    )
    cell, images = evaluate_cell(
        network, generator, measure.num, metrics, state, keep=measure.pictured, progress=_Piece(progress)
    )
    record = {
        **_numbers(cell),
        "measure": cell_settings(measure),
        "weights": generator.model.fingerprint(),
        "noise": NOISE,
        "extractor": metrics.reference.fingerprint,
        "real_images": metrics.reference.n,
        "robustdiff": __version__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": state.device.type,
    }
    return record, images


class _Piece:
    """The progress of a piece of work over all of its parts."""

    def __init__(self, progress: Progress) -> None:
        self.advance = progress.advance

    def begin(self, description: str, total: float) -> None: ...


class _Whole:
    """The progress of several processes, as a percentage of the study's missing work."""

    def __init__(self, title: str, missing: list[Piece], progress: Progress) -> None:
        self.sizes = {piece.name: piece.size for piece in missing}
        self.shares = dict.fromkeys(self.sizes, 0.0)
        self.notes: dict[_Share, str] = {}
        self.said = 0.0
        self.progress = progress
        progress.begin(title, 100)

    def tell(self, process: _Share, share: float) -> None:
        """Report the share, in [0, 1], of its present piece that a process has done."""
        if process.name in self.shares:
            self.shares[process.name] = share
        self.notes[process] = f"{process.name} {share:.0%}" if process.name else ""
        done = sum(size * self.shares[name] for name, size in self.sizes.items())
        percent = round(100 * done / sum(self.sizes.values()), 1)
        self.progress.advance(percent - self.said, ", ".join(filter(None, self.notes.values())))
        self.said = percent


class _Share:
    """The progress of one of the processes that share a study. Beginning a piece marks its previous piece as done."""

    def __init__(self, whole: _Whole) -> None:
        self.whole = whole
        self.name, self.total, self.done = "", 1.0, 0.0

    def begin(self, description: str, total: float) -> None:
        self.whole.tell(self, 1.0)
        self.name, self.total, self.done = description, total or 1.0, 0.0
        self.whole.tell(self, 0.0)

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount
        self.whole.tell(self, min(1.0, self.done / self.total))


def reproduce(path: Path, folder: Path, *, progress: Progress = SILENT) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Repeat a cell from its file alone: train its recipe, or continue the run in ``folder``, and measure the result.

    Returns:
        The record in the file and the new one, for :func:`robustdiff.study.analysis.compare`, or None if a signal
        stopped the training. On the same machine and one thread, all but the times are equal to the last digit.

    Raises:
        InputError: If the file is not a cell of a study, or its images have another noise than those of this version.
    """
    before = read_json(path, limit=2**22)
    cell = reproducible(before, path)
    check_noise(path, cell.noise, "reproduce it with {version}")
    assert cell.sampler is not None
    assert cell.steps is not None
    assert cell.threads is not None
    cpu = cell.device == "cpu"
    torch.set_num_threads(cell.threads)
    after, guidance, noise = {}, None, cell.measure.noise_seed(cell.seed)
    if cell.reference is not None:
        assert cell.reference.data is not None
        name, data, precision = cell.reference.path, cell.reference.data, cell.reference.precision
        guidance = cell.reference.guidance
        noise = noise if cell.reference.seed is None else cell.reference.seed
    else:
        assert cell.recipe is not None
        name = str(folder / f"{cell.method}-s{cell.seed}")
        # Trackers of the original run are not used, and nothing is watched.
        recipe = cell.recipe.model_copy(update={"output": name, "trackers": (), "watch": None})
        data, precision = recipe.data, recipe.precision
        if not _train(recipe, progress, cpu):
            return None
        after = _training_settings(recipe)
    progress.begin(path.stem, cell.measure.num)
    record, _ = _measure(name, cell.measure, data, cell.sampler, cell.steps, precision, progress, noise, cpu, guidance)
    return before, {**before, **record, **after}
