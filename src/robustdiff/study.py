r"""A study: fine-tunings × seeds × samplers × steps from one base, each result a file.

A study file names a recipe, what each method changes in it, and how the results are measured. Its work falls into

    runs/M-sS/                    one training for each method M and seed S
    trainings/M-sS.json           its loss over the updates, and how long it took
    cells/M-sS-SAMPLER-N.json     FID, KID, precision and recall of that run under one sampler at N steps
    cells/R-SAMPLER-N.json        the same of a reference R, a network as it is, such as the base or a teacher
    mismatch/M-sS.json            where asked for: how far its samplers' states are from q(x_t)

and a piece of work is done when its file exists. A file that was made with other settings than the study now says is an
error, not a result. Files are written atomically, trainings resume, and so an interrupted
study goes on where it was. A piece that is being worked on is held by a lock of the operating system (flock), which
goes away with the process that holds it: any number of processes share a study, and none waits for a dead one.

All cells start from the same noise (:mod:`robustdiff.evaluation.generate`), all runs of one seed read the same batches,
times and noise (:mod:`robustdiff.training.stream`). A cell keeps its bootstrap replicates of FID, so that the interval
of any difference can be had later from two files, and the whole recipe, so that it can be made again from its file
alone: :func:`reproduce`.

Study files and cells may be somebody else's: names are those of files in the study's folder and nothing else, numbers
are finite and bounded, and what is written goes into that folder, through no symbolic link.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustdiff.data.pixels import tile
from robustdiff.errors import InputError, RunError, printable
from robustdiff.evaluation.features import load_extractor
from robustdiff.evaluation.fidelity import REPLICATES, reference_statistics
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import evaluate_cell
from robustdiff.files import atomic_write, make_folder, open_regular, read_json
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
from robustdiff.mismatch.measure import measure_mismatch
from robustdiff.recipe import DataConfig, Recipe, load_recipe
from robustdiff.samplers.sample import SAMPLERS
from robustdiff.section import Precision, Section, Text
from robustdiff.training.build import build_model
from robustdiff.training.trainer import FREE_TO_CHANGE, train
from robustdiff.yaml_reader import parse_yaml, read_yaml

__all__ = [
    "MEASURES",
    "Cell",
    "Measurement",
    "Method",
    "Reference",
    "Remaining",
    "Run",
    "Study",
    "check_results",
    "load_study",
    "plan",
    "read_cell",
    "read_failure",
    "read_loss",
    "read_mismatch",
    "reference_cells",
    "remaining",
    "reproduce",
    "run_study",
]

MEASURES = ("fid", "kid", "precision", "recall")
PICTURED = 8  # images of a cell in its picture
MOST_METHODS = 256
MOST_CELLS = 100_000


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("the same value is given twice")
    return values


def _known(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name[:100]!r}: use {', '.join(SAMPLERS)}")
    return name


def _file_name(name: str) -> str:
    # One that begins with _ would be left out of a figure's legend, and one with - taken for an option.
    if not re.fullmatch(r"[^\W_][\w.+-]*", name):
        raise ValueError(
            f"the name {name[:100]!r} is that of files: use letters, digits and . + - _ only, a letter or digit first"
        )
    if len(name.encode()) > 150:
        raise ValueError(f"the name {name[:100]!r}… is that of files: use at most 150 bytes")
    return name


def _of_methods(values: dict[str, Any]) -> dict[str, Any]:
    for name in values:
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ValueError(f"{name[:100]!r} is no dotted name of a field, such as adversary.step_size")
        if (field := name.split(".")[0]) in ("seed", "output"):
            raise ValueError(f"{field} is the study's own: seeds are listed, and the folder is that of the study")
    return values


Name = Annotated[str, AfterValidator(_file_name)]
Sampler = Annotated[str, AfterValidator(_known)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=1, le=100_000)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=10_000), AfterValidator(_distinct)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=1000), AfterValidator(_distinct)]
Samplers = Annotated[tuple[Sampler, ...], Field(min_length=1, max_length=100), AfterValidator(_distinct)]
Changes = Annotated[dict[str, Any], AfterValidator(_of_methods)]


class Method(Section):
    """One way of training: what it changes in the study's recipe."""

    set: Changes = Field({}, description="fields by their dotted names, such as adversary.step_size: 0.5")
    seeds: Seeds = (0,)
    steps: Counts | None = Field(None, description="numbers of evaluations; those of the study by default")
    seed_steps: dict[Seed, Counts] = Field({}, description="the same for a seed that has others")
    baseline: Name | None = Field(None, description="the method it is compared with; the study's by default")

    @model_validator(mode="after")
    def _of_its_seeds(self) -> Method:
        for seed in self.seed_steps:
            if seed not in self.seeds:
                raise ValueError(f"seed_steps: {seed} is not one of the seeds {', '.join(map(str, self.seeds))}")
        return self


