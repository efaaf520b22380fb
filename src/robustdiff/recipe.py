"""The validated configuration of a run.

A recipe is a YAML file whose fields are those of :class:`Recipe`. A section may be given by its name alone
(``data: digits`` for ``data: {name: digits}``); on the command line ``--set adversary.step_size=0.5`` overrides one
field. A recipe shipped with the package is named without its path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from robustdiff.backbones.backbone import BackboneSection, PretrainedSection
from robustdiff.backbones.dit import DiTSection
from robustdiff.backbones.unet2d import UNetSection
from robustdiff.codecs.codec import CODECS, CodecSection
from robustdiff.data import ImageDataset, load_dataset
from robustdiff.errors import InputError, printable
from robustdiff.process import Prediction
from robustdiff.section import (
    MOST_UPDATES,
    Decay,
    Fraction,
    Named,
    Precision,
    Section,
    Text,
    Times,
    choice,
    given,
)
from robustdiff.yaml_reader import parse_yaml, read_yaml

__all__ = ["Recipe", "load_data_config", "load_recipe", "shipped_recipes"]


class DataConfig(Named):
    """What to train on."""

    name: Text = Field("fashion-16", description="a dataset by name, or hf:NAME")
    root: Text | None = Field(None, description="the folder or file of the data, where the dataset needs one")
    size: int | None = Field(None, ge=1, le=16_384, description="resize to this many pixels a side")
    channels: Literal[1, 3] | None = Field(None, description="convert to grey (1) or colour (3)")
    split: Text = Field("train", description="which part of the dataset")
    background: Text = Field("white", description="imagefolder, hf: the colour behind transparent pixels")
    image_column: Text | None = Field(None, description="hf: the column of the images, where several may be it")
    label_column: Text | None = Field(None, description="hf: the column of the labels, likewise")
    flip: bool = Field(False, description="mirror every other image at random")
    workers: int = Field(0, ge=0, le=256, description="processes that load images ahead")

    @field_validator("background", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if value is None:  # to YAML, what follows a # is a comment
            raise ValueError("no colour: a code such as '#808080' needs quotes")
        return value

    def load(self) -> ImageDataset:
        """Load the images.

        Raises:
            InputError: If the dataset is unknown, missing or malformed.
        """
        return load_dataset(
            self.name,
            root=self.root,
            size=self.size,
            channels=self.channels,
            split=self.split,
            background=self.background if given(self, "background") else None,
            image_column=self.image_column,
            label_column=self.label_column,
        )


class ProcessConfig(Named):
    """The forward process."""

    name: Literal["cosine", "linear", "flow", "pretrained"] = Field(
        "cosine", description="pretrained: the one that the checkpoint was trained with"
    )
    T: Times = Field(1000, description="the number of times")
    shift: float = Field(1.0, gt=0, description="flow: above 1 more of the times are noisy")

    @model_validator(mode="after")
    def _shifted(self) -> ProcessConfig:
        if self.shift != 1 and self.name != "flow":
            raise ValueError("process.shift is for process.name=flow")
        return self


class DenoisingConfig(Named):
    """The denoising loss of a diffusion model or of flow matching."""

    name: Literal["denoising"] = "denoising"
    prediction: Prediction = "epsilon"
    variance: Literal["fixed", "learned_range"] = "fixed"
    vb_scale: float | None = Field(None, gt=0, description="factor of the variational bound; learned_range only")
    timesteps: Literal["uniform", "loss-second-moment"] = Field("uniform", description="how times are drawn")
    input_perturbation: float = Field(0.0, ge=0, description="γ of input perturbation; 0: none")
    through_target: bool = Field(False, description="whether the gradient that moves δ goes through the target as well")


class OverLevels(Named):
    """A loss over noise levels σ; its network predicts x_0 by way of its preconditioning."""

    sigma_min: float = Field(0.002, gt=0, description="the smallest level")
    sigma_max: float = Field(80.0, gt=0, description="the largest level")
    rho: float = Field(7.0, gt=0, description="the levels are uniform in σ^{1/ρ}")
    sigma_data: float = Field(0.5, gt=0, description="the standard deviation of the data")

    @property
    def prediction(self) -> Prediction:
        """What the preconditioned network gives."""
        return "sample"

    @model_validator(mode="after")
    def _ascending(self) -> OverLevels:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self


class EdmConfig(OverLevels):
    """The denoising loss of Karras et al."""

    name: Literal["edm"]
    levels: int = Field(1000, ge=2, le=100_000, description="the number of levels")
    mean: float = Field(-1.2, description="P_mean of ln σ")
    std: float = Field(1.2, gt=0, description="P_std of ln σ")
    teacher: Text | None = Field(
        None, description="a run, a pipeline folder, or a shipped model, whose denoiser is learned; none: from the data"
    )
    teacher_below: float = Field(5.0, gt=0, description="the levels at which it is; above, from the data")

    @model_validator(mode="after")
    def _taught(self) -> EdmConfig:
        if self.teacher is None and given(self, "teacher_below"):
            raise ValueError("teacher_below has a meaning only with a teacher: set objective.teacher, or leave it out")
        return self


class ConsistencyConfig(OverLevels):
    """Consistency distillation, or training without a teacher."""

    name: Literal["consistency"]
    teacher: Text | None = Field(
        None, description="a run, a pipeline folder, or a shipped model, of diffusion or edm; none: no teacher"
    )
    solver: Literal["heun", "euler"] = Field("heun", description="of the teacher's ODE")
    perturb: Literal["solver", "student"] = Field("solver", description="what the adversary moves")
    metric: Literal["l1", "l2", "pseudo-huber", "lpips"] = Field("pseudo-huber", description="the distance")
    weighting: Literal["uniform", "inverse-gap"] = Field("uniform", description="inverse-gap: 1/(σ_{n+1} − σ_n)")
    times: Literal["uniform", "log-normal"] = Field("uniform", description="how pairs of levels are drawn")
    mean: float = Field(-1.1, description="log-normal: P_mean")
    std: float = Field(2.0, gt=0, description="log-normal: P_std")
    schedule: Literal["fixed", "growing", "doubling"] = Field("fixed", description="of the number of levels")
    scales: int = Field(
        18, ge=2, le=100_000, description="fixed: the number N of levels; otherwise s_1, the last N − 1"
    )
    start_scales: int | None = Field(None, ge=2, description="growing, doubling: s_0")
    decay: Fraction = Field(0.95, description="μ of the target network, growing: μ_0; 0: the student itself")

    @model_validator(mode="after")
    def _scheduled(self) -> ConsistencyConfig:
        if (self.schedule == "fixed") != (self.start_scales is None):
            raise ValueError("start_scales goes with schedule growing or doubling: give both, or neither")
        if self.start_scales is not None and self.start_scales > self.scales:
            raise ValueError(f"start_scales {self.start_scales} is more than scales {self.scales}")
        return self

    @model_validator(mode="after")
    def _used(self) -> ConsistencyConfig:
        if self.teacher is None and given(self, "solver"):
            raise ValueError("solver has a meaning only with a teacher: set objective.teacher, or leave it out")
        if self.times == "uniform" and (given(self, "mean") or given(self, "std")):
            raise ValueError(
                "mean and std have a meaning only with objective.times=log-normal: set it, or leave them out"
            )
        return self


def _objective_name(value: Any) -> Any:
    """The name that tells the objectives apart; a section without one is the denoising loss."""
    if isinstance(value, dict):
        return value.get("name", "denoising")
    return value if isinstance(value, str) else getattr(value, "name", None)


ObjectiveConfig = DenoisingConfig | EdmConfig | ConsistencyConfig
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "denoising": DenoisingConfig,
    "edm": EdmConfig,
    "consistency": ConsistencyConfig,
}
_Objective = Annotated[
    Annotated[DenoisingConfig, Tag("denoising")]
    | Annotated[EdmConfig, Tag("edm")]
    | Annotated[ConsistencyConfig, Tag("consistency")],
    Discriminator(
        _objective_name,
        custom_error_type="unknown_objective",
        custom_error_message=f"unknown objective: use one of {', '.join(OBJECTIVES)}",
    ),
]


MODELS: dict[str, type[BackboneSection]] = {"unet": UNetSection, "dit": DiTSection, "pretrained": PretrainedSection}
if TYPE_CHECKING:
    _Model = BackboneSection
    _Codec = CodecSection
else:
    _Model = choice("model", MODELS, "unet")
    _Codec = choice("codec", CODECS, "pixels")


class RadiusConfig(Section):
    """The radius of the ball: exactly one way of giving it."""

    value: float | None = Field(None, ge=0, description="a number, in units of the norm")
    eta: float | None = Field(None, ge=0, description="η·‖(1, …, 1)‖; in ℓ2 η√d")
    sampler_steps: Times | None = Field(
        None, description="with eta: no more than a sampler of so many steps covers in one"
    )
    by_noise: bool = Field(False, description="with eta: η·σ_t·‖(1, …, 1)‖, in proportion to the noise")
    within: tuple[float, float] | None = Field(
        None, description="the lowest and the highest σ_t that are perturbed; none: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"value": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_way(self) -> RadiusConfig:
        if (self.value is None) == (self.eta is None):
            raise ValueError("a radius is given by a number or by eta")
        if self.sampler_steps is not None and self.eta is None:
            raise ValueError("radius.sampler_steps needs radius.eta, the most per dimension")
        if self.by_noise and (self.eta is None or self.sampler_steps is not None):
            raise ValueError("radius.by_noise needs radius.eta, and does not go with radius.sampler_steps")
        if self.within is not None and not 0 <= self.within[0] <= self.within[1]:
            raise ValueError(f"radius.within must be two levels 0 ≤ low ≤ high; got {list(self.within)}")
        return self


class AdversaryConfig(Named):
    """What perturbs the noisy points."""

    name: Literal["none", "free", "pgd", "random"] = "none"
    steps: int = Field(3, ge=1, le=1000, description="K")
    step_size: float = Field(0.1, gt=0, description="α, in units of the norm")
    norm: Literal["l2", "linf", "l1"] = "l2"
    radius: RadiusConfig | None = Field(None, description="none: no projection")
    ramp: int = Field(0, ge=0, le=MOST_UPDATES, description="updates over which the radius grows from 0")

    @model_validator(mode="after")
    def _consistent(self) -> AdversaryConfig:
        if self.ramp and self.radius is None:
            raise ValueError("adversary.ramp needs adversary.radius: there is nothing else to ramp")
        return self


class SamplerConfig(Named):
    """How ``robustdiff sample`` makes the run's images, where it is not told otherwise."""

    name: Text | None = Field(None, description="a sampler; by default one that suits the model")
    steps: Times | Text | None = Field(
        None, description="network evaluations for one image, or a string that the sampler takes"
    )


