"""Diagnosis of wrong flags for a checkpoint.

The names and shapes of the tensors imply most flags. Each flag that they contradict is corrected in turn; the flag most
likely to be wrong is the one whose correction makes the most tensors agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

from robustdiff.backbones.adm.flags import CHANNEL_MULT, AdmFlags
from robustdiff.backbones.adm.layout import INPUT, OUTPUT, QKV, TIME, Layout, Shapes
from robustdiff.errors import InputError

__all__ = ["Mismatch", "explanation", "first_mismatch"]


class Mismatch(NamedTuple):
    """The first tensor that differs between a file and its flags; a shape is None if the tensor is missing."""

    place: int  # number of tensors before it that agree
    tensor: str
    found: tuple[int, ...] | None
    expected: tuple[int, ...] | None


def first_mismatch(shapes: Shapes, flags: AdmFlags) -> Mismatch | None:
    """Return the first tensor, in the order of a checkpoint, that differs between the flags and the file."""
    expected = {tensor.adm: tensor.shape for tensor in Layout.from_shapes(flags, shapes).tensors()}
    for place, (wanted, found) in enumerate(zip_longest(expected, shapes)):
        # If both sides have both names, only the order differs.
        if found is not None and found not in expected and (wanted is None or wanted in shapes):
            return Mismatch(place, found, shapes[found], None)
        if wanted is not None and shapes.get(wanted) != expected[wanted]:
            return Mismatch(place, wanted, shapes.get(wanted), expected[wanted])
    return None


def explanation(shapes: Shapes, flags: AdmFlags, mismatch: Mismatch) -> str:
    """Return part of an error message: the tensor that differs, and the flag most likely to be wrong."""
    found = "missing" if mismatch.found is None else str(mismatch.found)
    wanted = "no such tensor" if mismatch.expected is None else str(mismatch.expected)
    text = f"{mismatch.tensor} is {found} in the file, expected {wanted}"
    contradicted = _contradicted(shapes, flags)
    for image_size in CHANNEL_MULT:
        # A wrong image size shows as two or more wrong flags, because others are relative to it.
        resized = _changed(flags, {"image_size": image_size})
        remaining = None if resized is None else _contradicted(shapes, resized)
        if remaining is not None and len(remaining) < len(contradicted) - 1:
            contradicted = {"image_size": image_size, **remaining}
    if not contradicted:
        return f"{text}; no flag explains it, the file may be of another network"

    def progress(name: str) -> int:
        changed = _changed(flags, {name: contradicted[name]})
        if changed is None:
            return 0
        rest = first_mismatch(shapes, changed)
        return len(shapes) if rest is None else rest.place

    # The most likely flag is the one whose correction moves the first mismatch furthest.
    likely = max(contradicted, key=progress)
    names = [likely, *(name for name in contradicted if name != likely)]
    says = ", ".join(f"{name}={contradicted[name]!r}" for name in names)
    return f"{text}; most likely the flag {likely} is wrong: the file's shapes say {says}"


def _changed(flags: AdmFlags, values: Mapping[str, Any]) -> AdmFlags | None:
    changes = dict(values)
    if changes.get("class_cond") is False:
        changes["num_classes"] = None
    try:
        return replace(flags, **changes)
    except InputError:
        return None


def _contradicted(shapes: Shapes, flags: AdmFlags) -> dict[str, Any]:
    """Return the flags that the names and shapes in the file contradict, with the values that these imply."""
    values: dict[str, Any] = {}
    values["num_channels"] = channels = shapes[TIME][1]
    values["class_cond"] = labelled = "label_emb.weight" in shapes
    if labelled and flags.num_classes is not None:
        values["num_classes"] = shapes["label_emb.weight"][0]
    values["learn_sigma"] = shapes[OUTPUT][0] == 2 * shapes[INPUT][1]
    if (modulation := shapes.get("middle_block.0.emb_layers.1.weight")) is not None:
        # The attention in the middle has the width of the residual block before it.
        values["use_scale_shift_norm"] = modulation[0] == 2 * shapes[QKV][1]

    # On the way up, the last block of a level has an upsampling, numbered after the attention.
    levels: list[tuple[int, int, bool]] = []  # width, residual blocks, attention
    block = first = 0
    while (weight := shapes.get(f"output_blocks.{block}.0.out_layers.3.weight")) is not None:
        attends = f"output_blocks.{block}.1.qkv.weight" in shapes
        upsampling = f"output_blocks.{block}.{2 if attends else 1}"
        residual = f"{upsampling}.in_layers.0.weight" in shapes
        ends = residual or f"{upsampling}.conv.weight" in shapes
        if ends:
            values["resblock_updown"] = residual
        block += 1
        if ends or f"output_blocks.{block}.0.out_layers.3.weight" not in shapes:
            levels.insert(0, (weight[0], block - first - 1, attends))
            first = block
    numbers = {int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks.")}
    if "resblock_updown" not in values and len(numbers) <= max(numbers):
        # Downsampling without parameters leaves gaps in the numbering, and the ends of the levels are unknown.
        values |= {"resblock_updown": False, "conv_resample": False}
    elif levels:
        values["num_res_blocks"] = levels[0][1]
        multipliers = tuple(width / channels for width, _, _ in levels)
        if multipliers != flags.multipliers:
            values["channel_mult"] = ",".join(f"{multiplier:g}" for multiplier in multipliers)
        attention = tuple(attends for _, _, attends in levels)
        if attention != (flags.attention + (False,) * len(attention))[: len(attention)]:
            sides = [str(flags.image_size >> level) for level, attends in enumerate(attention) if attends]
            values["attention_resolutions"] = ",".join(sides)
    return {name: value for name, value in values.items() if value != getattr(flags, name)}