class Reference(Section):
    """A network that is measured as it is, beside the methods."""

    path: Text = Field(description="a run, a pipeline folder, or a model shipped with the package")
    samplers: Samplers
    steps: Counts
    precision: Precision = "fp32"


class Measurement(Section):
    """How a run is measured."""

    samplers: Samplers = ("iddpm", "ddim", "es", "dpm++")
    steps: Counts = (5, 8, 10, 20, 50)
    num: int = Field(5000, ge=4, le=10**7, description="images of a cell")
    seed: Seed = Field(0, description="of the images' noise")
    batch_size: int = Field(64, ge=1, le=2**20)
    mismatch: int = Field(
        0, ge=0, le=10**7, description="images of the mismatch, measured for the first seed; 0: not measured"
    )
    mismatch_steps: Counts | None = Field(None, description="at which it is; those of the cells by default")
    mismatch_methods: tuple[Name, ...] | None = Field(None, description="of which it is; all by default")
    features: Text = "fashion-16"
    weights: Text | None = Field(None, description="Inception's weights file")
    data: DataConfig | None = Field(None, description="the real images; those of the recipe by default")

    @model_validator(mode="after")
    def _enough(self) -> Measurement:
        if 0 < self.mismatch < 40:
            raise ValueError(f"mismatch needs 40 images or more, or 0; got {self.mismatch}")
        return self


class Study(Section):
    """A study file."""

    title: Annotated[str, Field(max_length=1000)]
    recipe: Text = Field(description="a recipe that comes with the package, or a file")
    set: Changes = Field({}, description="what all methods change in the recipe")
    baseline: Name = Field(description="the method that the others are compared with")
    compare: tuple[tuple[Name, Name], ...] = Field((), description="more pairs: a method, and what it is compared with")
    methods: dict[Name, Method] = Field(min_length=1, max_length=MOST_METHODS)
    references: dict[Name, Reference] = Field({}, max_length=MOST_METHODS)
    measure: Measurement = Measurement()
    cut: str = Field("", description="what was left out, and why")

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for key, names in {
            "baseline": (self.baseline, *(m.baseline for m in self.methods.values() if m.baseline is not None)),
            "compare": tuple(itertools.chain(*self.compare)),
            "measure.mismatch_methods": self.measure.mismatch_methods or (),
        }.items():
            for name in names:
                if name not in self.methods:
                    raise ValueError(f"{key}: {name!r} is not one of the methods {', '.join(self.methods)}")
        _distinct((*self.references, *(f"{name}-s{seed}" for name, m in self.methods.items() for seed in m.seeds)))
        cells = sum(len(r.samplers) * len(r.steps) for r in self.references.values())
        for method in self.methods.values():
            steps = [len(method.seed_steps.get(s) or method.steps or self.measure.steps) for s in method.seeds]
            cells += sum(steps) * len(self.measure.samplers)
        if cells > MOST_CELLS:
            raise ValueError(f"methods, seeds, samplers and steps make {cells:,} cells; at most {MOST_CELLS:,} are run")
        return self


def load_study(path: Path) -> Study:
    """Read and validate a study file, and the recipe of each of its runs.

    Raises:
        InputError: If there is no such file, or a field is unknown or out of its range.
    """
    try:
        study = Study.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(f"{printable(path)}: {_first_mistake(error)}") from None
    for run in plan(study, Path()):
        if run.first:  # other seeds have the same recipe
            run.recipe  # noqa: B018  (it is validated on the way)
    return study


