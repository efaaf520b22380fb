"""The files of a study: atomic writes and validated reads.

A file that was made with other settings than the study's is an error. A piece of work in progress is held by a lock
(:func:`robustdiff.files.held`), so that any number of processes can share a study.

A cell keeps its bootstrap replicates of FID, so that the interval of any difference can be computed later from two
files, and the whole recipe, so that the cell can be reproduced from its file alone. Since files may come from somebody
else, everything is written inside the study's folder, and not through symbolic links.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustdiff.data import DataConfig
from robustdiff.errors import InputError, first_mistake, printable
from robustdiff.evaluation.noise import check_noise
from robustdiff.files import MARKER, claim_folder, make_folder, read_record, write_json
from robustdiff.metrics.bootstrap import REPLICATES
from robustdiff.metrics.metric import METRICS, parse_metric
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.section import Precision, Text
from robustdiff.study.plan import REMEDY, Cell, Run, pieces, plan, reference_cells
from robustdiff.study.schema import Count, Guidance, Measurement, Name, Sampler, Seed, Study
from robustdiff.training.run import network_settings

__all__ = [
    "MEASURES",
    "CellRecord",
    "Loss",
    "Results",
    "Training",
    "cell_settings",
    "check_results",
    "claim_study",
    "read",
    "read_cell",
    "read_real",
    "read_results",
    "real_path",
    "reproducible",
    "write",
]

MEASURES = ("fid", "kid", "precision", "recall")
"""The numbers that every cell has. It has replicates of the first; those of further metrics are beside them."""

Number = Annotated[float, Field(strict=True, ge=-1e12, le=1e12)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Replicates = Annotated[tuple[Number, ...], Field(min_length=REPLICATES, max_length=REPLICATES)]


class _Record(BaseModel):
    """The required contents of a study's file; further fields are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Training(_Record):
    """The record of a training in a cell. All fields but the updates are used by the page alone."""

    steps: Whole
    batches: Whole | None = None
    backward_passes: Whole | None = None
    images: Whole | None = None
    delta_norm: Number | None = None
    data: Text | None = None


class _Network(_Record):
    """The record of a reference in a cell."""

    name: Name
    path: Text
    precision: Precision = "fp32"
    guidance: Guidance | None = None
    seed: Seed | None = None
    data: DataConfig | None = None


class CellRecord(_Record):
    """The numbers and settings of a cell. Fields with a default are needed for the page or for reproduction alone.

    In the file, each of ``numbers`` is a field of its own, and one that is not defined is left out. ``noise`` is the
    name of the images' noise, None for that of robustdiff 0.2.0 and before.
    """

    method: Name | None = None
    seed: Seed | None = None
    sampler: Sampler | None = None
    steps: Count | None = None
    numbers: dict[str, Number]
    replicates: Replicates
    other_replicates: dict[str, Replicates] = {}
    blocks: dict[str, Annotated[Whole, Field(ge=2)]] = {}
    measure: Measurement
    kid_se: Number | None = None
    fid_mean_term: Number | None = None
    brightness: Number | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    seconds: Annotated[Number, Field(ge=0)] | None = None
    threads: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    device: Text | None = None
    torch: Text | None = None
    weights: Text | None = None
    noise: Text | None = None
    training: Training | None = None
    recipe: Recipe | None = None
    reference: _Network | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if missing := [name for name in MEASURES if name not in values]:
            raise ValueError(f"{missing[0]} is missing")
        others = values.get("other_replicates", {})
        names = [*MEASURES, *(name for name in others if name in values)] if isinstance(others, dict) else [*MEASURES]
        names += (name for name in _named(values) if values.get(name) is not None)
        return {**values, "numbers": {name: values[name] for name in names}}


