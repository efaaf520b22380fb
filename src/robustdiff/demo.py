"""The demonstration: three fine-tunings of one checkpoint on real images, and the evidence.

The shipped base checkpoint is fine-tuned on fashion-16 plainly, with a random perturbation of adversarial training's
size, and with free adversarial training. Each makes the same number of optimiser updates, one backward pass each, at
the same batch size, learning rate and moving average; all read the same sequence of batches, times and noise.
Plain fine-tuning makes one update on each batch, the other two K, and so they see the first K-th of the sequence.
Then FID over samplers and steps, from the same noise.

The second demonstration distils the checkpoint into consistency models instead: plainly, and with adversarial training
of the solver's output or of the student's input, again for equally many updates. All start from the same network, the
checkpoint fine-tuned as a denoiser over noise levels. FID at 1, 2, 4 and 8 steps, and the teacher's at 10 and 50.

Trainings and cells of the grid are tasks that processes of one thread share (:mod:`robustdiff.workers`). A cell is a
file, ``cells/METHOD-SAMPLER-STEPS.json``, with what it was made of.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from robustdiff.data import load_dataset
from robustdiff.errors import InputError
from robustdiff.evaluation.features import FeatureExtractor, load_extractor
from robustdiff.evaluation.fidelity import Reference, reference_statistics
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import Cell, Grid, difference, evaluate_cell
from robustdiff.files import atomic_write, make_folder, read_json
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.report.results import write_results
from robustdiff.training.trainer import FREE_TO_CHANGE, read_result, train
from robustdiff.workers import Report, Stopped, Task, available_cores, run_tasks

__all__ = ["FULL", "FULL_CONSISTENCY", "QUICK", "QUICK_CONSISTENCY", "DemoSize", "run_consistency_demo", "run_demo"]


METHODS = {"plain": "none", "random": "random", "free AT": "free"}
SAMPLERS = ("ddim", "iddpm", "dpm++")
STEPS = (5, 10, 20, 50)
DISTILLED = {
    "plain": ["adversary=none"],
    "AT (solver)": ["objective.perturb=solver"],
    "AT (student)": ["objective.perturb=student"],
}
DISTILLED_STEPS = (1, 2, 4, 8)
STUDENT, TEACHER = "fashion-16-edm", "fashion-16"
TEACHER_STEPS = (10, 50)
DATA = FEATURES = "fashion-16"
REPLICATES = 200  # of the bootstrap
BATCH = 64  # images at a time: more do not fit into the cache of a core
MOST = 8  # processes: each holds torch, half a gigabyte
UPDATE_WEIGHT = {"denoising": 4, "consistency": 6}  # an update's time for one image, in evaluations of the network
CELL_WEIGHT = 1000  # a cell's time beside its images' evaluations: their features, the bootstrap

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class DemoSize:
    """How much the demonstration does. Arguments: updates: of each fine-tuning; images: of each cell."""

    updates: int
    images: int


QUICK = DemoSize(updates=300, images=500)
FULL = DemoSize(updates=1200, images=5000)
QUICK_CONSISTENCY = DemoSize(updates=300, images=500)
FULL_CONSISTENCY = DemoSize(updates=6000, images=5000)


@dataclass(frozen=True)
class _Network:
    """A network that is sampled from: that of a training, or an existing one. Attributes: as of a generator."""

    name: str
    path: str
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    precision: str
    recipe: Recipe | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """Return the record of its training; None while that is not finished."""
        path = Path(self.path) / "result.json"
        if self.recipe is None or not path.exists():
            return None
        result = read_result(path)
        return result if result["steps"] == self.recipe.steps else None

    def generator(self, seed: int, sampler: str, steps: int, device: torch.device | str = "cpu") -> Generator:
        """Return the generator of its images."""
        return Generator.load(
            self.path,
            device,
            sampler=sampler,
            steps=steps,
            seed=seed,
            precision=self.precision,
            batch_size=BATCH,
        )

    @property
    def fingerprint(self) -> str | None:
        """Return the fingerprint of its parameters; None while they are not trained."""
        if self.recipe is not None and self.result is None:
            return None
        return self.generator(0, self.samplers[0], self.steps[0]).fingerprint()


@dataclass(frozen=True)
class _Measured:
    """A cell, its bootstrap replicates of FID, and its first images, uint8 (k, C, H, W)."""

    cell: Cell
    replicates: NDArray[np.float64]
    images: Tensor


@dataclass(frozen=True)
class _CellFile:
    """One cell of one network, and the file that it is kept in."""

    network: _Network
    sampler: str
    steps: int
    images: int
    seed: int
    path: Path

    def made_of(self, weights: str, device: str) -> dict[str, Any]:
        """Return all settings that its numbers depend on."""
        return {
            "weights": weights,
            "sampler": self.sampler,
            "steps": self.steps,
            "images": self.images,
            "seed": self.seed,
            "precision": self.network.precision,
            "batch_size": BATCH,
            "data": DATA,
            "features": load_extractor(FEATURES).fingerprint,
            "device": device,
        }

    def read(self, weights: str | None) -> _Measured | None:
        """Read the file; None if there is none, or it is of other settings or weights."""
        if weights is None or not self.path.exists():
            return None
        try:
            record = read_json(self.path)
            if record["made_of"] != self.made_of(weights, _device().type):
                return None
            cell = _CELL.validate_python(record["cell"])
            replicates = np.array(record["replicates"], dtype=np.float64)
            images = torch.tensor(record["images"])
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError):
            return None  # not whole: it is made again
        named = (cell.checkpoint, cell.sampler, cell.steps, cell.n) == (
            self.network.name,
            self.sampler,
            self.steps,
            self.images,
        )
        pixels = images.dtype == torch.int64 and images.ndim == 4 and ((images >= 0) & (images <= 255)).all()
        if not (named and pixels and replicates.shape == (REPLICATES,)):
            return None
        return _Measured(cell, replicates, images.to(torch.uint8))

    def make(self, report: Report) -> None:
        """Make its images, measure them, and write the file."""
        extractor, reference = _real_images()
        generator = self.network.generator(self.seed, self.sampler, self.steps, _device())
        done = 0

        def on_images(n: int) -> None:
            nonlocal done
            done += n
            if report(done / self.images):
                raise Stopped

        AcceleratorState._reset_state()  # a training in this process may have had another precision
        cell, replicates, images = evaluate_cell(
            self.network.name, generator, self.images, extractor, reference, Accelerator(), on_images=on_images
        )
        record = {
            "made_of": self.made_of(generator.fingerprint(), _device().type),
            "cell": asdict(cell),
            "replicates": replicates.tolist(),
            "images": images.tolist(),
        }
        with atomic_write(self.path) as file:
            file.write(json.dumps(record).encode())


_CELL = TypeAdapter(Cell)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _real_images() -> tuple[FeatureExtractor, Reference]:
    """The features, and the real images under them."""
    extractor = load_extractor(FEATURES, device=_device())
    return extractor, reference_statistics(load_dataset(DATA), extractor)


def _find_real_images(report: Report) -> None:
    """Put the statistics of the real images into the cache, where all processes find them."""
    _real_images()


def _fine_tune(recipe: Recipe, report: Report) -> None:
    """Train a recipe, or go on with it."""

    class Watch:
        done, stopping = 0.0, False

        def begin(self, description: str, total: float) -> None: ...

        def advance(self, amount: float, note: str = "") -> None:
            self.done += amount
            if not self.stopping and report(self.done / recipe.steps):
                self.stopping = True
                signal.raise_signal(signal.SIGTERM)  # at the first of which train saves and stops

    # That a stopped one is saved the command line says of the whole.
    log = logging.getLogger(train.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        result = train(recipe, resume=True, progress=Watch())
    finally:
        log.setLevel(level)
    if result is None:
        raise Stopped


def _check(output: Path, recipe: Recipe) -> None:
    """See that what a folder holds of a training is of the same demonstration, or of a shorter one to go on from."""
    path = Path(recipe.output) / "recipe.yaml"
    if not path.is_file():
        return
    before = load_recipe(str(path))
    for name in Recipe.model_fields:
        grown = name == "steps" and before.steps < recipe.steps and recipe.lr_schedule == "constant"
        if name not in FREE_TO_CHANGE and not grown and getattr(before, name) != getattr(recipe, name):
            raise InputError(f"{output} holds a demonstration with another {name}: choose another --output")


def _tasks(networks: list[_Network], cells: list[_CellFile]) -> list[Task]:
    """Return the tasks that are left: the trainings first, then the largest cells."""
    tasks = []
    for network in networks:
        if network.recipe is not None and network.result is None:
            recipe = network.recipe
            name = getattr(recipe.objective, "name", "denoising")
            weight = UPDATE_WEIGHT[name] * recipe.steps * recipe.batch_size
            tasks.append(Task(network.name, partial(_fine_tune, recipe), weight))
    trained = [task.name for task in tasks]
    weights = {network.name: network.fingerprint for network in networks}
    missing = [cell for cell in cells if cell.read(weights[cell.network.name]) is None]
    if missing:
        tasks.append(Task("real images", _find_real_images, CELL_WEIGHT))
    for cell in sorted(missing, key=lambda cell: -cell.steps):
        name = cell.network.name
        needs = ("real images", *(other for other in trained if other == name))
        weight = cell.images * cell.steps + CELL_WEIGHT
        tasks.append(Task(f"{name} {cell.sampler} {cell.steps}", cell.make, weight, needs))
    return tasks


def _work(
    output: Path, networks: list[_Network], size: DemoSize, seed: int, processes: int, on_progress: Progress
) -> dict[tuple[str, str, int], _Measured] | None:
    """Do what is not done yet, and return all cells by network, sampler and steps; None when a signal stopped it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the demonstration starts processes of its own: start it once, without accelerate or torchrun")
    for network in networks:
        if network.recipe is not None:
            _check(output, network.recipe)
    folder = output / "cells"
    for path in (output, output / "runs", folder):
        make_folder(path)
    cells = [
        _CellFile(network, sampler, count, size.images, seed, folder / f"{_slug(network.name)}-{sampler}-{count}.json")
        for network in networks
        for sampler, count in itertools.product(network.samplers, network.steps)
    ]
    tasks = _tasks(networks, cells)
    if tasks and run_tasks(tasks, processes, lambda done, note: on_progress(round(100 * done, 1), note)) is None:
        return None
    weights = {network.name: network.fingerprint for network in networks}
    measured = {}
    for cell in cells:
        found = cell.read(weights[cell.network.name])
        if found is None:
            raise InputError(f"{cell.path} was changed while the demonstration ran: run it again")
        measured[cell.network.name, cell.sampler, cell.steps] = found
    return measured