class Recipe(Section):
    """One training run."""

    data: DataConfig = DataConfig()
    model: _Model = UNetSection()
    codec: _Codec | None = Field(None, description="pixels; for a pretrained model the one that it comes with")
    process: ProcessConfig | None = Field(
        None, description="cosine; for a pretrained model the one it was trained with"
    )
    objective: _Objective | None = Field(
        None, description="ε-prediction, uniform times; for a pretrained model what it predicts"
    )
    adversary: AdversaryConfig = AdversaryConfig()
    sampler: SamplerConfig = SamplerConfig()
    output: Text = Field("runs/run", description="the run's folder")
    steps: int = Field(1000, ge=1, le=MOST_UPDATES, description="optimiser updates")
    batch_size: int = Field(
        128, ge=1, le=2**20, description="images of one update, over all processes and microbatches"
    )
    accumulate: int = Field(1, ge=1, le=2**20, description="microbatches of one update")
    lr: float = Field(1e-4, gt=0, description="AdamW's learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up; cosine ends at 0")
    warmup: int = Field(0, ge=0, le=MOST_UPDATES, description="updates over which the learning rate grows from 0")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip: float | None = Field(None, gt=0, description="the largest norm of the gradient; none: not clipped")
    ema: Decay = Field(
        "auto", description="decay of the moving average; auto: one whose width grows with the run; 0: none"
    )
    precision: Precision = Field(
        "fp32", description="of the network; mixed with float32; auto: bf16 where the device computes in it, else fp32"
    )
    compile: bool = Field(False, description="torch.compile the network")
    channels_last: bool | None = Field(None, description="memory layout; by default on CUDA only, where it helps")
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of torch")
    checkpoint_every: int = Field(1000, ge=1, le=MOST_UPDATES, description="updates between checkpoints")
    keep: int = Field(2, ge=1, le=MOST_UPDATES, description="checkpoints to keep")
    log_every: int = Field(10, ge=1, le=MOST_UPDATES, description="updates between lines of metrics.jsonl")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), max_length=2, description="also log there, through accelerate"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        radius, objective = self.adversary.radius, self.objective
        by_level = radius is not None and (radius.by_noise or radius.within is not None)
        if by_level and getattr(objective, "schedule", "fixed") != "fixed":
            raise ValueError(
                "radius.by_noise and radius.within need levels that stay: set objective.schedule=fixed, or leave them "
                "out"
            )
        return self

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        values = self.model_dump(mode="json")
        if isinstance(self.objective, DenoisingConfig) and self.model.name == "pretrained":
            # What is not given here is the checkpoint's, not the default.
            values["objective"] = self.objective.model_dump(mode="json", exclude_unset=True)
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in (files("robustdiff") / "recipes").iterdir() if p.name.endswith(".yaml")
    )


