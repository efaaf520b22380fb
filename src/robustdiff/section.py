"""What the sections of a recipe are made of: a base class, types of fields, and the choice among registered kinds.

A recipe may be somebody else's. Its numbers have bounds that no training comes near, so that none of them can ask for
more memory or time than a machine has before anything is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from robustdiff.errors import printable

__all__ = [
    "MOST_PARAMETERS",
    "MOST_UPDATES",
    "Decay",
    "Fraction",
    "Named",
    "Precision",
    "Section",
    "Text",
    "Times",
    "Width",
    "choice",
    "given",
    "native_precision",
]

MOST_UPDATES = 10**9
MOST_PARAMETERS = 20_000_000_000  # of a new network

Fraction = Annotated[float, Field(ge=0, lt=1)]


def _one_line(text: str) -> str:
    # What stands for a byte of a file's name that is not UTF-8 may be in it, since it can be in a path.
    if not all(c.isprintable() or "\udc80" <= c <= "\udcff" for c in text):
        raise ValueError(
            f"{printable(text[:200])!r} has control characters: it cannot be the name of a folder or of anything else"
        )
    return text


Text = Annotated[str, Field(max_length=8192), AfterValidator(_one_line)]
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


def native_precision() -> str:
    """What "auto" stands for: bf16 where the GPU, or without one the CPU, computes in it, else fp32.

    A CPU without instructions for it trains a UNet more than ten times slower in bf16 than in fp32. A recipe that says
    "auto" becomes one that says which before anything is made of it, so a run's folder holds what it was trained in.
    """
    if torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        # An older torch does not tell.
        instructions: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = instructions.get("avx512_bf16", False) or instructions.get("amx_bf16", False)
    return "bf16" if native else "fp32"


Precision = Annotated[
    Literal["fp32", "bf16", "fp16"],
    BeforeValidator(lambda precision: native_precision() if precision == "auto" else precision),
]


class Section(BaseModel):
    """A part of a recipe: unknown fields and infinite numbers are errors, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
    """Return whether a field is not its default. A recipe that was written whole has the defaults, too."""
    default: Any = type(section).model_fields[name].default
    return bool(getattr(section, name) != default)


def choice(what: str, kinds: Mapping[str, type[Named]], default: str) -> Any:
    """Return the type of a field that holds one of several sections, told apart by their ``name``.

    A recipe that was written whole, when all kinds shared one section, has the fields of other kinds at their defaults:
    those are left out.

    Arguments:
        what: The field, for messages.
        kinds: The sections by their names.
        default: The kind of a section without a name.
    """

    def name_of(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get("name", default)
        return value if isinstance(value, str) else getattr(value, "name", None)

    def without_defaults_of_others(value: Any) -> Any:
        if not isinstance(value, dict) or (kind := kinds.get(name_of(value))) is None:
            return value
        defaults: dict[str, list[Any]] = {}
        for other in kinds.values():
            for name, field in other.model_fields.items():
                if name not in kind.model_fields:
                    defaults.setdefault(name, []).append(field.get_default())
        return {n: v for n, v in value.items() if not any(_same(v, d) for d in defaults.get(n, ()))}

    union: Any = Union[tuple(Annotated[kind, Tag(name)] for name, kind in kinds.items())]  # noqa: UP007
    return Annotated[
        union,
        Discriminator(
            name_of,
            custom_error_type=f"unknown_{what}",
            custom_error_message=f"unknown {what}: use one of {', '.join(kinds)}",
        ),
        BeforeValidator(without_defaults_of_others),
    ]


def _same(value: Any, default: Any) -> bool:
    return bool(value == (list(default) if isinstance(default, tuple) else default))