def _grid(networks: list[_Network], measured: dict[tuple[str, str, int], _Measured]) -> Grid:
    """The cells of networks with the same samplers and steps, with the differences of all pairs."""
    names = [network.name for network in networks]
    cells, differences = [], []
    for sampler, count in itertools.product(networks[0].samplers, networks[0].steps):
        row = [measured[name, sampler, count] for name in names]
        for i, one in enumerate(row):
            cells.append(one.cell)
            differences += [difference(one.cell, one.replicates, o.cell, o.replicates) for o in row[:i]]
    samples = {key: found.images for key, found in measured.items() if key[0] in names}
    return Grid(cells, differences, samples)


def _settings(networks: list[_Network], seed: int, processes: int) -> dict[str, Any]:
    """Return the settings that ``result.json`` says before the numbers."""
    training = {n.name: {"recipe": n.recipe.model_dump(mode="json"), **(n.result or {})} for n in networks if n.recipe}
    return {
        "obtained_on": {
            "data": "fashion-16: 60,000 training images of Fashion-MNIST at 16×16",
            "features": FEATURES,
            "device": _device().type,
            "threads": processes,  # of one thread each
            "torch": torch.__version__,
        },
        "seed": seed,
        "training": training,
    }


def _slug(method: str) -> str:
    return method.translate({ord(" "): "-", ord("("): None, ord(")"): None}).lower()