def _named(values: dict[str, Any]) -> list[str]:
    """Return the numbers of the metrics that a cell names as further ones."""
    measure = values.get("measure")
    metrics = measure.get("metrics", ()) if isinstance(measure, dict) else ()
    names = [parse_metric(text)[0] for text in metrics if isinstance(text, str)] if isinstance(metrics, list) else []
    return [number.name for name in names if name in METRICS for number in METRICS[name].numbers]


class Loss(_Record):
    """The file of a training."""

    seconds: Annotated[Number, Field(ge=0)]
    step: Annotated[tuple[Whole, ...], Field(min_length=1, max_length=1000)]
    loss: Annotated[tuple[Number, ...], Field(max_length=1000)]

    @model_validator(mode="after")
    def _paired(self) -> Loss:
        if len(self.step) != len(self.loss):
            raise ValueError(f"{len(self.loss)} values of the loss at {len(self.step)} updates")
        return self


class _Estimate(_Record):
    value: Number
    floor: Number | None


class _Path(_Record):
    sampler: Sampler
    steps: Count
    mean: dict[str, _Estimate]

    @model_validator(mode="after")
    def _whole(self) -> _Path:
        if missing := [name for name in MISMATCHES if name not in self.mean]:
            raise ValueError(f"{missing[0]} is missing")
        return self


class _Mismatch(_Record):
    paths: tuple[_Path, ...]
    noise: Text | None = None
    updates: Whole | None = None
    n: Whole | None = None
    images_seed: Seed | None = None


_Kind = TypeVar("_Kind", bound=_Record)


def read(path: Path, kind: type[_Kind], remedy: str = REMEDY) -> _Kind:
    """Read and validate a file of a study.

    Raises:
        InputError: If it is not whole.
    """
    return read_record(path, kind, remedy, 2**22)


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a file of a study atomically.

    Raises:
        NotFiniteError: If a number is not finite.
    """
    make_folder(path.parent)  # raises if it is a link out of the study's folder
    write_json(path, record)


def claim_study(folder: Path) -> None:
    """Create the folder of a study, or check that a folder is of a study.

    Studies of robustdiff 0.2.0 and before have no marker, and neither have results without trainings, such as those of
    a repository. They are known by their cells or a study file, and stay without it.

    Raises:
        InputError: If the folder holds a run or something else, or is a link.
        OSError: If the folder cannot be created or written.
    """
    files = {path.name for path in folder.glob("*.yaml")}
    if "recipe.yaml" in files:
        raise InputError(f"{printable(folder)} holds a run, and not a study: choose another --output")
    if not (folder / MARKER).exists() and (files or (folder / "cells").exists()):
        make_folder(folder)
    else:
        claim_folder(folder, "a study")


def cell_settings(measure: Measurement) -> dict[str, Any]:
    """Return the settings of a measurement that affect a cell's numbers."""
    others = {"samplers", "steps", "pictured", "mismatch", "mismatch_steps", "mismatch_methods", "real"}
    return measure.model_copy(update={"data": _images(measure.data)}).model_dump(mode="json", exclude=others)


def _images(data: DataConfig | None) -> DataConfig | None:
    """Return the description of images, whatever the number of processes that load them."""
    return None if data is None else data.model_copy(update={"workers": 0})


