"""The demonstrations: studies that come with the package and take minutes, or an hour at full size.

The shipped checkpoint is fine-tuned plainly, with a random perturbation, and adversarially (``studies/demo.yaml``), or
distilled into consistency models (``studies/demo-consistency.yaml``). The shipped text-to-image model is distilled into
latent consistency models (``studies/demo-text.yaml``). The study is written into the output folder as
``study.yaml``, with its trainings and cells, so that ``robustdiff study`` can read the same results.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from robustdiff.errors import InputError, printable
from robustdiff.evaluation.grid import Cell, Grid, differences
from robustdiff.evaluation.prompts import captions_of
from robustdiff.files import atomic_write
from robustdiff.metrics.bootstrap import BLOCKS, corrected, interval
from robustdiff.metrics.metric import number_named
from robustdiff.progress import SILENT, Progress
from robustdiff.report.page import read_picture
from robustdiff.report.results import write_results
from robustdiff.study.plan import plan, reference_cells
from robustdiff.study.run import run_study
from robustdiff.study.schema import Study, load_study
from robustdiff.study.store import Results, claim_study, read_results
from robustdiff.training.run_files import read_result
from robustdiff.workers import available_cores

__all__ = ["demo_study", "run_demo"]

# Updates of a training, and images of a cell.
FULL = {"demo": (1200, 5000), "demo-consistency": (6000, 5000), "demo-text": (3000, 1567)}
DATA = {
    "fashion-16": "fashion-16: 60,000 training images of Fashion-MNIST at 16×16",
    "emoji": "emoji: 17,237 training images of Noto's emoji on coloured backgrounds at 64×64, with captions",
}
NUMBERS = ("fid", "fid_corrected", "kid", "kid_se", "precision", "recall", "brightness")
MOST = 8  # processes, each of which takes half a gigabyte for torch


def demo_study(name: str, full: bool = False, seed: int = 0) -> Study:
    """Return the study "demo", "demo-consistency" or "demo-text" with one seed, or a larger one (``full``)."""
    study = load_study(name)
    updates, images = FULL[name] if full else (study.set["steps"], study.measure.num)
    measure = study.measure.model_copy(update={"seed": seed, "num": images})
    methods = {key: method.model_copy(update={"seeds": (seed,)}) for key, method in study.methods.items()}
    changes = {**study.set, "steps": updates}
    return study.model_copy(update={"set": changes, "methods": methods, "measure": measure})


def run_demo(
    study: Study, folder: Path, *, processes: int | None = None, progress: Progress = SILENT
) -> tuple[Grid, dict[str, Any]] | None:
    """Run the study of a demonstration, which has one seed, and write figures and ``result.json`` into a folder.

    Existing trainings and cells are kept, and interrupted trainings are resumed. Trainings of a smaller demonstration
    are continued if their learning rate is constant. The progress is a percentage of the work. The number of processes
    that share the work does not change the results: by default one for each core, at most 8, and one on a GPU.

    Returns:
        The grid of the methods, and the contents of ``result.json`` with the references' cells under their names, or
        None if a signal stopped the work.

    Raises:
        InputError: If the folder holds a demonstration of another size or seed, or something else.
        RunError: If a training fails, or a process is killed.
    """
    _claim(study, folder)
    processes = processes or (1 if torch.cuda.is_available() else min(MOST, available_cores()))
    if not run_study(study, folder, processes=processes, progress=progress):
        return None
    results = read_results(study, folder)
    grid, references = _grid(results), _references(results)
    first = next(iter(results.cells.values()))
    training = {}
    for run in plan(study, folder):
        result = read_result(run.output / "result.json")
        training[run.method] = {"recipe": run.recipe.model_dump(mode="json"), **result.as_dict()}
    settings = {
        "obtained_on": {
            "data": DATA[plan(study, folder)[0].recipe.data.name],
            "features": study.measure.features,
            "device": first["device"],
            "threads": processes,  # of one thread each
            "torch": first["torch"],
        },
        "seed": study.measure.seed,
        "noise": first["noise"],
        "training": training,
        **{name: [cell.record() for cell in cells] for name, cells in references.items()},
    }
    size = f"{study.set['steps']} updates, {study.measure.num} images a cell, seed {study.measure.seed}"
    beside = list(itertools.chain(*references.values()))
    return grid, write_results(folder, grid, f"{study.title}, {size}", settings, beside)


def _claim(study: Study, folder: Path) -> None:
    """Write the study file, or check that an existing one is of the same study, or of a smaller one to continue."""
    claim_study(folder)
    path = folder / "study.yaml"
    if path.is_file() and (before := load_study(path)) != study:
        sizes = [{"seed": s.measure.seed, "steps": s.set.get("steps"), "num": s.measure.num} for s in (before, study)]
        grown = before.model_copy(
            update={
                "set": {**before.set, "steps": study.set["steps"]},
                "measure": before.measure.model_copy(update={"num": study.measure.num}),
            }
        )
        runs = plan(study, folder)
        constant = all(run.recipe.lr_schedule == "constant" for run in runs)
        if grown != study or before.set["steps"] > study.set["steps"] or not constant:
            other = next((name for name in sizes[0] if sizes[0][name] != sizes[1][name]), "study")
            raise InputError(f"{printable(folder)} holds a demonstration with another {other}: choose another --output")
        for cell in itertools.chain(reference_cells(study, folder), *(run.cells for run in runs)):
            cell.path.unlink(missing_ok=True)  # of networks with fewer updates, or of fewer images
    text = yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def _cell(name: str, record: dict[str, Any]) -> Cell:
    """Convert a cell of a study to a cell of a grid."""
    needed = ("sampler", "steps", "n", "kid_se", "brightness", "seconds")
    if missing := [key for key in needed if record[key] is None]:
        raise InputError(f"a cell of {name} does not say its {missing[0]}: delete its file, and run again")
    numbers, others = {**record, **record["numbers"]}, record["other_replicates"]
    blocks = {"fid": BLOCKS, **record["blocks"]}
    replicates = {"fid": record["replicates"], **others}
    drawn = {key: np.array(values, dtype=np.float64) for key, values in replicates.items()}
    numbers["fid_corrected"] = corrected(numbers["fid"], drawn["fid"])
    return Cell(
        checkpoint=name,
        **{key: record[key] for key in ("sampler", "steps", "n", "seconds")},
        values={key: numbers[key] for key in (*NUMBERS, *others)},
        intervals={key: interval(numbers[key], drawn[key], blocks[key], number_named(key).log) for key in drawn},
        replicates=drawn,
        blocks=blocks,
    )


def _grid(results: Results) -> Grid:
    """Return the grid of the methods, with the differences of all pairs and the pictures."""
    (seed,) = {seed for _, seed, *_ in results.cells}
    measure = results.study.measure
    dataset = (measure.data or plan(results.study, Path())[0].recipe.data).load()
    pictured = min(measure.pictured, len(dataset))
    captions = [*captions_of(dataset)[:pictured]]
    if next(iter(results.cells.values()))["noise"] is None:  # of robustdiff 0.2.0, in the order of the data
        captions = dataset.first_captions(range(pictured)) or []
    grid = Grid([], [], {}, captions)
    for sampler, steps in itertools.product(results.samplers, results.steps):
        row = [_cell(method, results.cells[method, seed, sampler, steps]) for method in results.methods]
        for i, cell in enumerate(row):
            grid.cells.append(cell)
            grid.differences.extend(itertools.chain.from_iterable(differences(cell, other) for other in row[:i]))
            grid.samples[cell.checkpoint, sampler, steps] = _images(results, cell.checkpoint, sampler, steps)
    return grid


def _references(results: Results) -> dict[str, list[Cell]]:
    """Return the cells of each reference by name."""
    found: dict[str, list[Cell]] = {}
    for (name, *_), record in results.references.items():
        found.setdefault(name, []).append(_cell(name, record))
    return found


def _images(results: Results, method: str, sampler: str, steps: int) -> Tensor:
    """Return the images in a cell's picture, uint8 (k, C, H, W), where they are in a row with one-pixel frames."""
    path = results.pictures.get((method, sampler, steps))
    columns = results.study.measure.pictured
    if path is None:
        raise InputError(f"the picture of {method}, {sampler} {steps} is missing: delete its cell, and run again")
    pixels = torch.from_numpy(read_picture(path).copy())
    pixels = pixels.reshape(pixels.shape[0], columns, -1, 1 if pixels.ndim == 2 else 3)
    return pixels[1:-1, : results.study.measure.num, 1:-1].permute(1, 3, 0, 2)
