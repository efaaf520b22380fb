"""The validated configuration of a run.

A recipe is a YAML file with the fields of :class:`Recipe`. A section may be given by its name alone (``data: digits``
for ``data: {name: digits}``). On the command line, ``--set adversary.step_size=0.5`` overrides one field. Recipes
shipped with the package are loaded by name, without a path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from robustdiff.backbones.backbone import SECTIONS, BackboneSection
from robustdiff.codecs.codec import CODECS, CodecSection
from robustdiff.data import DataConfig
from robustdiff.errors import InputError, printable
from robustdiff.objectives.objective import OBJECTIVES, ObjectiveConfig
from robustdiff.perturbation import ADVERSARIES, AdversaryConfig
from robustdiff.process import ProcessConfig
from robustdiff.samplers.sample import SAMPLERS
from robustdiff.section import MOST_UPDATES, Decay, Fraction, Named, Precision, Section, Text, Times, choice, refusal
from robustdiff.yaml_reader import parse_yaml, read_yaml, split_assignment

__all__ = ["DataConfig", "Recipe", "SignsConfig", "WatchConfig", "load_data_config", "load_recipe", "shipped_recipes"]


if TYPE_CHECKING:
    _Model = BackboneSection
    _Codec = CodecSection
    _Objective = ObjectiveConfig
    _Adversary = AdversaryConfig
else:
    _Model = choice("model", SECTIONS, default="unet")
    _Codec = choice("codec", CODECS, default="pixels", merged=False)
    _Objective = choice("objective", OBJECTIVES, default="denoising", merged=False)
    _Adversary = choice("adversary", ADVERSARIES, default="none", merged=False)


_KINDS: dict[str, Mapping[str, type[Section]]] = {
    "model": SECTIONS,
    "codec": CODECS,
    "objective": OBJECTIVES,
    "adversary": ADVERSARIES,
}


def _known_sampler(name: str) -> str:
    try:
        SAMPLERS[name]
    except InputError as error:
        raise ValueError(str(error)) from None
    return name


class SamplerConfig(Named):
    """The section ``sampler`` of a recipe: the default sampler of ``robustdiff sample`` for the run."""

    name: Annotated[Text, AfterValidator(_known_sampler)] | None = Field(
        None, description="name of a sampler; by default one that suits the model"
    )
    steps: Times | Text | None = Field(
        None, description="number of network evaluations for one image, or a string that the sampler takes"
    )


class SignsConfig(Section):
    """The section ``watch.signs`` of a recipe: the signs of a training that goes wrong, and their thresholds.

    A threshold of null switches its sign off. The rules are in :mod:`robustdiff.training.signs`.
    """

    action: Literal["warn", "stop", "off"] = Field(
        "warn", description="what a sign does: a warning, or the end of the training as well"
    )
    long_sampling: float | None = Field(
        0.05, ge=0, description="how far the metric at the most steps may be above the start's, as a part of it"
    )
    clip_score: float | None = Field(0.0, ge=0, description="how far the CLIP score may be below the start's")
    at_radius: float | None = Field(0.95, ge=0, le=1, description="share of samples whose δ is at its radius")
    skipped_ascents: float | None = Field(0.05, ge=0, le=1, description="share of ascents that are skipped")
    skipped_updates: float | None = Field(0.05, ge=0, le=1, description="share of fp16 updates that overflow")
    pass_ratio: float | None = Field(
        1.5, ge=1, description="growth of the loss of the last pass over that of the first, as a factor"
    )


class WatchConfig(Section):
    """The section ``watch`` of a recipe: measurements of the model while it is trained."""

    every: Literal["auto"] | int = Field(
        "auto", description="number of updates between measurements; auto: as many as cost a tenth of the training"
    )
    samplers: tuple[Text, ...] = Field(
        (), max_length=100, description="by default that of the recipe, else the first that suits the model"
    )
    steps: tuple[Times, ...] = Field(
        (), max_length=100, description="numbers of network evaluations; by default the recipe's, and 50"
    )
    num: int = Field(1000, ge=4, le=10**7, description="number of images of each sampler and number of steps")
    metric: Text = Field(
        "fid", description="a metric, or clip-score=FOLDER; its first number with a better direction is watched"
    )
    average: bool = Field(True, description="measure the moving average; false: the weights themselves")
    features: Text | None = Field(None, description="extractor of the metric; by default that made for the data")
    weights: Text | None = Field(None, description="weights file of Inception")
    guidance: float | None = Field(None, ge=0, le=1000, description="scale of classifier-free guidance")
    seed: int = Field(0, ge=0, lt=2**63 - 1, description="seed of the images' noise; the last measurement has the next")
    batch_size: int = Field(128, ge=1, le=2**20, description="number of images at a time")
    signs: SignsConfig = SignsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> WatchConfig:
        if self.every != "auto" and not 1 <= self.every <= MOST_UPDATES:
            raise refusal("every", f"must be auto, or a number of updates from 1 to {MOST_UPDATES}; got {self.every}")
        for name in ("samplers", "steps"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise refusal(name, "the same value is given twice")
        return self


class Recipe(Section):
    """The configuration of a training run."""

    data: DataConfig = DataConfig()
    model: _Model = Field("unet", validate_default=True)
    codec: _Codec | None = Field(None, description="by default pixels, or the codec of the pretrained model")
    process: ProcessConfig | None = Field(None, description="by default cosine, or the process of the pretrained model")
    objective: _Objective | None = Field(
        None, description="by default ε-prediction at uniform times, or the parameterisation of the pretrained model"
    )
    adversary: _Adversary = Field("none", validate_default=True)
    sampler: SamplerConfig = SamplerConfig()
    output: Text = Field("runs/run", description="folder of the run")
    steps: int = Field(1000, ge=1, le=MOST_UPDATES, description="number of optimiser updates")
    batch_size: int = Field(
        128, ge=1, le=2**20, description="number of images per update, over all processes and microbatches"
    )
    accumulate: int = Field(1, ge=1, le=2**20, description="number of microbatches per update")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit holds the moments in 8 bits, by bitsandbytes"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate of AdamW")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up; cosine decays to 0")
    warmup: int = Field(0, ge=0, le=MOST_UPDATES, description="number of updates of linear warm-up from 0")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip: float | None = Field(None, gt=0, description="maximum norm of the gradient; none: not clipped")
    ema: Decay = Field(
        "auto", description="decay of the moving average; auto: its width grows with the run; 0: no average"
    )
    precision: Precision = Field(
        "fp32", description="mixed precision of the network; auto: bf16 if the device supports it, else fp32"
    )
    capture: bool | Literal["auto"] = Field(
        "auto",
        description="record the passes over a batch as a CUDA graph, and replay it; auto: on CUDA; a line says where "
        "this is not possible",
    )
    compile: bool = Field(False, description="torch.compile the network")
    channels_last: bool | None = Field(None, description="channels-last memory format; by default on CUDA with adamw")
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1, le=1024, description="number of CPU threads of torch")
    checkpoint_every: int = Field(1000, ge=1, le=MOST_UPDATES, description="number of updates between checkpoints")
    keep: int = Field(2, ge=1, le=MOST_UPDATES, description="number of checkpoints to keep")
    log_every: int = Field(10, ge=1, le=MOST_UPDATES, description="number of updates between lines of metrics.jsonl")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), max_length=2, description="trackers to log to, through accelerate"
    )
    watch: WatchConfig | None = Field(
        None,
        description="measurements while the model is trained, of which the best is kept; true: with their defaults, "
        "none: no measurement",
    )

    @model_validator(mode="before")
    @classmethod
    def _watch_is_switched(cls, value: Any) -> Any:
        switches: dict[Any, Any] = {True: {}, False: None, "none": None}
        if isinstance(value, dict) and isinstance(watch := value.get("watch"), bool | str) and watch in switches:
            value = {**value, "watch": switches[watch]}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.optimizer == "adamw8bit" and self.channels_last:
            raise ValueError("optimizer=adamw8bit makes parameters contiguous: leave channels_last out")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        for option, value in (("crop", "random"), ("buckets", True)):
            if self.caches_latents and getattr(self.data, option) == value:
                raise ValueError(
                    f"data.{option}={str(value).lower()} needs other crops of the images than codec.cache keeps: set "
                    "codec.cache=false, or leave it out"
                )
        if self.data.buckets and (self.data.size is None or self.data.size % self.data.bucket_step):
            raise ValueError(
                f"data.buckets=true needs data.size, a multiple of data.bucket_step={self.data.bucket_step}; it is "
                f"{self.data.size}"
            )
        if self.adversary.by_level and self.objective is not None and not self.objective.fixed_levels:
            raise ValueError(
                "radius.by_noise and radius.within need levels that stay: set objective.schedule=fixed, or leave them "
                "out"
            )
        return self

    @property
    def caches_latents(self) -> bool:
        """True if the latents of the dataset are computed once and kept on disk."""
        return self.codec is not None and self.codec.caches

    def to_yaml(self) -> str:
        """Return the recipe as YAML, including defaults."""
        values = self.model_dump(mode="json")
        if self.objective is not None and not self.objective.over_levels and self.model.name == "pretrained":
            # The default of a field that is not given is the checkpoint's setting.
            values["objective"] = self.objective.model_dump(mode="json", exclude_unset=True)
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in (files("robustdiff") / "recipes").iterdir() if p.name.endswith(".yaml")
    )


def _explain(error: ValidationError, source: str) -> InputError:
    """Return the first validation error in one line."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    if loc[:2] in (["sampler", "steps"], ["watch", "every"]):  # pydantic appends the member of the union
        loc = loc[:2]
    where = printable(" ".join(".".join(loc).split())[:200])  # a key may contain a line break
    source = printable(source)
    if first["type"] == "unknown_field":
        return InputError(f"{source}: unknown field {where}{first['msg'].removeprefix('unknown field')}")
    message = printable(first["msg"].removeprefix("Value error, ")[:1000])
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        message += f""": put quotes around it (on a command line --set "{where}='…'")"""
    if first["type"] == "tuple_type":
        shown = printable(str(first["input"])[:100])
        message = f"give a list, as in --set {where}='[{shown}]'"
    message = message[:1].lower() + message[1:]
    return InputError(f"{source}: {where}: {message}" if where else f"{source}: {message}")


