"""The study file: the methods as changes of a recipe, their seeds, and the settings of the measurement.

A study file may come from somebody else: names must be valid as file names in the study's folder, and numbers are
finite and bounded.
"""

from __future__ import annotations

import itertools
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from robustdiff.data import DataConfig
from robustdiff.errors import InputError, first_mistake, printable
from robustdiff.metrics.metric import METRICS, parse_metric
from robustdiff.recipe import load_recipe
from robustdiff.samplers.sample import SAMPLERS
from robustdiff.section import Precision, Section, Text
from robustdiff.yaml_reader import parse_yaml, read_yaml, text_of

__all__ = [
    "Changes",
    "Count",
    "Guidance",
    "Measurement",
    "Method",
    "Name",
    "Reference",
    "Sampler",
    "Seed",
    "Study",
    "load_study",
    "shipped_studies",
]

MOST_METHODS = 256
MOST_CELLS = 100_000


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("the same value is given twice")
    return values


def _metrics(metrics: tuple[str, ...]) -> tuple[str, ...]:
    for metric in metrics:
        METRICS[parse_metric(metric)[0]]
    return _distinct(metrics)


def _known(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name[:100]!r}: use {', '.join(SAMPLERS)}")
    return name


def _file_name(name: str) -> str:
    # Matplotlib leaves names that begin with _ out of legends, and names that begin with - look like options.
    if not re.fullmatch(r"[^\W_]([\w.+() -]*[\w.+)-])?", name):
        raise ValueError(
            f"the name {name[:100]!r} is that of files: use letters, digits, spaces and . + - _ ( ) only, a letter or "
            "digit first"
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
        if field == "watch":
            raise ValueError("watch is not for studies, which measure the finished runs: leave it out")
    return values


Name = Annotated[str, BeforeValidator(text_of), AfterValidator(_file_name)]
Sampler = Annotated[str, AfterValidator(_known)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=1, le=100_000)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=10_000), AfterValidator(_distinct)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=1000), AfterValidator(_distinct)]
Samplers = Annotated[tuple[Sampler, ...], Field(min_length=1, max_length=100), AfterValidator(_distinct)]
Guidance = Annotated[float, Field(ge=0, le=1000)]
Changes = Annotated[dict[str, Any], AfterValidator(_of_methods)]


class Method(Section):
    """A method of training, as changes of the study's recipe."""

    description: Annotated[str, Field(max_length=1000)] = Field("", description="the method in words, for the page")
    set: Changes = Field({}, description="fields by their dotted names, such as adversary.step_size: 0.5")
    seeds: Seeds = (0,)
    steps: Counts | None = Field(None, description="numbers of evaluations; those of the study by default")
    seed_steps: dict[Seed, Counts] = Field({}, description="the same for a seed that has others")
    baseline: Name | None = Field(None, description="the method it is compared with; the study's by default")
    chosen_on: tuple[Seed, ...] = Field(
        (), max_length=10_000, description="seeds on which the settings were chosen; they are left out of intervals"
    )

    @model_validator(mode="after")
    def _of_its_seeds(self) -> Method:
        for name, seeds in {"seed_steps": self.seed_steps, "chosen_on": self.chosen_on}.items():
            for seed in seeds:
                if seed not in self.seeds:
                    raise ValueError(f"{name}: {seed} is not one of the seeds {', '.join(map(str, self.seeds))}")
        return self


class Reference(Section):
    """A network that is measured without training, beside the methods."""

    description: Annotated[str, Field(max_length=1000)] = Field("", description="the network in words, for the page")
    path: Text = Field(description="a run, a pipeline folder, or a model shipped with the package")
    samplers: Samplers
    steps: Counts
    precision: Precision = "fp32"
    guidance: Guidance | None = Field(None, description="scale of guidance; by default that of the measurement")
    seed: Seed | None = Field(None, description="of the images' noise; by default that of the measurement")


