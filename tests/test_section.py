"""Sections of a recipe: a field that ``build`` forgets would be accepted, and trained without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import diffusers
import pytest
import torch
from torch import Tensor, nn

from robustdiff.backbones.backbone import SECTIONS, BackboneSection
from robustdiff.codecs.codec import CODECS
from robustdiff.objectives.objective import OBJECTIVES
from robustdiff.perturbation import ADVERSARIES
from robustdiff.perturbation.radii import RadiusConfig
from robustdiff.process import DiffusionProcess, ProcessConfig
from robustdiff.section import Section

PROCESS, TARGET = DiffusionProcess.linear(100), nn.Linear(1, 1)


@dataclass(frozen=True)
class Teacher:
    path: str | None


def objective(section: Any) -> Any:
    return section.build(PROCESS, 7, TARGET, Teacher(section.teacher_path) if section.needs_teacher else None)


def network(section: Any) -> Any:
    with torch.device("meta"):
        return section.build((3, 8, 8), 10, False).network


def codec(section: Any) -> Any:
    vae = diffusers.AutoencoderKL(block_out_channels=[4], norm_num_groups=2)
    return section.build(SimpleNamespace(components={"vae": vae}, identity=True))


KINDS: dict[str, tuple[Mapping[str, type[Section]], Callable[[Any], Any]]] = {
    "adversary": (ADVERSARIES, lambda section: section.build(PROCESS)),
    "radius": ({"radius": RadiusConfig}, lambda section: section.build(PROCESS)),
    "process": ({"process": ProcessConfig}, lambda section: section.build()),
    "objective": (OBJECTIVES, objective),
    "model": ({n: kind for n, kind in SECTIONS.items() if kind.build is not BackboneSection.build}, network),
    "codec": (CODECS, codec),
}

BASE: dict[str, dict[str, Any]] = {  # settings that every section of a kind is compared from
    "radius": {"eta": 0.1},
    "unet": {"channels": [8, 16], "groups": 4, "head_width": 4, "attention": [False, True]},
    "dit": {"layers": 1, "heads": 2, "head_width": 4},
}

# What a field needs to have a meaning, and a second value where the type does not tell one. A field that may be None
# has a first value too: that it is None or not could be all that is read of it.
CASES: dict[str, tuple[dict[str, Any], Any] | tuple[dict[str, Any]]] = {
    "radius": ({"radius": 1.0}, 2.0),
    "ramp": ({"radius": 1.0, "ramp": 3},),
    "value": ({"eta": None, "value": 1.0},),
    "sampler_steps": ({"sampler_steps": 20},),
    "within": ({"within": [0.1, 0.5]},),
    "shift": ({"name": "flow"},),
    "vb_scale": ({"variance": "learned_range", "vb_scale": 2.0},),
    "timesteps": ({}, "loss-second-moment"),
    "teacher": ({"teacher": "runs/teacher"}, "runs/another"),
    "teacher_below": ({"teacher": "runs/teacher"},),
    "solver": ({"teacher": "runs/teacher"},),
    "consistency.mean": ({"times": "log-normal"},),
    "consistency.std": ({"times": "log-normal"},),
    "schedule": ({"schedule": "growing", "start_scales": 3}, "doubling"),
    "start_scales": ({"schedule": "growing", "start_scales": 3},),
    "guidance_embedding": ({"guidance_embedding": 8},),
    "channels": ({}, [8, 24]),
    "groups": ({}, 2),
    "head_width": ({}, 8),
    "attention": ({}, [True, True]),
    "unet.condition_dropout": ({"class_cond": True}, 0.5),
    "patch": ({}, 4),
    "path": ({"path": "fashion-16-vae"}, None),
}

# Fields that are for others than ``build``.
ELSEWHERE = {
    "lora": "build_model adds the adapter",
    "quantize": "build_model holds the weights of the base",
    "gradient_checkpointing": "build_model switches it on",
    "dit.condition_dropout": "the batches drop conditions; a DiT always has a null class",
    "cache": "the run encodes the dataset before the training",
}


def described(value: Any) -> Any:
    """Return an object as nested tuples, without the random weights of networks."""
    if isinstance(value, Tensor):
        return value.dtype, repr(value.tolist())  # in which nan is nan
    if isinstance(value, nn.Module):
        config, shapes = getattr(value, "config", {}), [tuple(p.shape) for p in value.parameters()]
        return type(value).__name__, str(dict(config)), shapes
    if isinstance(value, Mapping):
        return tuple((key, described(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    if isinstance(value, partial):
        return described([value.func, value.args, value.keywords])
    if isinstance(value, type) or callable(getattr(value, "__get__", None)):  # classes and functions
        return value.__qualname__
    if hasattr(value, "__dict__") and not isinstance(value, Enum):
        return type(value).__name__, described(vars(value))
    return value


def another(section: Section, field: str) -> Any:
    """Another value of a field than a section has, by its type."""
    now, annotation = getattr(section, field), type(section).model_fields[field].annotation
    if choices := [one for one in get_args(annotation) if isinstance(one, str) and one != now]:
        return choices[0]
    if isinstance(now, bool):
        return not now
    if isinstance(now, int):
        return now + 1
    if isinstance(now, float):
        return now / 2 or 0.25
    if isinstance(now, tuple) and all(isinstance(one, float) for one in now):
        return [one / 2 for one in now]
    raise AssertionError(f"add two values of {field} to CASES, or to ELSEWHERE why build does not read it")


def changes(kind: str, name: str) -> Iterator[tuple[str, Section, Section]]:
    """Every field that ``build`` is to read, with two sections that differ in it alone."""
    section = KINDS[kind][0][name]
    fixed = {"name": name} if kind not in ("radius", "process") else {}
    for field in section.model_fields:
        if field in fixed or field in ELSEWHERE or f"{name}.{field}" in ELSEWHERE:
            continue
        needed, *value = CASES.get(f"{name}.{field}", CASES.get(field, ({},)))
        given = {**fixed, **BASE.get(name, {}), **needed}
        one = section.model_validate(given)
        changed = {**given, field: value[0] if value else another(one, field)}
        yield field, one, section.model_validate(changed)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (sections, _) in KINDS.items() for name in sections])
def test_every_field_of_a_section_reaches_what_it_builds(kind: str, name: str) -> None:
    build = KINDS[kind][1]
    built: dict[Section, Any] = {}
    for field, before, after in changes(kind, name):
        if before not in built:
            built[before] = build(before)
            assert described(build(before)) == described(built[before]), "what is built twice is the same"
        found = build(after)
        assert described(found) != described(built[before]), f"{name}.{field} is ignored"
        value = getattr(after, field)
        own = getattr(found, "__dict__", {}).get(field, value)  # what has the name of the field has its value
        assert type(own) is not type(value) or own == value, f"{name}.{field}"
