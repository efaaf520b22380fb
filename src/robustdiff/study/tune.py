r"""The search for the training that is best under one sampler at one number of steps.

Candidates are drawn from lists of values of the recipe's fields, and halved in rungs (successive halving: Karnin et
al., 2013; Jamieson & Talwalkar, 2016). In rung r of R all contestants train for N/2^{R−r} backward passes, with the
same seed, batches and noise, and are measured on the same image noise; the better half goes on. Plain fine-tunings with
learning rates and averages from the same lists are halved among themselves, so that the best of them is never
eliminated. The untouched checkpoint is a contestant as well, where the recipe has one.

The best value of many is better than that of a new training with its settings, so the search decides nothing. The best
candidate and the best plain fine-tuning are trained again for N backward passes with seeds that the search has not
used, and measured on image noise that it has not used, another for each seed but the same for all contestants. With
d_s the difference of two contestants at seed s (of logarithms for FID), the 95 % interval is d̄ ± t_{n−1} s_d/√n, over
the n confirming seeds. It covers the variation of training and of the images. The p-values of the comparisons that
decide are adjusted by Holm's method; :data:`RULE` is the decision.

A further contestant shows what of a candidate's effect is due to δ: the same number of passes over each batch without
a perturbation. It does not take part in the decision.

Every contestant makes the same number of backward passes, and sees as many images in them; with PGD that is fewer
updates. What a recipe counts in its own T updates is scaled to n: the decay of the average to β^{T/n}, so that the
start keeps its weight β^T, the warm-up and the ramp of the radius in proportion.

Each rung, and the confirmation, is a study (:mod:`robustdiff.study.run`) that follows from the files of the rungs
before, so that processes share the search, and an interrupted one goes on:

    tune.yaml                     the settings, to which an existing search is bound
    rung-1/ … rung-R/, confirm/   the studies
    result.json, recipe.yaml      the result, and the recommended recipe unless no training is recommended
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from robustdiff.backbones.model import load_model
from robustdiff.errors import InputError, RunError, first_mistake, printable
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.noise import NOISE, check_noise
from robustdiff.evaluation.prompts import captions_of
from robustdiff.evaluation.real_images import load_target
from robustdiff.files import atomic_write, claim_folder, held, write_json
from robustdiff.metrics.metric import Number, ranked
from robustdiff.progress import SILENT, Progress
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.section import MOST_UPDATES, Section, Text, refusal
from robustdiff.study.analysis import TRAININGS, Effect, holm
from robustdiff.study.estimate import time_sampling, time_training
from robustdiff.study.plan import CELL, plan, reference_cells
from robustdiff.study.run import run_study
from robustdiff.study.schema import Changes, Count, Guidance, Sampler, Seed, Study
from robustdiff.study.store import MEASURES, Loss, read, read_cell
from robustdiff.training.ema import sufficient_decay
from robustdiff.yaml_reader import read_yaml

__all__ = [
    "RULE",
    "Speed",
    "Stage",
    "Tuning",
    "candidates",
    "default_space",
    "new_tuning",
    "plain_trainings",
    "stages",
    "tune",
]

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Settings = dict[str, Any]
"""Values of fields of the recipe by their dotted names."""

RULE = (
    "The candidate is recommended if it is better than plain fine-tuning and than the untouched checkpoint, plain "
    "fine-tuning if it is not and plain fine-tuning is better than the untouched checkpoint, and else to leave the "
    "checkpoint as it is. Better means: over all confirming trainings, none of which failed, with p < 0.05 after "
    "Holm's adjustment for the number of these comparisons."
)
"""The decision, which is fixed before anything is trained."""

LEVEL = 0.05
MOST_SETTINGS = 100_000
FIXED = ("steps", "batch_size", "accumulate", "seed", "output", "data", "watch", "trackers")
"""Fields that are not searched: what is compared is of one size, on one dataset."""
FEWEST = 8
"""The smallest number of updates of the first rung that is chosen."""
PIECE = 4.0
"""The seconds in which a training or a cell loads and saves what it needs, as an estimate."""
START = 10.0
"""The same for the start of processes."""


class Tuning(Section):
    """The settings of a search, which ``tune.yaml`` holds."""

    recipe: Text = Field(description="a recipe that comes with the package, or a file")
    set: Changes = Field({}, description="what all contestants change in the recipe")
    sampler: Sampler
    steps: Count = Field(description="network evaluations for one image")
    metric: Text = Field("fid", description="the metric that contestants are ranked by, such as clip-score=FOLDER")
    space: dict[str, tuple[Any, ...]] = Field(description="the values of each field; the first candidate has the first")
    untouched: bool = Field(description="whether the checkpoint that is fine-tuned is a contestant")
    candidates: int = Field(12, ge=1, le=128, description="settings with a perturbation in the first rung")
    rungs: int = Field(3, ge=1, le=10)
    updates: int = Field(ge=1, le=MOST_UPDATES, description="backward passes of the last rung and of the confirmation")
    minutes: float | None = Field(None, gt=0, description="the time that the updates were chosen for; none: given")
    seeds: int = Field(5, ge=TRAININGS, le=100, description="confirming trainings of each contestant")
    seed: Seed = Field(0, description="of the search; the confirming seeds follow it")
    num: int = Field(2000, ge=4, le=10**7, description="images of each measurement")
    batch_size: int = Field(64, ge=1, le=2**20, description="images that are sampled at a time")
    features: Text
    weights: Text | None = None
    guidance: Guidance | None = None
    noise: Text | None = Field(NOISE, description="the images' noise; none: that of robustdiff 0.2.0")

    @field_validator("metric")
    @classmethod
    def _ranks(cls, metric: str) -> str:
        ranked(metric)
        return metric

    @model_validator(mode="after")
    def _enough(self) -> Tuning:
        if self.updates < 2 ** (self.rungs - 1):
            raise refusal("updates", f"{self.updates} cannot be halved for {self.rungs} rungs: give more updates")
        return self

    @property
    def number(self) -> Number:
        """Return the number that contestants are ranked by."""
        return ranked(self.metric)

    @property
    def confirming(self) -> tuple[int, ...]:
        """Return the seeds of the confirmation."""
        return tuple(range(self.seed + 1, self.seed + 1 + self.seeds))


# -- the contestants -----------------------------------------------------------------------------------------


def default_space(recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """Return the values that are searched by default, the recipe's own first.

    α is searched from a tenth to three times the recipe's, the learning rate from 0.3 to 3 times; K in 2, 3 and 5, the
    radius without one and at η√d with η = 0.03 and 0.1 (the paper's), each with the recipe's own; and the decay of the
    average with "auto", or with one that leaves 5 % of the start. Fields that the recipe's adversary does not have are
    left out.
    """
    own, average = recipe.adversary, sufficient_decay(recipe.steps) if recipe.ema == "auto" else "auto"
    found: dict[str, list[Any]] = {}
    if hasattr(own, "step_size"):
        found["adversary.step_size"] = [_rounded(own.step_size * factor) for factor in (1, 0.1, 0.2, 0.5, 2, 3)]
    if hasattr(own, "steps"):
        found["adversary.steps"] = [own.steps, 2, 3, 5]
    if hasattr(own, "radius"):
        radius = own.radius.model_dump(mode="json", exclude_defaults=True) if own.radius else None
        found["adversary.radius"] = [radius, None, {"eta": 0.03}, {"eta": 0.1}]
    found["lr"] = [_rounded(recipe.lr * factor) for factor in (1, 0.3, 3)]
    found["ema"] = [recipe.ema, average]
    return {field: tuple(value for i, value in enumerate(v) if value not in v[:i]) for field, v in found.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _drawn(space: Mapping[str, Sequence[Any]], count: int, seed: int) -> list[Settings]:
    """Return the first value of every list, and further settings at random, none of them twice."""
    shape = tuple(len(values) for values in space.values())
    order = np.random.default_rng(seed).permutation(math.prod(shape))
    chosen = [0, *(int(i) for i in order if i)][:count]
    return [
        {field: values[int(k)] for (field, values), k in zip(space.items(), np.unravel_index(i, shape), strict=True)}
        for i in chosen
    ]


def _without_delta(fields: Mapping[str, Any]) -> Settings:
    return {field: value for field, value in fields.items() if field.split(".")[0] != "adversary"}


def candidates(tuning: Tuning) -> dict[str, Settings]:
    """Return the settings of the candidates of the first rung by name: c1, c2, …"""
    return {f"c{i}": own for i, own in enumerate(_drawn(tuning.space, tuning.candidates, tuning.seed), 1)}


def plain_trainings(tuning: Tuning) -> dict[str, Settings]:
    """Return the settings of the plain fine-tunings of the first rung by name: p1, p2, …

    There is one for every four candidates, if the lists allow as many.
    """
    space = _without_delta(tuning.space)
    # Without any such field there is one, that of the recipe.
    drawn = _drawn(space, math.ceil(tuning.candidates / 4), tuning.seed) if space else [{}]
    return {f"p{i}": {"adversary": "none", **own} for i, own in enumerate(drawn, 1)}


def _changes(tuning: Tuning, settings: Settings) -> Settings:
    """Return settings as changes of the recipe: without its ramp where they have no radius, which the ramp is of."""
    radii = [value for field, value in settings.items() if field.split(".")[:2] == ["adversary", "radius"]]
    if not radii or radii[-1] is not None:
        return settings
    ramp = getattr(load_recipe(tuning.recipe, changes=tuning.set).adversary, "ramp", 0)
    return {"adversary.ramp": 0, **settings} if ramp else settings


def _scaled(tuning: Tuning, settings: Settings, passes: int) -> Settings:
    """Return the changes of a recipe that train with some settings for a number of backward passes."""
    settings = _changes(tuning, settings)
    recipe = load_recipe(tuning.recipe, changes={**tuning.set, **settings})
    of_update = recipe.adversary.example().backward_passes
    updates = passes // of_update
    if updates < 1:
        raise InputError(
            f"--updates {tuning.updates}: {passes} backward passes are less than the {of_update} of one update: give "
            "more"
        )
    share = updates / recipe.steps
    changes = {**settings, "steps": updates, "warmup": round(recipe.warmup * share)}
    if not isinstance(recipe.ema, str):
        changes["ema"] = recipe.ema ** (1 / share)
    if ramp := getattr(recipe.adversary, "ramp", 0):
        changes["adversary.ramp"] = max(1, round(ramp * share))
    return changes


# -- the studies ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """The seconds of one process for a backward pass of a batch, and for a network evaluation of one image."""

    backward: float
    evaluation: float


@dataclass(frozen=True)
class Stage:
    """A rung or the confirmation.

    Attributes:
        name: The name of its folder.
        passes: The backward passes of each training.
        candidates, plain: The contestants of each kind.
        trainings, cells: The numbers of trainings and of measurements.
    """

    name: str
    passes: int
    candidates: int
    plain: int
    trainings: int
    cells: int

    def seconds(self, tuning: Tuning, speed: Speed, processes: int) -> float:
        """Return an upper estimate of the time of processes that share the pieces (Graham, 1969)."""
        training = speed.backward * self.passes + PIECE
        cell = speed.evaluation * (tuning.num * tuning.steps + CELL) + PIECE
        whole = self.trainings * training + self.cells * cell
        start = START if processes > 1 else 0.0
        return start + whole / processes + (1 - 1 / processes) * max(training, cell)


def stages(tuning: Tuning) -> list[Stage]:
    """Return the rungs, and the confirmation with its control."""
    made, plain = [], len(plain_trainings(tuning))
    for i in range(tuning.rungs):
        sizes = math.ceil(tuning.candidates / 2**i), math.ceil(plain / 2**i)
        passes = round(tuning.updates / 2 ** (tuning.rungs - 1 - i))
        cells = sum(sizes) + (tuning.untouched and i == 0)
        made.append(Stage(f"rung-{i + 1}", passes, *sizes, sum(sizes), cells))
    trainings = 3 * tuning.seeds
    cells = trainings + tuning.untouched * tuning.seeds
    return [*made, Stage("confirm", tuning.updates, 1, 1, trainings, cells)]


def _study(
    tuning: Tuning,
    stage: Stage,
    contestants: Mapping[str, Settings],
    baseline: str,
    seeds: Sequence[int],
    untouched: bool,
) -> Study:
    """Return the study of a stage. Each seed has image noise of its own, the same for all contestants."""
    base = load_recipe(tuning.recipe, changes=tuning.set)
    reference = {
        "path": base.model.source,
        "samplers": [tuning.sampler],
        "steps": [tuning.steps],
        "precision": base.precision,
    }
    return Study.model_validate(
        {
            "title": stage.name,
            "recipe": tuning.recipe,
            "set": tuning.set,
            "baseline": baseline,
            "methods": {
                name: {"set": _scaled(tuning, settings, stage.passes), "seeds": seeds}
                for name, settings in contestants.items()
            },
            "references": {f"untouched-s{seed}": {**reference, "seed": seed} for seed in seeds} if untouched else {},
            "measure": {
                "samplers": [tuning.sampler],
                "steps": [tuning.steps],
                "image_noise": "training",
                "metrics": [] if tuning.number.name in MEASURES else [tuning.metric],
                **{name: getattr(tuning, name) for name in ("num", "batch_size", "features", "weights", "guidance")},
            },
        }
    )


def _value(tuning: Tuning, record: Mapping[str, Any], path: Path) -> float:
    if tuning.number.name not in record["numbers"]:
        raise InputError(f"{printable(path)} has no {tuning.number.name}: rank by another --metric")
    return float(record["numbers"][tuning.number.name])


@dataclass(frozen=True)
class _Outcome:
    """Hold the measurements of a finished study: values and failures by contestant and seed, and the costs."""

    values: dict[str, dict[int, float]]
    failed: dict[str, dict[int, str]]
    seconds: float
    made_on: Record


def _outcome(tuning: Tuning, study: Study, folder: Path) -> _Outcome:
    """Read the results of a finished study; those of the untouched checkpoint have the name "untouched"."""
    values: dict[str, dict[int, float]] = {}
    failed: dict[str, dict[int, str]] = {}
    seconds, made_on = 0.0, Record()
    for run in plan(study, folder):
        if run.error is not None:
            failed.setdefault(run.method, {})[run.seed] = run.error
            continue
        (cell,) = run.cells
        record = read_cell(cell, study, run)
        values.setdefault(run.method, {})[run.seed] = _value(tuning, record, cell.path)
        seconds += (record["seconds"] or 0) + read(run.path, Loss).seconds
        made_on = {
            **{name: record[name] for name in ("device", "threads", "torch")},
            "data": record["training"]["data"],
        }
    for cell in reference_cells(study, folder):
        record, seed = read_cell(cell, study, None), study.references[cell.network].seed
        assert seed is not None
        values.setdefault("untouched", {})[seed] = _value(tuning, record, cell.path)
        seconds += record["seconds"] or 0
    return _Outcome(values, failed, seconds, made_on)


# -- the search ----------------------------------------------------------------------------------------------


def _best(
    tuning: Tuning, contestants: Mapping[str, Settings], values: Mapping[str, Mapping[int, float]], count: int
) -> dict[str, Settings]:
    """Return the best contestants of those that have a value, at most ``count``, the best first."""
    sign = 1 if tuning.number.better == "lower" else -1
    ordered = sorted((n for n in contestants if n in values), key=lambda name: sign * values[name][tuning.seed])
    return {name: contestants[name] for name in ordered[:count]}


def tune(
    tuning: Tuning, folder: Path, *, processes: int | None = None, progress: Progress = SILENT
) -> Iterator[Record]:
    """Search, and confirm what is found.

    Args:
        tuning: The settings.
        folder: The folder of the search. What it holds of the same search is kept.
        processes: The number of single-threaded processes that share the work. By default it is done in this process.
        progress: The receiver of the progress, as in :func:`robustdiff.study.run.run_study`.

    Yields:
        The record of each rung when it is finished, and at last the contents of ``result.json``. A signal ends it
        early.

    Raises:
        InputError: If the folder holds another search, or the settings do not suit the network.
        RunError: If no plain fine-tuning is left, or a process is killed.
    """
    tuning = _settle(tuning, folder)
    left, plain, untouched = candidates(tuning), plain_trainings(tuning), None
    *halvings, last = stages(tuning)
    rungs: list[Record] = []
    seconds = 0.0
    for stage, following in itertools.pairwise((*halvings, last)):
        every = {**left, **plain}
        study = _study(tuning, stage, every, next(iter(plain)), [tuning.seed], tuning.untouched and not rungs)
        if not run_study(study, folder / stage.name, processes=processes, progress=progress, tolerant=True):
            return
        found = _outcome(tuning, study, folder / stage.name)
        seconds += found.seconds
        untouched = found.values.get("untouched", {}).get(tuning.seed, untouched)
        left = _best(tuning, left, found.values, following.candidates)
        plain = _best(tuning, plain, found.values, following.plain)
        contestants = {n: _record(study, n, own, found, n in left or n in plain) for n, own in every.items()}
        passes = {"rung": len(rungs) + 1, "backward_passes": stage.passes}
        rungs.append({**passes, "seed": tuning.seed, "untouched": untouched, "contestants": contestants})
        yield rungs[-1]
        if not plain:
            raise RunError(f"every plain fine-tuning failed ({folder / stage.name / 'trainings'} says how): lower lr")
    roles = _roles(tuning, left, plain)
    study = _study(tuning, last, dict(roles.values()), next(iter(plain)), tuning.confirming, tuning.untouched)
    if not run_study(study, folder / last.name, processes=processes, progress=progress, tolerant=True):
        return
    found = _outcome(tuning, study, folder / last.name)
    confirmed = {role: {"name": name, **_record(study, name, own, found)} for role, (name, own) in roles.items()}
    if tuning.untouched:
        values = {str(seed): value for seed, value in found.values["untouched"].items()}
        confirmed["untouched"] = {"name": "untouched", "settings": None, "values": values, "failed": {}}
    comparisons = _compare(tuning, confirmed)
    answer = decide(comparisons, tuning.untouched)
    record = {
        "tuning": tuning.model_dump(mode="json"),
        "number": tuning.number.name,
        "rungs": rungs,
        "confirmation": {"backward_passes": last.passes, "seeds": tuning.confirming, "contestants": confirmed},
        "comparisons": comparisons,
        "answer": answer,
        "trainings": sum(len(rung["contestants"]) for rung in rungs) + len(roles) * tuning.seeds,
        "process_seconds": round(seconds + found.seconds),
        "obtained_on": found.made_on,
    }
    if answer != "untouched":
        own = {**study.methods[roles[answer][0]].set, "output": str(folder / "run")}
        recipe = load_recipe(tuning.recipe, changes={**tuning.set, **own})
        with atomic_write(folder / "recipe.yaml") as file:
            file.write(recipe.to_yaml().encode())
    write_json(folder / "result.json", record)
    yield record


def _record(study: Study, name: str, settings: Mapping[str, Any], found: _Outcome, kept: bool | None = None) -> Record:
    """Return the record of a trained contestant: its values and failures by seed, and in a rung whether it goes on."""
    return {
        "settings": settings,
        "updates": study.methods[name].set["steps"],
        "values": {str(seed): value for seed, value in found.values.get(name, {}).items()},
        "failed": {str(seed): error for seed, error in found.failed.get(name, {}).items()},
        **({} if kept is None else {"kept": kept}),
    }


def _roles(
    tuning: Tuning, left: Mapping[str, Settings], plain: Mapping[str, Settings]
) -> dict[str, tuple[str, Settings]]:
    """Return the names and settings of the confirmation's contestants by their roles, given one of each kind.

    There is no candidate if all of them failed.
    """
    roles = {role: item for role, own in (("candidate", left), ("plain", plain)) for item in own.items()}
    if "candidate" in roles:
        _, settings = roles["candidate"]
        recipe = load_recipe(tuning.recipe, changes={**tuning.set, **_changes(tuning, settings)})
        passes = recipe.adversary.example().passes
        if passes > 1:
            clean = {"adversary": {"name": "random", "steps": passes, "radius": 0}}
            roles["control"] = "repeat", {**clean, **_without_delta(settings)}
    return roles


def _compare(tuning: Tuning, confirmed: Mapping[str, Record]) -> list[Record]:
    """Return the differences of contestants over the confirming seeds, and adjust the p-values of those that decide."""
    number = tuning.number
    for role, own in confirmed.items() if number.log else ():
        for seed, value in own["values"].items():
            if value <= 0:
                raise InputError(
                    f"the {number.title} of {role} is {value:g} with seed {seed}, and values are compared by their "
                    "logarithms: rank by another --metric, in another --output"
                )
    scale = math.log if number.log else float
    made: list[Record] = []
    for one, other, decides in (
        ("candidate", "plain", True),
        ("candidate", "untouched", True),
        ("plain", "untouched", True),
        ("candidate", "control", False),
    ):
        if one not in confirmed or other not in confirmed:
            continue
        ours, theirs = confirmed[one]["values"], confirmed[other]["values"]
        differences = {int(s): scale(ours[s]) - scale(theirs[s]) for s in ours if s in theirs}
        effect = Effect(differences, 0.0, relative=number.log)
        interval = effect.interval
        better = (effect.mean < 0) == (number.better == "lower") if effect.n else False
        made.append(
            {
                "of": one,
                "to": other,
                "relative": number.log,
                "n": effect.n,
                "mean": effect.mean if effect.n else None,
                "interval": None if interval is None else [interval.low, interval.high],
                "p": effect.p,
                "better": better,
                "complete": effect.n == tuning.seeds,
                "decides": decides,
            }
        )
    tested = [record for record in made if record["decides"] and record["p"] is not None]
    for record, p in zip(tested, holm([record["p"] for record in tested]), strict=True):
        record["p_adjusted"] = p
    return made


def decide(comparisons: Sequence[Record], untouched: bool) -> str:
    """Return "candidate", "plain" or "untouched", by :data:`RULE`.

    Where there is no untouched checkpoint, the candidate has to be better than plain training, and else it is "plain".
    """

    def wins(one: str, other: str) -> bool:
        return any(
            (c["of"], c["to"]) == (one, other) and c["better"] and c["complete"] and c["p_adjusted"] < LEVEL
            for c in comparisons
        )

    if wins("candidate", "plain") and (not untouched or wins("candidate", "untouched")):
        return "candidate"
    return "plain" if not untouched or wins("plain", "untouched") else "untouched"


# -- the settings --------------------------------------------------------------------------------------------


def new_tuning(
    recipe: str,
    changes: Mapping[str, Any],
    tried: Mapping[str, Sequence[Any]],
    folder: Path,
    *,
    updates: int | None = None,
    minutes: float = 30.0,
    processes: int = 1,
    features: str | None = None,
    weights: Path | None = None,
    **options: Any,
) -> tuple[Tuning, Speed]:
    """Return the settings of a search, and the speed of this machine. Nothing is written.

    Args:
        recipe: The name or the file of a recipe. If it has no adversary, the candidates have free adversarial training.
        changes: Changes of the recipe, by dotted names.
        tried: Lists of values of fields, in place of those of :func:`default_space` or in addition to them.
        folder: The folder of the search. If it holds one, its number of updates is taken.
        updates: The backward passes of the last rung and of the confirmation, or None for as many as take ``minutes``
            with ``processes``.
        features, weights: The extractor and its weights; by default the one made for the dataset.
        options: Further fields of :class:`Tuning`.

    Raises:
        InputError: If an option is out of its range, a setting makes no valid recipe, the sampler does not suit the
            network, the minutes are too few, or the folder holds another search.
    """
    for field in ("seed", "output"):
        if field in changes:
            raise InputError(f"--set {field}: the trainings have their own: give --{field}")
    base = load_recipe(recipe, changes=changes)
    if base.adversary.name == "none":
        changes = {**changes, "adversary": "free"}
        base = load_recipe(recipe, changes=changes)
    for field, values in tried.items():
        if field.split(".")[0] in FIXED or field == "adversary.name":
            raise InputError(f"--try {field}: it is the same for all contestants: leave it out")
        if not values or any(value in values[:i] for i, value in enumerate(values)):
            raise InputError(f"--try {field}: give distinct values with commas, such as --try lr=1e-5,1e-4")
    space = {**default_space(base), **{field: tuple(values) for field, values in tried.items()}}
    if (most := math.prod(map(len, space.values()))) > MOST_SETTINGS:
        raise InputError(f"--try: the lists make {most:,} settings; at most {MOST_SETTINGS:,} are drawn from")
    target = load_target(base.data, features, weights, torch.device("cpu"))
    given = {name: value for name, value in options.items() if value is not None}
    rungs = given.get("rungs", Tuning.model_fields["rungs"].default)
    try:
        tuning = Tuning.model_validate(
            {
                "recipe": recipe,
                "set": dict(changes),
                "space": space,
                "untouched": False,
                "updates": updates or 2 ** max(0, rungs - 1) * FEWEST,
                "minutes": None if updates else minutes,
                "seed": base.seed,
                "features": features or target.record["features"],
                "weights": None if weights is None else str(weights),
                **given,
            }
        )
    except ValidationError as error:
        raise InputError(f"--{first_mistake(error)}") from None
    if tuning.candidates > most:
        raise InputError(f"--candidates {tuning.candidates}: the lists make {most} settings: give at most as many")
    tuning = tuning.model_copy(update={"untouched": _samples(base, tuning, captions_of(target.dataset))})
    plain = plain_trainings(tuning)
    every = {**candidates(tuning), **plain}
    for stage in stages(tuning):
        for settings in every.values():
            _scaled(tuning, settings, stage.passes)  # raises where a setting makes no recipe
    before = _existing(folder)
    if before is not None:
        tuning = _checked(before, tuning, folder)
    run = plan(_study(tuning, stages(tuning)[0], every, next(iter(plain)), [tuning.seed], False), folder)[0]
    speed = Speed(time_training(run) * base.batch_size, time_sampling(run))
    if before is None and updates is None:
        tuning = _fit(tuning, speed, minutes, processes)
    return tuning, speed


def _samples(recipe: Recipe, tuning: Tuning, captions: tuple[str, ...]) -> bool:
    """Return whether the recipe fine-tunes a checkpoint that the sampler suits."""
    source = recipe.model.source
    if source is None:
        return False
    model = load_model(source)
    if tuning.sampler not in model.samplers:  # such as a diffusion model that is distilled into a consistency model
        logger.warning(
            "%s is no contestant: the sampler %s does not suit it, but %s",
            printable(source),
            tuning.sampler,
            " or ".join(model.samplers),
        )
        return False
    try:
        Generator.of(model, sampler=tuning.sampler, steps=tuning.steps, data_captions=captions)
    except InputError as error:
        raise InputError(f"{printable(source)}: {error}") from None
    return True


def _fit(tuning: Tuning, speed: Speed, minutes: float, processes: int) -> Tuning:
    """Return the search with the most updates that take at most some minutes."""

    def sized(updates: int) -> Tuning:
        return tuning.model_copy(update={"updates": updates})

    def seconds(updates: int) -> float:
        own = sized(updates)
        return sum(stage.seconds(own, speed, processes) for stage in stages(own))

    low, high = tuning.updates, MOST_UPDATES
    if seconds(low) > 60 * minutes:
        raise InputError(
            f"--minutes {minutes:g}: {low} updates take {seconds(low) / 60:.0f} already: give more minutes, or fewer "
            "--candidates, --seeds or images by --num"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= 60 * minutes else (low, middle)
    return sized(low)


def _existing(folder: Path) -> Tuning | None:
    """Return the settings of the search that a folder holds."""
    path = folder / "tune.yaml"
    if not path.is_file():
        return None
    found = read_yaml(path)
    try:
        return Tuning.model_validate({"noise": None, **found} if isinstance(found, dict) else found)
    except ValidationError as error:
        raise InputError(f"{printable(path)}: {first_mistake(error)}: choose another --output") from None


def _checked(before: Tuning, tuning: Tuning, folder: Path) -> Tuning:
    """Return the settings in a folder, which must be the given ones but for updates that were chosen by the minutes."""
    check_noise(folder / "tune.yaml", before.noise)
    for name in Tuning.model_fields:
        chosen = name == "updates" and tuning.minutes is not None
        if not chosen and getattr(tuning, name) != getattr(before, name):
            raise InputError(
                f"{printable(folder)} holds a search with another {name}: restore it, or choose another --output"
            )
    return before


def _settle(tuning: Tuning, folder: Path) -> Tuning:
    """Write the settings, or return those of an earlier start or of another process, which must be the same."""
    claim_folder(folder, "a search")
    while True:
        with held(folder / "locks" / "settings") as mine:
            if mine:
                if (before := _existing(folder)) is not None:
                    return _checked(before, tuning, folder)
                text = yaml.safe_dump(tuning.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
                with atomic_write(folder / "tune.yaml") as file:
                    file.write(text.encode())
                return tuning
        time.sleep(0.05)
