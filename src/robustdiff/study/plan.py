"""The runs and cells of a study, each with its files.

    runs/M-sS/                    one training for each method M and seed S
    trainings/M-sS.json           its loss over the updates, and the time taken
    cells/M-sS-SAMPLER-N.json     the numbers of that run under one sampler at N steps
    cells/R-SAMPLER-N.json        the numbers of a reference R, a network that the study does not train
    mismatch/M-sS.json            if requested, the distance of the samplers' states from q(x_t)

A piece of work is done when its file exists; that of the mismatch, when it has every sampler and number of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from robustdiff.backbones.model import is_model_folder
from robustdiff.files import read_record
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.study.schema import Study
from robustdiff.training.run import network_settings
from robustdiff.training.run_files import read_result

__all__ = [
    "CELL",
    "REMEDY",
    "Cell",
    "Piece",
    "Run",
    "image_passes",
    "pieces",
    "plan",
    "reference_cells",
]

UPDATE = 4  # the time of an update for one image, in network evaluations
CELL = 1000  # the time of features and bootstrap of a cell, in network evaluations
REMEDY = "delete it, and run the study again"


class _Failure(BaseModel):
    """Hold the file of a training that failed; without settings, of robustdiff 0.2.0."""

    error: str
    settings: dict[str, Any] | None = None


class _Point(BaseModel):
    sampler: str
    steps: int


class _Measured(BaseModel):
    """Hold the samplers and numbers of steps of a mismatch file."""

    paths: tuple[_Point, ...]


@dataclass(frozen=True)
class Cell:
    """A network, named by its run or reference, under one sampler at one number of steps."""

    folder: Path
    network: str
    sampler: str
    steps: int

    @property
    def name(self) -> str:
        """Return the name of the cell's file, without the suffix."""
        return f"{self.network}-{self.sampler}-{self.steps}"

    @property
    def path(self) -> Path:
        """Return the path of the cell's file."""
        return self.folder / "cells" / f"{self.name}.json"

    @property
    def done(self) -> bool:
        """Return whether the cell is measured."""
        return self.path.is_file()


@dataclass(frozen=True)
class Run:
    """A training of a study: one method with one seed."""

    study: Study
    folder: Path
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return f"{self.method}-s{self.seed}"

    @property
    def round(self) -> int:
        """Return the index of the run's seed among the seeds of its method."""
        return self.study.methods[self.method].seeds.index(self.seed)

    @property
    def first(self) -> bool:
        """Return whether the run has the first seed of its method, for which more is measured and pictured."""
        return self.round == 0

    @property
    def output(self) -> Path:
        """Return the run's folder."""
        return self.folder / "runs" / self.name

    @cached_property
    def recipe(self) -> Recipe:
        """Return the run's recipe, which :func:`robustdiff.study.schema.load_study` has validated.

        The run is not watched, since the study measures it.
        """
        changes = {**self.study.set, **self.study.methods[self.method].set}
        own = {"seed": self.seed, "output": str(self.output), "watch": "none"}
        return load_recipe(self.study.recipe, changes={**changes, **own})

    @property
    def path(self) -> Path:
        """Return the path of the record of the training."""
        return self.folder / "trainings" / f"{self.name}.json"

    @property
    def done(self) -> bool:
        """Return whether the training is finished, with all the updates that the study has now."""
        result = self.output / "result.json"
        if not (self.path.is_file() and is_model_folder(self.output / "model") and result.is_file()):
            return False
        return read_result(result).steps >= self.recipe.steps

    @property
    def failure(self) -> Path:
        """Return the path of the file with the reason of a failure."""
        return self.path.with_suffix(".failed.json")

    @property
    def error(self) -> str | None:
        """Return why the training failed with the settings that it has now, with which it is not tried again.

        Raises:
            InputError: If the file with the reason is damaged.
        """
        if not self.failure.is_file():
            return None
        record = read_record(self.failure, _Failure, REMEDY)
        # Older records hold further settings, which do not affect the network.
        settings = network_settings(self.recipe)
        same = record.settings is None or settings == {name: record.settings.get(name) for name in settings}
        return record.error if same else None

    @property
    def mismatch_path(self) -> Path | None:
        """Return the path of the mismatch file, or None if the study does not measure the mismatch of this run."""
        measure = self.study.measure
        of = self.study.methods if measure.mismatch_methods is None else measure.mismatch_methods
        wanted = measure.mismatch and self.first and self.method in of
        return self.folder / "mismatch" / f"{self.name}.json" if wanted else None

    @property
    def mismatch_points(self) -> set[tuple[str, int]]:
        """Return the samplers and numbers of steps at which the mismatch is measured."""
        return set(itertools.product(self.study.measure.samplers, self.mismatch_steps))

    @property
    def mismatch_done(self) -> bool:
        """Return whether the mismatch has every sampler and number of steps, or is not measured for this run.

        Raises:
            InputError: If its file is damaged.
        """
        path = self.mismatch_path
        if path is None:
            return True
        if not path.is_file():
            return False
        return self.mismatch_points <= {(own.sampler, own.steps) for own in read_record(path, _Measured, REMEDY).paths}

    @property
    def missing(self) -> list[Path]:
        """Return the paths of missing or incomplete files, except for those of the training."""
        paths = [cell.path for cell in self.cells if not cell.done]
        return paths if self.mismatch_done or self.mismatch_path is None else [*paths, self.mismatch_path]

    @property
    def steps(self) -> tuple[int, ...]:
        """Return the numbers of steps at which the run is measured, in ascending order."""
        method = self.study.methods[self.method]
        return tuple(sorted(method.seed_steps.get(self.seed) or method.steps or self.study.measure.steps))

    @property
    def mismatch_steps(self) -> tuple[int, ...]:
        """Return the numbers of steps at which the run's mismatch is measured, in ascending order."""
        wanted = self.study.measure.mismatch_steps
        return self.steps if wanted is None else tuple(sorted(wanted))

    @property
    def cells(self) -> list[Cell]:
        """Return the cells of the run."""
        samplers = self.study.measure.samplers
        return [Cell(self.folder, self.name, sampler, count) for count in self.steps for sampler in samplers]