def read_cell(cell: Cell, study: Study, run: Run | None) -> dict[str, Any]:
    """Return the numbers and settings of a cell's file; the run is None for the cell of a reference.

    Raises:
        InputError: If the file is damaged, or was made with other settings than the study's.
    """
    remedy = "restore them, delete the file, or choose another --output"
    record = read(cell.path, CellRecord)
    same = cell_settings(record.measure) == cell_settings(study.measure)
    if run is not None:
        if record.recipe is None or record.training is None:
            raise InputError(f"{printable(cell.path)} is not a cell of this study: {remedy}")
        own = (run.method, run.seed, cell.sampler, cell.steps)
        said = (record.method, record.seed, record.sampler, record.steps)
        same = same and all(value in (None, mine) for value, mine in zip(said, own, strict=True))
        same = same and network_settings(record.recipe) == network_settings(run.recipe)
        same = same and record.training.steps == record.recipe.steps
    else:
        if record.reference is None:
            raise InputError(f"{printable(cell.path)} is not a cell of this study: {remedy}")
        reference = study.references[cell.network]
        names = ["path", "guidance", "seed"]
        names += ["precision"] * ("precision" in record.reference.model_fields_set)  # which some old cells do not have
        same = same and all(getattr(record.reference, name) == getattr(reference, name) for name in names)
        if record.reference.data is not None:
            same = same and _images(record.reference.data) == _images(plan(study, cell.folder)[0].recipe.data)
    if not same:
        raise InputError(f"{printable(cell.path)} was made with other settings than the study's: {remedy}")
    return record.model_dump(mode="json")


def _read_mismatch(path: Path, run: Run) -> _Mismatch:
    """Return the contents of a mismatch file, if its network and images are those of the study."""
    record, measure = read(path, _Mismatch), run.study.measure
    for found, wanted, what in (
        (record.updates, run.recipe.steps, f"a network with {record.updates} updates"),
        (record.n, measure.mismatch, f"{record.n} images"),
        (record.images_seed, measure.noise_seed(run.seed), f"images of the seed {record.images_seed}"),
    ):
        if found not in (None, wanted):
            raise InputError(f"{printable(path)} is of {what}, and the study's is {wanted}: delete the file")
    return record


def real_path(folder: Path) -> Path:
    """Return the path of the file with the numbers of real images."""
    return folder / "cells" / "real.json"


def read_real(study: Study, folder: Path) -> dict[str, Any] | None:
    """Return the numbers of other real images, or None if they are not wanted or not measured.

    Raises:
        InputError: If the file is damaged, or was made with other settings than the study's.
    """
    path = real_path(folder)
    if study.measure.real is None or not path.is_file():
        return None
    record = read(path, CellRecord)
    same = _images(record.measure.real) == _images(study.measure.real)
    if not same or cell_settings(record.measure) != cell_settings(study.measure):
        raise InputError(f"{printable(path)} was made with other settings than the study's: delete the file")
    return record.model_dump(mode="json")


def check_results(study: Study, folder: Path) -> None:
    """Check that existing results were made with the study's settings. A run may have fewer updates.

    Raises:
        InputError: If a cell or a run was made with other settings, or with other noise than those that are missing.
    """
    noises: dict[Path, str | None] = {}
    for run in plan(study, folder):
        path = run.output / "recipe.yaml"
        if path.is_file():
            before = load_recipe(str(path))
            shorter = {"steps": run.recipe.steps} if before.steps < run.recipe.steps else {}
            if network_settings(before.model_copy(update=shorter)) != network_settings(run.recipe):
                raise InputError(
                    f"{run.output} was trained with other settings than the study's: restore them, delete the folder, "
                    "or choose another --output"
                )
        for cell in run.cells:
            if cell.done:
                noises[cell.path] = read_cell(cell, study, run)["noise"]
        if (mismatch := run.mismatch_path) is not None and mismatch.is_file():
            noises[mismatch] = _read_mismatch(mismatch, run).noise
    for cell in reference_cells(study, folder):
        if cell.done:
            noises[cell.path] = read_cell(cell, study, None)["noise"]
    if any(not piece.done for piece in pieces(study, folder)):
        for path, noise in noises.items():
            check_noise(path, noise)


def reproducible(record: Any, path: Path) -> CellRecord:
    """Return the record of a cell that has everything needed to reproduce it.

    Raises:
        InputError: If a field is missing or malformed.
    """
    try:
        cell = CellRecord.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{printable(path)} is not a cell of a study: {first_mistake(error)}") from None
    needed = ["sampler", "steps", "threads", "device", "weights"]
    if cell.reference is None:
        needed += ["method", "seed", "recipe"]
    elif cell.reference.data is None:
        needed += ["reference.data"]
    if missing := [name for name in needed if getattr(cell, name, None) is None]:
        raise InputError(f"{printable(path)} is not a cell of a study: {missing[0]} is missing")
    return cell