def _first_mistake(error: ValidationError) -> str:
    """Return the first fault and its place, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    return printable(f"{where[:200] or 'the file'}: {first['msg'].removeprefix('Value error, ')[:1000]}")


@dataclass(frozen=True)
class Run:
    """One training of a study. Attributes: study; folder: the study's; method; seed."""

    study: Study
    folder: Path
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-s{self.seed}"

    @property
    def first(self) -> bool:
        """Whether it is its method's first seed, which is measured and pictured more fully."""
        return self.seed == self.study.methods[self.method].seeds[0]

    @property
    def output(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def recipe(self) -> Recipe:
        """Raises InputError if a field is unknown or out of its range."""
        changes = {**self.study.set, **self.study.methods[self.method].set}
        return load_recipe(self.study.recipe, changes={**changes, "seed": self.seed, "output": str(self.output)})

    @property
    def path(self) -> Path:
        return self.folder / "trainings" / f"{self.name}.json"

    @property
    def done(self) -> bool:
        return self.path.is_file() and (self.output / "model" / "model_index.json").is_file()

    @property
    def failure(self) -> Path:
        """The file that says why the training failed, if it did; it is not tried again while the file is there."""
        return self.path.with_suffix(".failed.json")

    @property
    def mismatch_path(self) -> Path | None:
        """The file of the mismatch, where it is asked for."""
        measure = self.study.measure
        of = self.study.methods if measure.mismatch_methods is None else measure.mismatch_methods
        wanted = measure.mismatch and self.first and self.method in of
        return self.folder / "mismatch" / f"{self.name}.json" if wanted else None

    @property
    def missing(self) -> list[Path]:
        """The files that are not there yet, but for the training's own."""
        paths = [cell.path for cell in self.cells]
        if self.mismatch_path is not None:
            paths.append(self.mismatch_path)
        return [path for path in paths if not path.is_file()]

    @property
    def steps(self) -> tuple[int, ...]:
        method = self.study.methods[self.method]
        return tuple(sorted(method.seed_steps.get(self.seed) or method.steps or self.study.measure.steps))

    @property
    def mismatch_steps(self) -> tuple[int, ...]:
        wanted = self.study.measure.mismatch_steps
        return self.steps if wanted is None else tuple(sorted(wanted))

    @property
    def cells(self) -> list[Cell]:
        samplers = self.study.measure.samplers
        return [Cell(self.folder, self.name, sampler, count) for count in self.steps for sampler in samplers]


@dataclass(frozen=True)
class Cell:
    """One cell of a study.

    Attributes:
        folder: The study's.
        network: The name of the run or reference.
        sampler: The sampler.
        steps: Network evaluations for one image.
    """

    folder: Path
    network: str
    sampler: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.sampler}-{self.steps}"

    @property
    def path(self) -> Path:
        return self.folder / "cells" / f"{self.name}.json"

    @property
    def done(self) -> bool:
        return self.path.is_file()


def plan(study: Study, folder: Path) -> list[Run]:
    """The runs of a study in the order in which they are worked on: the first seed of every method, then the second."""
    seeds = max(len(method.seeds) for method in study.methods.values())
    return [
        Run(study, folder, name, method.seeds[i])
        for i in range(seeds)
        for name, method in study.methods.items()
        if i < len(method.seeds)
    ]


def reference_cells(study: Study, folder: Path) -> list[Cell]:
    """The cells of a study's references."""
    return [
        Cell(folder, name, sampler, count)
        for name, reference in study.references.items()
        for count in sorted(reference.steps)
        for sampler in reference.samplers
    ]