def _network(output: Path, method: str, recipe: str, overrides: list[str], grid: tuple[Any, Any]) -> _Network:
    """A method's network, trained by a shipped recipe."""
    folder = output / "runs" / _slug(method)
    made = load_recipe(recipe, [*overrides, "threads=1", f"output={folder}"])
    return _Network(method, str(folder), *grid, made.precision, made)


def _default_processes() -> int:
    return 1 if torch.cuda.is_available() else min(MOST, available_cores())


def run_demo(
    output: Path,
    size: DemoSize,
    seed: int = 0,
    *,
    processes: int | None = None,
    on_progress: Progress = lambda percent, note: None,
) -> tuple[Grid, dict[str, Any]] | None:
    """Fine-tune, evaluate, and write figures and ``result.json`` into a folder.

    Fine-tunings and cells that are there already are not made again, and fine-tunings that were interrupted go on.

    Arguments:
        output: The folder.
        size: How much to do.
        seed: Of the batches, the noise and the samples.
        processes: How many share the work, which does not change the results; by default one for each core that there
            is, at most 8, and 1 on a GPU.
        on_progress: Called with the percentage of the work that is done, and what is being done.

    Returns:
        The grid and what ``result.json`` holds; None when a signal stopped it.

    Raises:
        InputError: If the folder holds a demonstration of another size or seed.
        RunError: If a training fails, or a process is killed.
    """
    processes = processes or _default_processes()
    networks = [
        _network(
            output,
            method,
            "fashion-16-at",
            [f"adversary.name={adversary}", f"steps={size.updates}", f"seed={seed}", "ema=auto"],
            (SAMPLERS, STEPS),
        )
        for method, adversary in METHODS.items()
    ]
    measured = _work(output, networks, size, seed, processes, on_progress)
    if measured is None:
        return None
    grid = _grid(networks, measured)
    what = f"fashion-16, {size.updates} updates, {size.images} images a cell, seed {seed}"
    return grid, write_results(output, grid, what, _settings(networks, seed, processes))


