"""Sections of a recipe: a base class, types of fields, and the choice among registered sections.

Recipes may be untrusted. Numbers have generous bounds, so that no recipe can use excessive memory or time before it is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

import torch
from accelerate.utils import parse_flag_from_env
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from robustdiff.errors import printable
from robustdiff.yaml_reader import text_of

__all__ = [
    "MOST_LENGTH",
    "MOST_PARAMETERS",
    "MOST_UPDATES",
    "Decay",
    "Fraction",
    "Location",
    "Named",
    "Precision",
    "Section",
    "Text",
    "Times",
    "Width",
    "choice",
    "given",
    "native_precision",
    "refusal",
]

MOST_UPDATES = 10**9
MOST_LENGTH = 1e30  # of δ, within float32
MOST_PARAMETERS = 20_000_000_000  # in a new network

Fraction = Annotated[float, Field(ge=0, lt=1)]


def _one_line(text: str) -> str:
    # Surrogates are allowed, because they represent bytes of a path that are not UTF-8.
    if not all(c.isprintable() or "\udc80" <= c <= "\udcff" for c in text):
        raise ValueError(
            f"{printable(text[:200])!r} has control characters: it cannot be the name of a folder or of anything else"
        )
    return text


Text = Annotated[str, Field(max_length=8192), BeforeValidator(text_of), AfterValidator(_one_line)]


def _not_empty(path: str) -> str:
    if not path:
        raise ValueError("an empty path is the working folder: write . if that is meant")
    return path


Location = Annotated[Text, AfterValidator(_not_empty)]
"""The path of a file or folder, or a URL."""

Width = Annotated[int, Field(ge=1, le=65_536)]
Times = Annotated[int, Field(ge=1, le=100_000)]


def _decay(value: Any, number_or_auto: Callable[[Any], float | str]) -> float | str:
    try:
        decay = number_or_auto(value)
    except ValidationError:
        decay = math.nan
    if isinstance(decay, float) and not 0 <= decay < 1:
        raise ValueError(f"must be a number in [0, 1) or auto; got {value!r}")
    return decay


Decay = Annotated[float | Literal["auto"], WrapValidator(_decay)]


def native_precision(cpu: bool = False) -> str:
    """Return the precision for "auto": bf16 if the GPU, or without one the CPU, has instructions for it, else fp32.

    A CPU without such instructions trains a UNet more than ten times slower in bf16 than in fp32. "auto" is replaced
    when the recipe is validated, so that the recipe in a run's folder has the precision of the training.

    Args:
        cpu: Whether the CPU is used even if there is a GPU, as under ``accelerate launch --cpu``.
    """
    if torch.cuda.is_available() and not (cpu or parse_flag_from_env("ACCELERATE_USE_CPU")):
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        # Older versions of torch have no get_capabilities.
        instructions: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = instructions.get("avx512_bf16", False) or instructions.get("amx_bf16", False)
    return "bf16" if native else "fp32"


def _precision(value: Any, info: ValidationInfo) -> Any:
    return native_precision(bool(info.context and info.context["cpu"])) if value == "auto" else value


Precision = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_precision)]
"""A precision. "auto" is that of the device: of the CPU, if the context of the validation has ``"cpu": True``."""


def refusal(field: Any, message: str, kind: str = "refused") -> ValidationError:
    """Return an error for the validator of a section to raise, located at one field instead of the whole section."""
    error = PydanticCustomError(kind, message)
    return ValidationError.from_exception_data("recipe", [{"type": error, "loc": (field,), "input": None}])


class Section(BaseModel):
    """An immutable part of a recipe. Unknown fields and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _all_known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if isinstance(name, str) and name not in cls.model_fields:
                    raise refusal(name, f"unknown field; known here: {', '.join(cls.model_fields)}", "unknown_field")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if bool not in (annotation, *get_args(annotation)):
                raise ValueError(f"no truth value: got {str(value).lower()}")
        return value


class Named(Section):
    """A section that may be given by its name alone."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def given(section: Section, name: str) -> bool:
    """Return whether a field differs from its default; saved recipes also hold the defaults."""
    default: Any = type(section).model_fields[name].default
    return bool(getattr(section, name) != default)


def choice(what: str, kinds: Mapping[str, type[Named]], default: str, merged: bool = True) -> Any:
    """Return the type of a field that holds one of several sections, selected by their ``name``.

    Sections that are registered later are found as well.

    Args:
        what: The name of the field in messages.
        kinds: The sections by name.
        default: The name of the default section.
        merged: Whether earlier versions had one section for all kinds. Saved recipes of such versions have the fields
            of other kinds at their defaults, which are dropped.
    """

    def choose(value: Any) -> Any:
        name = value.get("name", default) if isinstance(value, dict) else getattr(value, "name", value)
        if not isinstance(name, str) or name not in kinds:
            shown = printable(repr(name)[:100])
            raise refusal("name", f"unknown {what} {shown}: use one of {', '.join(kinds)}")
        if not merged or not isinstance(value, dict):
            return kinds[name].model_validate(value)
        known, defaults = kinds[name].model_fields, dict[str, list[Any]]()
        for other in kinds.values():
            for field, info in other.model_fields.items():
                if field not in known:
                    defaults.setdefault(field, []).append(None if info.is_required() else info.get_default())
        return kinds[name].model_validate(
            {n: v for n, v in value.items() if not any(_same(v, d) for d in defaults.get(n, ()))}
        )

    return Annotated[SerializeAsAny[Named], BeforeValidator(choose)]


def _same(value: Any, default: Any) -> bool:
    return bool(value == (list(default) if isinstance(default, tuple) else default))