def _shape(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe makes the network."""
    return recipe.model_dump(mode="json", exclude=FREE_TO_CHANGE)


def _measured(measure: Measurement) -> dict[str, Any]:
    """What of a measurement makes a cell's numbers."""
    return measure.model_dump(
        mode="json", exclude={"samplers", "steps", "mismatch", "mismatch_steps", "mismatch_methods"}
    )


Number = Annotated[float, Field(strict=True, ge=-1e12, le=1e12)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class _Record(BaseModel):
    """The required contents of a file of a study; further fields are left out."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Training(_Record):
    """A cell's record of its training; all but the updates is only for the page."""

    steps: Whole
    batches: Whole | None = None
    backward_passes: Whole | None = None
    images: Whole | None = None
    delta_norm: Number | None = None
    data: Text | None = None


class _Network(_Record):
    """A cell's record of a reference."""

    name: Name
    path: Text
    precision: Precision = "fp32"
    data: DataConfig | None = None


class _CellRecord(_Record):
    """A cell's numbers and settings; those that have a default are only for the page or to make it again."""

    method: Name | None = None
    seed: Seed | None = None
    sampler: Sampler | None = None
    steps: Count | None = None
    fid: Number
    kid: Number
    precision: Number
    recall: Number
    replicates: Annotated[tuple[Number, ...], Field(min_length=REPLICATES, max_length=REPLICATES)]
    measure: Measurement
    fid_ci: tuple[Number, Number] | None = None
    brightness: Number | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    seconds: Annotated[Number, Field(ge=0)] | None = None
    threads: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    device: Text | None = None
    torch: Text | None = None
    weights: Text | None = None
    training: _Training | None = None
    recipe: Recipe | None = None
    reference: _Network | None = None


class _Loss(_Record):
    """The file of a training."""

    seconds: Annotated[Number, Field(ge=0)]
    step: Annotated[tuple[Whole, ...], Field(min_length=1, max_length=1000)]
    loss: Annotated[tuple[Number, ...], Field(max_length=1000)]

    @model_validator(mode="after")
    def _paired(self) -> _Loss:
        if len(self.step) != len(self.loss):
            raise ValueError(f"{len(self.loss)} values of the loss at {len(self.step)} updates")
        return self


class _Failure(_Record):
    error: str


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


class _MismatchRecord(_Record):
    paths: tuple[_Path, ...]


_Kind = TypeVar("_Kind", bound=_Record)


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    """A file of a study. Raises InputError if it is not whole."""
    try:
        return kind.model_validate(read_json(path, limit=2**22))
    except ValidationError as error:
        raise InputError(f"{printable(path)}: {_first_mistake(error)}: delete it, and run the study again") from None
    except InputError as error:
        raise InputError(f"{error}: delete it, and run the study again") from None


def read_loss(run: Run) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The updates and losses of a training that is finished.

    Raises:
        InputError: If its file is not whole.
    """
    record = _read(run.path, _Loss)
    return record.step, record.loss


def read_failure(run: Run) -> str:
    """Why a training failed.

    Raises:
        InputError: If its file is not whole.
    """
    return _read(run.failure, _Failure).error


def read_mismatch(path: Path) -> list[dict[str, Any]]:
    """The mismatch of each sampler and number of steps.

    Raises:
        InputError: If the file is not whole.
    """
    return [found.model_dump() for found in _read(path, _MismatchRecord).paths]


def read_cell(cell: Cell, study: Study, run: Run | None) -> dict[str, Any]:
    """A cell's file.

    Arguments:
        cell: The cell.
        study: Its study.
        run: The run that it measures; none for a reference.

    Returns:
        Its numbers, which are finite, and its settings.

    Raises:
        InputError: If it is not whole, or was made with other settings than the study's.
    """
    remedy = "restore them, delete the file, or choose another --output"
    record = _read(cell.path, _CellRecord)
    same = _measured(record.measure) == _measured(study.measure)
    if run is not None:
        if record.recipe is None or record.training is None:
            raise InputError(f"{printable(cell.path)} is not a cell of this study: {remedy}")
        own = (run.method, run.seed, cell.sampler, cell.steps)
        said = (record.method, record.seed, record.sampler, record.steps)
        same = same and all(value in (None, mine) for value, mine in zip(said, own, strict=True))
        same = same and _shape(record.recipe) == _shape(run.recipe) and record.training.steps == record.recipe.steps
    else:
        if record.reference is None:
            raise InputError(f"{printable(cell.path)} is not a cell of this study: {remedy}")
        same = same and record.reference.path == study.references[cell.network].path
    if not same:
        raise InputError(f"{printable(cell.path)} was made with other settings than the study's: {remedy}")
    return record.model_dump(mode="json")


def check_results(study: Study, folder: Path) -> None:
    """See that what is there was made with the study's settings.

    Raises:
        InputError: If a cell or a run was not.
    """
    for run in plan(study, folder):
        recipe = run.output / "recipe.yaml"
        if recipe.is_file() and _shape(load_recipe(str(recipe))) != _shape(run.recipe):
            raise InputError(
                f"{run.output} was trained with other settings than the study's: restore them, delete the folder, "
                "or choose another --output"
            )
        for cell in run.cells:
            if cell.done:
                read_cell(cell, study, run)
    for cell in reference_cells(study, folder):
        if cell.done:
            read_cell(cell, study, None)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether this process, and no other, works on something while the block lasts."""
    import fcntl  # only here, since not every system has it

    make_folder(path.parent)
    with open_regular(path, "ab") as file:  # nothing is written into it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class _Evaluator:
    """What the cells of one process share: the features, and the real images under them."""

    def __init__(self, measure: Measurement, data: DataConfig, cpu: bool = False) -> None:
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=cpu)
        self.extractor = load_extractor(
            measure.features,
            weights=None if measure.weights is None else Path(measure.weights),
            device=self.accelerator.device,
        )
        self.reference = reference_statistics((measure.data or data).load(), self.extractor)

    def __call__(
        self,
        network: str,
        measure: Measurement,
        sampler: str,
        steps: int,
        precision: str,
        on_progress: Callable[[float, str], None],
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Measure a network under one sampler: what a cell's file holds of it, and the first images."""
        generator = Generator.load(
            network,
            self.accelerator.device,
            sampler=sampler,
            steps=steps,
            seed=measure.seed,
            batch_size=measure.batch_size,
            precision=precision,
        )
        done = 0

        def on_images(n: int) -> None:
            nonlocal done
            done += n
            on_progress(done, "images")

        cell, replicates, images = evaluate_cell(
            network,
            generator,
            measure.num,
            self.extractor,
            self.reference,
            self.accelerator,
            keep=PICTURED,
            on_images=on_images,
        )
        record = {
            "sampler": sampler,
            "steps": steps,
            "n": cell.n,
            "fid": cell.fid,
            "fid_ci": list(cell.fid_ci),
            "kid": cell.kid,
            "kid_se": cell.kid_se,
            "precision": cell.precision,
            "recall": cell.recall,
            "brightness": round(cell.brightness, 3),
            "replicates": [float(f"{value:.5g}") for value in replicates],
            "seconds": round(cell.seconds, 1),
            "measure": _measured(measure),
            "weights": generator.fingerprint(),
            "extractor": self.extractor.fingerprint,
            "real_images": self.reference.n,
            "robustdiff": version("robustdiff"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": self.accelerator.device.type,
        }
        return record, images


def _train(
    recipe: Recipe,
    on_part: Callable[[str, float], None],
    on_progress: Callable[[float, str], None],
    cpu: bool = False,
) -> bool:
    """Train or go on with a run. False when a signal stopped it."""
    make_folder(Path(recipe.output))  # before anything is loaded: it may be a link out of the study's folder
    on_part(f"training {Path(recipe.output).name}", recipe.steps)

    class Report:
        done = 0.0

        def begin(self, description: str, total: float) -> None: ...

        def advance(self, amount: float, note: str = "") -> None:
            self.done += amount
            on_progress(self.done, note)

    return train(recipe, resume=True, cpu=cpu, progress=Report()) is not None


class _Metrics(_Record):
    """A line of a run's metrics."""

    step: Whole
    loss: Number
    images_per_second: Annotated[Number, Field(gt=0)]


def _record_training(run: Run) -> None:
    """Keep of a finished run what outlives its folder: the loss, at most 100 times, and how long it took."""
    path = run.output / "metrics.jsonl"
    try:
        with open_regular(path) as file:
            lines = [_Metrics.model_validate(json.loads(line)) for line in file]
    except (ValueError, RecursionError) as error:
        reason = _first_mistake(error) if isinstance(error, ValidationError) else printable(str(error))
        raise InputError(f"{printable(path)} is damaged ({reason}): delete {printable(run.output)}") from None
    seconds, before = 0.0, 0
    for line in lines:
        seconds += (line.step - before) * run.recipe.batch_size / line.images_per_second
        before = line.step
    thinned = lines[:: -(-len(lines) // 100)]
    record = {
        "method": run.method,
        "seed": run.seed,
        "seconds": round(seconds, 1),
        "step": [line.step for line in thinned],
        "loss": [round(line.loss, 5) for line in thinned],
    }
    make_folder(run.path.parent)
    with atomic_write(run.path) as file:
        file.write(json.dumps(record).encode())


def run_study(
    study: Study,
    folder: Path,
    *,
    on_part: Callable[[str, float], None] = lambda description, total: None,
    on_progress: Callable[[float, str], None] = lambda done, note: None,
    wait: float = 5.0,
) -> bool:
    """Work on a study until nothing of it is missing.

    Arguments:
        study: The study.
        folder: Where its runs and cells are.
        on_part: Called when a piece of work begins, with what it is and its size.
        on_progress: Called with how much of the piece is done, and a note.
        wait: Seconds between looks at what other processes hold, when there is nothing else to do.

    Returns:
        False when a signal stopped it.

    Raises:
        InputError: If a run cannot be built from its recipe, a sampler does not suit the networks, or what is there was
            made with other settings.
        RunError: When all else is done, if a training failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a study is shared by processes of their own: start robustdiff study several times instead")
    runs = plan(study, folder)
    check_results(study, folder)
    _check_samplers(study, runs[0])
    for part in ("cells", "locks", "mismatch", "runs", "trainings"):  # none of them may be a link out of the folder
        make_folder(folder / part)
    evaluators: dict[str, _Evaluator] = {}

    def evaluator(data: DataConfig) -> _Evaluator:
        key = data.model_dump_json()
        if key not in evaluators:
            evaluators[key] = _Evaluator(study.measure, data)
        return evaluators[key]

    while True:
        missing = worked = False
        for cell in reference_cells(study, folder):
            missing |= not cell.done
            with _held(folder / "locks" / cell.name) as mine:
                if cell.done or not mine:
                    continue
                worked = True
                on_part(cell.name, study.measure.num)
                _set_threads(runs[0].recipe)
                _measure_reference(study, cell, evaluator(runs[0].recipe.data), on_progress)
        for run in runs:
            if not run.missing or run.failure.is_file():
                continue
            missing = True
            if not run.done:
                with _held(folder / "locks" / run.name) as mine:
                    if not mine:
                        continue
                    worked = True
                    try:
                        if not _train(run.recipe, on_part, on_progress):
                            return False
                    except RunError as error:
                        _write(run.failure, {"method": run.method, "seed": run.seed, "error": str(error)})
                        continue
                    _record_training(run)
            _set_threads(run.recipe)
            for cell in run.cells:
                with _held(folder / "locks" / cell.name) as mine:
                    if cell.done or not mine:
                        continue
                    worked = True
                    on_part(cell.name, study.measure.num)
                    _measure(run, cell, evaluator(run.recipe.data), on_progress)
            path = run.mismatch_path
            if path is not None:
                with _held(folder / "locks" / f"mismatch {run.name}") as mine:
                    if mine and not path.is_file():
                        worked = True
                        _measure_mismatch(run, path, on_part, on_progress)
        if not missing:
            failed = [run.failure for run in runs if run.failure.is_file()]
            if failed:
                reason = _read(failed[0], _Failure).error
                raise RunError(f"the rest is done, but {len(failed)} trainings failed; {failed[0]}: {reason}")
            return True
        if not worked:
            time.sleep(wait)


def _check_samplers(study: Study, run: Run) -> None:
    """See that the samplers suit the networks that the study begins with, before anything is trained."""
    if not run.missing:
        return
    built = build_model(run.recipe, run.recipe.data.load())
    for sampler, steps in itertools.product(study.measure.samplers, run.steps):
        Generator.of(built.model, sampler=sampler, steps=steps)


def _set_threads(recipe: Recipe) -> None:
    """Measure on as many threads as are trained on."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What a cell's file says of how its network was made."""
    path = Path(recipe.output) / "result.json"
    result = read_json(path, limit=2**20)
    try:
        _Training.model_validate(result)
    except ValidationError as error:
        raise InputError(f"{printable(path)}: {_first_mistake(error)}: delete the run {recipe.output}") from None
    return {"training": result, "recipe": {**parse_yaml(recipe.to_yaml(), "the recipe"), "output": ""}}


def _measure(run: Run, cell: Cell, evaluator: _Evaluator, on_progress: Callable[[float, str], None]) -> None:
    """Make one cell's file, and for the first seed of a method a picture of the first images."""
    recipe = run.recipe
    record, images = evaluator(
        recipe.output, run.study.measure, cell.sampler, cell.steps, recipe.precision, on_progress
    )
    if run.first:
        with atomic_write(cell.path.with_suffix(".png")) as file:
            Image.fromarray(tile(images, PICTURED).squeeze()).save(file, format="png")
    _write(cell.path, {"method": run.method, "seed": run.seed, **record, **_settings(recipe)})


def _measure_reference(
    study: Study, cell: Cell, evaluator: _Evaluator, on_progress: Callable[[float, str], None]
) -> None:
    """Make one cell's file of a network as it is."""
    reference = study.references[cell.network]
    record, _ = evaluator(reference.path, study.measure, cell.sampler, cell.steps, reference.precision, on_progress)
    data = plan(study, cell.folder)[0].recipe.data
    settings = {"name": cell.network, "path": reference.path, "data": data.model_dump(mode="json")}
    # Within a section of its own, since a cell's precision is that of precision and recall.
    _write(cell.path, {"reference": {**settings, "precision": reference.precision}, **record})


def _write(path: Path, record: dict[str, Any]) -> None:
    make_folder(path.parent)
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError:
        raise RunError(f"{printable(path)} is not written: a number in it is not finite") from None
    with atomic_write(path) as file:
        file.write(text.encode())


def _measure_mismatch(
    run: Run, path: Path, on_part: Callable[[str, float], None], on_progress: Callable[[float, str], None]
) -> None:
    """Measure how far a run's samplers' states are from q(x_t): the mean over steps of each measure."""
    recipe, measure = run.recipe, run.study.measure
    generator = Generator.load(
        recipe.output,
        "cuda" if torch.cuda.is_available() else "cpu",
        sampler=measure.samplers[0],
        steps=run.mismatch_steps[0],
        batch_size=measure.batch_size,
        precision=recipe.precision,
    )
    done = 0

    def begin(description: str, total: float) -> None:
        nonlocal done
        done = 0
        on_part(description, total)

    def on_more(amount: int) -> None:
        nonlocal done
        done += amount
        on_progress(done, "images")

    mismatch = measure_mismatch(
        {run.name: generator},
        recipe.data.load(),
        measure.samplers,
        run.mismatch_steps,
        measure.mismatch,
        probes=0,
        seed=measure.seed,
        on_part=begin,
        on_progress=on_more,
    )
    record = {
        "method": run.method,
        "seed": run.seed,
        "n": measure.mismatch,
        "images_seed": measure.seed,
        "weights": generator.fingerprint(),
        "paths": [
            {
                "sampler": p.sampler,
                "steps": p.steps,
                "mean": {name: asdict(e) for name, e in p.mean.items()},
                "last": {name: asdict(e) for name, e in p.last.items()},
            }
            for p in mismatch.paths
        ],
    }
    _write(path, record)


def reproduce(
    path: Path,
    folder: Path,
    *,
    on_part: Callable[[str, float], None] = lambda description, total: None,
    on_progress: Callable[[float, str], None] = lambda done, note: None,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Make a cell again from its file alone: train its recipe and measure the result.

    Arguments:
        path: The cell's file.
        folder: Where the run goes; one that is there already is gone on with.
        on_part: As in :func:`run_study`.
        on_progress: As in :func:`run_study`.

    Returns:
        The record of the file and the new one: on the same machine and one thread the same to the last digit, but for
        the seconds. None when a signal stopped the training.

    Raises:
        InputError: If the file is not a cell.
    """
    before = read_json(path, limit=2**22)
    cell = _reproducible(before, path)
    measure, sampler, steps = cell.measure, cell.sampler, cell.steps
    assert sampler is not None
    assert steps is not None
    assert cell.threads is not None
    cpu = cell.device == "cpu"
    torch.set_num_threads(cell.threads)
    after = {}
    if cell.reference is not None:
        assert cell.reference.data is not None
        name, data, precision = cell.reference.path, cell.reference.data, cell.reference.precision
    else:
        assert cell.recipe is not None
        name = str(folder / f"{cell.method}-s{cell.seed}")
        # The run is nobody's to track but whoever made the cell.
        recipe = cell.recipe.model_copy(update={"output": name, "trackers": ()})
        data, precision = recipe.data, recipe.precision
        if not _train(recipe, on_part, on_progress, cpu):
            return None
        after = _settings(recipe)
    on_part(path.stem, measure.num)
    record, _ = _Evaluator(measure, data, cpu)(name, measure, sampler, steps, precision, on_progress)
    return before, {**before, **record, **after}


def _reproducible(record: Any, path: Path) -> _CellRecord:
    """A cell that holds what it takes to make it again."""
    try:
        cell = _CellRecord.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{printable(path)} is not a cell of a study: {_first_mistake(error)}") from None
    needed = ["sampler", "steps", "threads", "device", "weights"]
    if cell.reference is None:
        needed += ["method", "seed", "recipe"]
    elif cell.reference.data is None:
        needed += ["reference.data"]
    if missing := [name for name in needed if getattr(cell, name, None) is None]:
        raise InputError(f"{printable(path)} is not a cell of a study: {missing[0]} is missing")
    return cell


@dataclass(frozen=True)
class Remaining:
    """What is left of one method or reference.

    Attributes:
        method: Its name.
        runs: What is to be trained.
        cells: What is to be measured.
        seconds: How long one process takes.
    """

    method: str
    runs: int
    cells: int
    seconds: float


def _image_passes(recipe: Recipe) -> float:
    """Images that go through forward and backward in a training."""
    extra = recipe.adversary.steps if recipe.adversary.name == "pgd" else 0
    return recipe.steps * recipe.batch_size * (1.0 + extra)


def remaining(study: Study, folder: Path) -> list[Remaining]:
    """What is left of a study, and how long one process takes for it.

    The speed is that of the runs and cells that are finished; where there are none, a few updates and images are made
    to measure it.
    """
    runs = plan(study, folder)
    trained = [(run, _read(run.path, _Loss).seconds) for run in runs if run.path.is_file()]
    measured = [read_cell(cell, study, run) for run in runs for cell in run.cells if cell.done]
    measured = [record for record in measured if None not in (record["seconds"], record["n"], record["steps"])]
    if trained:
        training = sum(seconds for _, seconds in trained) / sum(_image_passes(run.recipe) for run, _ in trained)
    else:
        training = _time_training(runs[0])
    # A cell takes a + b·steps for each image: making it, and its features.
    if len({record["steps"] for record in measured}) > 1:
        each = [record["seconds"] / record["n"] for record in measured]
        fit = np.polynomial.Polynomial.fit([record["steps"] for record in measured], each, 1).convert()
        once, sampling = np.maximum(fit.coef, 0)
    else:
        once, sampling = 0.0, _time_sampling(runs[0])

    def seconds_of(cells: Sequence[Cell]) -> float:
        return float(study.measure.num * sum(once + sampling * cell.steps for cell in cells))

    left = []
    for method in study.methods:
        own = [run for run in runs if run.method == method]
        cells = [cell for run in own for cell in run.cells if not cell.done]
        untrained = [run for run in own if not run.done and run.missing and not run.failure.is_file()]
        seconds = training * sum(_image_passes(run.recipe) for run in untrained)
        seconds += seconds_of(cells)
        unseen = [run for run in own if run.mismatch_path is not None and not run.mismatch_path.is_file()]
        # The network is called twice for an image and step.
        per_step = 2 * study.measure.mismatch * len(study.measure.samplers)
        seconds += float(sampling) * per_step * sum(sum(run.mismatch_steps) for run in unseen)
        left.append(Remaining(method, len(untrained), len(cells), seconds))
    for name in study.references:
        cells = [cell for cell in reference_cells(study, folder) if cell.network == name and not cell.done]
        left.append(Remaining(name, 0, len(cells), seconds_of(cells)))
    return left


def _time_training(run: Run) -> float:
    """Seconds for one image in one pass, measured."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = run.recipe.model_copy(
            update={"output": str(Path(scratch) / "run"), "steps": 4, "log_every": 1, "trackers": ()}
        )
        train(recipe)
        lines = (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
        speeds = [json.loads(line)["images_per_second"] for line in lines]
    passes = _image_passes(run.recipe) / (run.recipe.steps * run.recipe.batch_size)
    return 1 / (max(speeds) * passes)  # the first updates also set things up


def _time_sampling(run: Run) -> float:
    """Seconds for one evaluation of the network for one image, measured on the network as it begins."""
    recipe, measure = run.recipe, run.study.measure
    built = build_model(recipe, recipe.data.load())
    generator = Generator.of(
        built.model,
        sampler=measure.samplers[0],
        steps=2,
        batch_size=measure.batch_size,
        precision=recipe.precision,
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        next(generator.images(range(measure.batch_size)))
        seconds.append(time.perf_counter() - start)
    return min(seconds) / (2 * measure.batch_size)