def plan(study: Study, folder: Path) -> list[Run]:
    """Return the runs of a study: the first seed of every method, then the second, and so on."""
    seeds = max(len(method.seeds) for method in study.methods.values())
    return [
        Run(study, folder, name, method.seeds[i])
        for i in range(seeds)
        for name, method in study.methods.items()
        if i < len(method.seeds)
    ]


def reference_cells(study: Study, folder: Path) -> list[Cell]:
    """Return the cells of a study's references."""
    return [
        Cell(folder, name, sampler, count)
        for name, reference in study.references.items()
        for count in sorted(reference.steps)
        for sampler in reference.samplers
    ]


def image_passes(recipe: Recipe) -> float:
    """Return the number of forward and backward passes of single images in a training."""
    return float(recipe.steps * recipe.batch_size * recipe.adversary.example().backward_passes)


@dataclass(frozen=True)
class Piece:
    """A piece of a study's work, done by one process.

    Attributes:
        kind: The kind of the work: a training, or the measurement of a cell or of a mismatch.
        name: The name of the piece and of its lock, unique in the study.
        size: The estimated time, in network evaluations for one image.
        run: The run that is trained or measured, or None for the cell of a reference.
        cell: The cell, or None for a training or a mismatch.
    """

    kind: Literal["training", "cell", "mismatch"]
    name: str
    size: float
    run: Run | None
    cell: Cell | None = None

    @property
    def done(self) -> bool:
        """Return whether the piece is finished, impossible since the training failed, or no longer needed."""
        if self.run is not None and self.run.error is not None:
            return True
        if self.cell is not None:
            return self.cell.done
        assert self.run is not None
        if self.kind == "training":
            return not self.run.missing or self.run.done
        return self.run.mismatch_done

    @property
    def ready(self) -> bool:
        """Return whether everything that the piece depends on is done."""
        return self.run is None or self.kind == "training" or self.run.done


def pieces(study: Study, folder: Path) -> list[Piece]:
    """Return the pieces of a study in the order in which they are started.

    The pieces of the first seed of every method come first, then those of the second, and so on. Within a round,
    trainings come before the other pieces, which depend on them. Larger pieces come before smaller ones, so that
    processes that share a study finish at about the same time.
    """
    measure = study.measure

    def all_pieces() -> Iterator[tuple[int, Piece]]:
        for cell in reference_cells(study, folder):
            yield 0, Piece("cell", cell.name, measure.num * cell.steps + CELL, None, cell)
        for run in plan(study, folder):
            yield run.round, Piece("training", f"training {run.name}", UPDATE * image_passes(run.recipe), run)
            for cell in run.cells:
                yield run.round, Piece("cell", cell.name, measure.num * cell.steps + CELL, run, cell)
            if run.mismatch_path is not None:
                calls = 2 * len(measure.samplers) * sum(run.mismatch_steps)  # at the sampler's states and true points
                yield run.round, Piece("mismatch", f"mismatch {run.name}", measure.mismatch * calls, run)

    ordered = sorted(all_pieces(), key=lambda item: (item[0], item[1].kind != "training", -item[1].size))
    return [piece for _, piece in ordered]