def _explain(error: ValidationError, source: str) -> InputError:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    # The name of the kind of objective, which pydantic counts as a level and no recipe spells.
    unions: dict[str, Mapping[str, Any]] = {"objective": OBJECTIVES, "model": MODELS}
    kind = unions[loc[0]][loc.pop(1)] if len(loc) > 1 and loc[0] in unions else None
    if loc[:2] == ["sampler", "steps"]:  # pydantic adds which of its types
        loc = loc[:2]
    where = printable(" ".join(".".join(loc).split())[:200])  # a key may hold a line break
    source = printable(source)
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in loc[:-1]:
            annotation = section.model_fields[part].annotation
            section = kind or next(a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields"))
        return InputError(f"{source}: unknown field {where}; known here: {', '.join(section.model_fields)}")
    message = printable(first["msg"].removeprefix("Value error, ")[:1000])
    message = message[:1].lower() + message[1:]
    return InputError(f"{source}: {where}: {message}" if where else f"{source}: {message}")


def _override(values: dict[str, Any], assignment: str) -> None:
    """Apply one ``key.key=value``, the value read as YAML."""
    key, separator, text = assignment.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"--set {assignment}: write it as key=value, as in --set adversary.step_size=0.5")
    # A colour such as #808080 would be a comment.
    _assign(values, key, text if text.startswith("#") else parse_yaml(text, f"--set {assignment}"))


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the field of a dotted name."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        # A section given by its name alone becomes one with fields.
        inner = {"name": inner} if isinstance(inner, str) else dict(inner) if isinstance(inner, dict) else {}
        values[section] = inner
        values = inner
    if isinstance(value, str) and isinstance(values.get(last), dict):
        values[last] = {**values[last], "name": value}
    else:
        values[last] = value


def load_recipe(source: str, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    Arguments:
        source: A YAML file, or the name of a shipped recipe.
        overrides: Assignments ``key.key=value``, in the order in which they apply.
        changes: More of them, by key.

    Raises:
        InputError: If there is no such recipe, it is not YAML that is read here, or a field is unknown or out of its
            range.
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
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source) from None


def load_data_config(
    source: str, overrides: Sequence[str] = (), name: str | None = None, root: str | None = None
) -> DataConfig:
    """Return the data section of a recipe with fields of it changed, for a command that compares with real images.

    Where another dataset is named, nothing of the recipe's own section stays: its root, split and size belong to the
    dataset that it named.

    Arguments:
        source: A YAML file, or the name of a shipped recipe.
        overrides: Assignments ``data.key=value``, in the order in which they apply.
        name: Short for ``data.name``.
        root: Short for ``data.root``.

    Raises:
        InputError: If an assignment is not of the data section or only training uses it, a field is given twice, or
            is unknown or out of its range.
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
    for field in ("flip", "workers"):
        if field in given:
            raise InputError(f"--set data.{field}: only training uses it, leave it out")
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