@dataclass
class Results:
    """The existing results of a study.

    Attributes:
        cells: The records of the methods' cells, by method, seed, sampler and steps.
        references: The records of the references' cells, by name, sampler and steps.
        mismatch: The records of the mismatch, by method, seed, sampler and steps.
        pictures: The paths of pictures, by method, sampler and steps.
        missing: The number of missing files, by run or reference.
        failed: The errors of failed trainings, by run.
        planned: The number of cells that the study plans.
        real: The record of other real images, or None.
    """

    study: Study
    cells: dict[tuple[str, int, str, int], dict[str, Any]] = field(default_factory=dict)
    references: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    mismatch: dict[tuple[str, int, str, int], dict[str, Any]] = field(default_factory=dict)
    pictures: dict[tuple[str, str, int], Path] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    planned: int = 0
    real: dict[str, Any] | None = None

    @cached_property
    def methods(self) -> list[str]:
        """Return the methods that have cells, in the study's order."""
        present = {method for method, *_ in self.cells}
        return [method for method in self.study.methods if method in present]

    @cached_property
    def samplers(self) -> list[str]:
        """Return the samplers for which methods have cells."""
        return [sampler for sampler in self.study.measure.samplers if any(key[2] == sampler for key in self.cells)]

    @cached_property
    def steps(self) -> list[int]:
        """Return the numbers of steps for which methods have cells, in ascending order."""
        return sorted({key[3] for key in self.cells})

    @property
    def middle_steps(self) -> int:
        """Return the number of steps at which methods are compared: 10, or the middle one."""
        return 10 if 10 in self.steps else self.steps[len(self.steps) // 2]

    def record_of(self, method: str) -> dict[str, Any]:
        """Return the record of a cell of a method. All of them hold the same recipe, except for the seed."""
        return next(record for (name, *_), record in self.cells.items() if name == method)


def read_results(study: Study, folder: Path) -> Results:
    """Read the existing results of a study.

    Raises:
        InputError: If the baseline has no cell, or a file is damaged or was made with other settings, or the cells have
            not all the same noise.
    """
    results = Results(study, real=read_real(study, folder))
    for run in plan(study, folder):
        method = run.method
        results.planned += len(run.cells)
        for cell in run.cells:
            if cell.done:
                results.cells[method, run.seed, cell.sampler, cell.steps] = read_cell(cell, study, run)
            if run.first and cell.path.with_suffix(".png").is_file():
                results.pictures[method, cell.sampler, cell.steps] = cell.path.with_suffix(".png")
        if run.missing:
            results.missing[run.name] = len(run.missing)
        if run.error is not None:
            results.failed[run.name] = run.error
        if (path := run.mismatch_path) is not None and path.is_file():
            for found in _read_mismatch(path, run).paths:
                if (found.sampler, found.steps) in run.mismatch_points:
                    results.mismatch[method, run.seed, found.sampler, found.steps] = found.model_dump()
    for cell in reference_cells(study, folder):
        results.planned += 1
        if cell.done:
            results.references[cell.network, cell.sampler, cell.steps] = read_cell(cell, study, None)
        else:
            results.missing[cell.network] = results.missing.get(cell.network, 0) + 1
    if not any(method == study.baseline for method, *_ in results.cells):
        raise InputError(f"no cells of {study.baseline} in {folder / 'cells'}: run the study first")
    records = [*results.cells.values(), *results.references.values()]
    if len({record["noise"] for record in records}) > 1:
        raise InputError(
            f"{printable(folder / 'cells')} holds cells of images with two kinds of noise (the field noise), which are "
            "not compared: remove those of one kind"
        )
    return results