class Measurement(Section):
    """The settings of the measurement of a run."""

    samplers: Samplers = ("iddpm", "ddim", "es", "dpm++")
    steps: Counts = (5, 8, 10, 20, 50)
    num: int = Field(5000, ge=4, le=10**7, description="images of a cell")
    seed: Seed = Field(0, description="of the images' noise")
    image_noise: Literal["shared", "training"] = Field(
        "shared", description="shared: the same for all trainings; training: by the training's seed, for all methods"
    )
    batch_size: int = Field(64, ge=1, le=2**20)
    pictured: int = Field(8, ge=1, le=64, description="images in the picture of a cell of a method's first seed")
    mismatch: int = Field(
        0, ge=0, le=10**7, description="images of the mismatch, measured for the first seed; 0: not measured"
    )
    mismatch_steps: Counts | None = Field(None, description="at which it is; those of the cells by default")
    mismatch_methods: tuple[Name, ...] | None = Field(None, description="of which it is; all by default")
    features: Text = "fashion-16"
    metrics: Annotated[tuple[Text, ...], Field(max_length=100), AfterValidator(_metrics)] = Field(
        (), description="further metrics, such as clip-score=FOLDER"
    )
    guidance: Guidance | None = Field(None, description="scale of guidance")
    weights: Text | None = Field(None, description="Inception's weights file")
    data: DataConfig | None = Field(
        None, description="the real images, whose captions are prompts in turn; those of the recipe by default"
    )
    real: DataConfig | None = Field(
        None, description="other real images, measured as generated ones are: what a perfect model would get"
    )

    @model_validator(mode="after")
    def _enough(self) -> Measurement:
        if 0 < self.mismatch < 40:
            raise ValueError(f"mismatch needs 40 images or more, or 0; got {self.mismatch}")
        return self

    def noise_seed(self, training: int | None) -> int:
        """Return the seed of the images' noise for a network, given the seed of its training; None for a reference."""
        return self.seed if training is None or self.image_noise == "shared" else training


class Study(Section):
    """A study file."""

    title: Annotated[str, Field(max_length=1000)]
    question: Annotated[str, Field(max_length=10_000)] = Field("", description="what it asks, for the page")
    answer: Annotated[str, Field(max_length=10_000)] = Field("", description="what came out, for the page")
    recipe: Text = Field(description="a recipe that comes with the package, or a file")
    set: Changes = Field({}, description="what all methods change in the recipe")
    baseline: Name = Field(description="the method that the others are compared with")
    compare: tuple[tuple[Name, Name], ...] = Field((), description="more pairs: a method, and what it is compared with")
    contrast: tuple[Sampler, Sampler] | None = Field(
        None, description="two samplers; the effect of each method on the first is compared with that on the second"
    )
    trend: Annotated[tuple[tuple[Name, Name], ...], Field(max_length=100)] = Field(
        (), description="pairs of methods whose effect is regressed on the logarithm of their numbers of updates"
    )
    methods: dict[Name, Method] = Field(min_length=1, max_length=MOST_METHODS)
    references: dict[Name, Reference] = Field({}, max_length=MOST_METHODS)
    measure: Measurement = Measurement()
    cut: str = Field("", description="what was left out, and why")

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for key, names in {
            "baseline": (self.baseline, *(m.baseline for m in self.methods.values() if m.baseline is not None)),
            "compare": tuple(itertools.chain(*self.compare)),
            "trend": tuple(itertools.chain(*self.trend)),
            "measure.mismatch_methods": self.measure.mismatch_methods or (),
        }.items():
            for name in names:
                if name not in self.methods:
                    raise ValueError(f"{key}: {name!r} is not one of the methods {', '.join(self.methods)}")
        for sampler in self.contrast or ():
            if sampler not in self.measure.samplers:
                raise ValueError(f"contrast: {sampler} is not one of measure.samplers: add it, or name another")
        names = (*self.references, *(f"{name}-s{seed}" for name, m in self.methods.items() for seed in m.seeds))
        taken: dict[str, str] = {}
        for name in names:
            if (key := name.casefold()) in taken:  # on Windows and macOS the case of letters makes no other file
                raise ValueError(f"the files of {taken[key]} and {name} would have one name: rename one of them")
            taken[key] = name
        cells = sum(len(r.samplers) * len(r.steps) for r in self.references.values())
        for method in self.methods.values():
            steps = [len(method.seed_steps.get(s) or method.steps or self.measure.steps) for s in method.seeds]
            cells += sum(steps) * len(self.measure.samplers)
        if cells > MOST_CELLS:
            raise ValueError(f"methods, seeds, samplers and steps make {cells:,} cells; at most {MOST_CELLS:,} are run")
        return self


def shipped_studies() -> list[str]:
    """Return the names of the studies that come with the package."""
    names = (path.name for path in (files("robustdiff") / "studies").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_study(source: str | Path) -> Study:
    """Read and validate a study, by its path or as one that comes with the package, and the recipe of each method.

    Raises:
        InputError: If the study does not exist, or a field is unknown or out of its range.
    """
    if str(source) in shipped_studies() and not Path(source).is_file():
        values = parse_yaml((files("robustdiff") / "studies" / f"{source}.yaml").read_bytes(), str(source))
    else:
        values = read_yaml(Path(source))
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{printable(source)}: {first_mistake(error)}") from None
    updates = {
        name: load_recipe(study.recipe, changes={**study.set, **method.set, "seed": method.seeds[0]}).steps
        for name, method in study.methods.items()
    }
    lengths = {updates[method] for method, _ in study.trend}
    if study.trend and (len(lengths) < 2 or any(updates[one] != updates[other] for one, other in study.trend)):
        raise InputError(
            f"{printable(source)}: trend: give pairs of two or more lengths of training, in which both methods have "
            "the same number of updates"
        )
    return study