def _override(values: dict[str, Any], assignment: str) -> None:
    """Apply an assignment ``key.key=value``, with the value parsed as YAML."""
    key, text = split_assignment(assignment, "--set", "adversary.step_size=0.5")
    # In YAML, a colour such as #808080 would be a comment.
    _assign(values, key, text if text.startswith("#") else parse_yaml(text, f"--set {assignment}"))


def _named(section: str, fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of a section of another name, without those that its kind does not have."""
    kinds = _KINDS.get(section, {})
    if name in kinds and fields.get("name") != name:
        fields = {field: value for field, value in fields.items() if field in kinds[name].model_fields}
    return {**fields, "name": name}


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the field with a dotted name."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        # Expand a section that is given by its name alone; watch has none.
        by_name = isinstance(inner, str) and section != "watch"
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            raise InputError(f"{key} and {section}={inner} exclude each other: give one of them, or fields alone")
        inner = {"name": inner} if by_name else dict(inner) if isinstance(inner, dict) else {}
        values[section] = inner
        values = inner
    if isinstance(value, str) and isinstance(values.get(last), dict) and key != "watch":
        values[last] = _named(key, values[last], value)
    elif last == "name" and isinstance(value, str):
        named = _named(sections[0] if len(sections) == 1 else "", values, value)
        values.clear()
        values.update(named)
    else:
        values[last] = value


def load_recipe(
    source: str, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None, *, cpu: bool = False
) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: A YAML file, or the name of a shipped recipe.
        overrides: Assignments ``key.key=value``, applied in order.
        changes: Further values by dotted key.
        cpu: Whether it is for the CPU even if there is a GPU, which ``precision: auto`` depends on.

    Raises:
        InputError: If the recipe is missing or refused by :func:`robustdiff.yaml_reader.parse_yaml`, or a field is
            unknown or out of range.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        try:
            there = path.is_file()
        except OSError:  # a path that is too long
            there = False
        if not there:
            raise InputError(f"no recipe file {printable(source)}; shipped recipes: {', '.join(shipped_recipes())}")
        values = read_yaml(path)
    elif source in shipped_recipes():
        values = parse_yaml((files("robustdiff") / "recipes" / f"{source}.yaml").read_bytes(), source)
    else:
        raise InputError(f"unknown recipe {source!r}: give a .yaml file, or one of {', '.join(shipped_recipes())}")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{printable(source)}: a recipe is a mapping of fields, such as 'data: digits'")
    for assignment in overrides:
        _override(values, assignment)
    for key, value in (changes or {}).items():
        _assign(values, key, value)
    try:
        return Recipe.model_validate(values, context={"cpu": cpu})
    except ValidationError as error:
        raise _explain(error, source) from None


def load_data_config(
    source: str,
    overrides: Sequence[str] = (),
    name: str | None = None,
    root: str | None = None,
    *,
    workers: bool = False,
) -> DataConfig:
    """Return the data section of a recipe with overrides, for commands that compare with real images.

    If the overrides name another dataset, the recipe's own fields, such as root, split and size, are dropped.

    Args:
        source: A YAML file, or the name of a shipped recipe.
        overrides: Assignments ``data.key=value``, applied in order.
        name: The value of ``data.name``, if given.
        root: The value of ``data.root``, if given.
        workers: Whether the command uses ``data.workers``.

    Raises:
        InputError: If an assignment is not to the data section or would have no effect, or a field is given twice,
            unknown, or out of range.
    """
    own = load_recipe(source).data
    short = {field: value for field, value in (("name", name), ("root", root)) if value is not None}
    given: Any = {}
    for assignment in overrides:
        if assignment.partition("=")[0].split(".")[0] != "data":
            raise InputError(f"--set {assignment}: only fields of data are used here, such as --set data.size=16")
        _override(given, assignment)
    given = given.get("data", {})
    if not isinstance(given, dict):
        given = {"name": given}
    for option, field in (("--data", "name"), ("--root", "root")):
        if field in short and field in given:
            raise InputError(f"{option} and --set data.{field} are the same: give one of them")
    for field in ("flip", "crop", "buckets", "bucket_step", *([] if workers else ["workers"])):
        if field in given:
            raise InputError(f"--set data.{field}: this command does not use it, leave it out")
    replaced = {**given, **short}.get("name", own.name) != own.name
    values: dict[str, Any] = {"data": {} if replaced else own.model_dump()}
    for assignment in overrides:
        _override(values, assignment)
    if isinstance(values["data"], dict):
        values["data"].update(short)
    try:
        return Recipe.model_validate(values).data
    except ValidationError as error:
        raise _explain(error, source) from None