def run_consistency_demo(
    output: Path,
    size: DemoSize,
    seed: int = 0,
    *,
    processes: int | None = None,
    on_progress: Progress = lambda percent, note: None,
) -> tuple[Grid, dict[str, Any]] | None:
    """Distil the checkpoint, evaluate, and write figures and ``result.json`` into a folder.

    Distillations and cells that are there already are not made again, and distillations that were interrupted go on.

    Arguments:
        output: The folder.
        size: How much to do.
        seed: Of the batches, the noise and the samples.
        processes: As in :func:`run_demo`.
        on_progress: As in :func:`run_demo`.

    Returns:
        The grid of the consistency models and what ``result.json`` holds, the teacher's cells included; None when a
        signal stopped it.

    Raises:
        InputError: If the folder holds a demonstration of another size or seed.
        RunError: If a training fails, or a process is killed.
    """
    processes = processes or _default_processes()
    start = [f"model.path={STUDENT}", f"objective.teacher={TEACHER}"]
    rest = [f"steps={size.updates}", f"seed={seed}", "ema=auto"]
    networks = [
        _network(
            output,
            method,
            "fashion-16-consistency",
            [*start, *overrides, *rest],
            (("multistep",), DISTILLED_STEPS),
        )
        for method, overrides in DISTILLED.items()
    ]
    teacher = _Network("teacher", TEACHER, ("ddim",), TEACHER_STEPS, networks[0].precision)
    measured = _work(output, [*networks, teacher], size, seed, processes, on_progress)
    if measured is None:
        return None
    grid = _grid(networks, measured)
    beside = [measured["teacher", "ddim", count].cell for count in TEACHER_STEPS]
    what = f"distillation on fashion-16, {size.updates} updates, {size.images} images a cell, seed {seed}"
    settings = {**_settings(networks, seed, processes), "teacher": [asdict(cell) for cell in beside]}
    return grid, write_results(output, grid, what, settings, beside)
