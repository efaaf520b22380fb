"""Datasets by name, and the section ``data`` of a recipe.

A dataset is registered as a function with the keyword arguments `size`, `channels` and `split` and any options of its
own, such as `root` (the folder or file of the data). Each option is a field of the section, of the annotated type::

    @DATASETS.register("stripes")
    def stripes(*, size: int | None, channels: int | None, split: str, width: int = 3) -> ImageDataset:
        ...                                  # data: {name: stripes, width: 5}

A function registered as `PREFIX:NAME` handles all names with that prefix, and gets the rest of the name as `root`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, create_model, model_validator

from robustdiff.data.dataset import ImageDataset
from robustdiff.errors import InputError, first_line, printable
from robustdiff.registry import Registry
from robustdiff.section import Location, Named, Section, Text, refusal

__all__ = ["DATASETS", "DataConfig", "load_dataset"]

DATASETS: Registry[Callable[..., ImageDataset]] = Registry("dataset", "datasets", folder="data")


def _find(name: str) -> tuple[Callable[..., ImageDataset], str | None]:
    """Return the function of a dataset and, if it is registered as `PREFIX:NAME`, the part of the name after it."""
    prefix, colon, root = name.partition(":")
    if colon and f"{prefix}:NAME" in DATASETS:
        return DATASETS[f"{prefix}:NAME"], root
    return DATASETS[name], None


def _options(function: Callable[..., ImageDataset]) -> Mapping[str, inspect.Parameter]:
    """Return the options of one dataset, including `root`."""
    parameters = inspect.signature(function).parameters
    return {name: parameters[name] for name in parameters if name not in ("size", "channels", "split")}


def _refuse(name: str, option: str) -> InputError:
    users = [known for known, function in DATASETS.items() if option in _options(function)]
    remedy = f"leave it out; it is for {', '.join(users)}" if users else "leave it out"
    return InputError(f"{printable(name)} takes no {printable(option)}; {remedy}")


def load_dataset(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    **options: Any,
) -> ImageDataset:
    """Load a dataset by its name.

    Args:
        name: A key of `DATASETS`, or `hf:NAME` for a dataset of the Hugging Face hub or a folder of one.
        root: The folder (`imagefolder`, `fashion-mnist`) or file (`npz`) of the data.
        size: The side in pixels to which the centred square is resized; None keeps the size of the images.
        channels: The number of channels: 1 (grey) or 3 (RGB); None keeps that of the images.
        split: The split, such as "train" or "test".
        options: The options of the dataset; None is the default. `background` (`imagefolder`, `hf:`) is the colour
            behind transparent pixels, by default white; `config` (`hf:`) names a configuration, and `image_column` and
            `label_column` (`hf:`) and `caption_column` (`imagefolder`, `hf:`) name columns.

    Raises:
        InputError: An unknown name, an option that the dataset does not take, or missing or malformed data.
    """
    if size is not None and size < 1:
        raise InputError(f"size is {size}; give the side of the images in pixels, 1 or more")
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels}; use 1 for grey or 3 for colour")
    function, named = _find(name)
    if named is not None and root is not None:
        raise InputError(f"{name} takes no root; put it into the name: {name.partition(':')[0]}:PATH")
    given = {option: value for option, value in {"root": root, **options}.items() if value is not None}
    for option in given:
        if option not in _options(function):
            raise _refuse(name, option)
    if named is not None:
        given["root"] = named
    return function(size=size, channels=channels, split=split, **given)


class DataConfig(Named):
    """The section ``data`` of a recipe. The options of the named dataset are fields as well.

    ``flip``, ``crop`` and ``buckets`` are of training alone: other commands take the centred squares.
    """

    model_config = ConfigDict(extra="allow")

    name: Text = Field("fashion-16", description="name of a dataset, or hf:NAME")
    root: Location | None = Field(None, description="folder or file of the data, if the dataset needs one")
    size: int | None = Field(None, ge=1, le=16_384, description="resize to this many pixels a side")
    channels: Literal[1, 3] | None = Field(None, description="convert to grey (1) or colour (3)")
    split: Text = Field("train", description="split of the dataset")
    flip: bool = Field(False, description="mirror each image with probability 1/2")
    crop: Literal["centre", "random"] = Field("centre", description="place of the crop in images that are not square")
    buckets: bool = Field(False, description="batches of about size² pixels with the aspect ratios of the images")
    bucket_step: int = Field(64, ge=1, le=16_384, description="sides of buckets are multiples of this")
    workers: int = Field(0, ge=0, le=256, description="number of processes that load images; those in memory need none")

    @model_validator(mode="before")
    @classmethod
    def _all_known(cls, value: Any) -> Any:
        name = value.get("name", cls.model_fields["name"].default) if isinstance(value, dict) else None
        if not isinstance(name, str):
            return value
        try:
            options = _section(_find(name)[0])
        except InputError as error:
            raise refusal("name", str(error)) from None
        shared = {field: v for field, v in value.items() if field in cls.model_fields or not isinstance(field, str)}
        own = {field: v for field, v in value.items() if field not in shared}
        for field in own.keys() - options.model_fields.keys():
            message = f"{_refuse(name, field)}; known here: {', '.join([*cls.model_fields, *options.model_fields])}"
            raise refusal(field, message)
        return {**shared, **dict(options.model_validate(own))}

    @property
    def folder(self) -> Path | None:
        """Return the folder or file of the data, by ``root`` or ``hf:FOLDER``, or None if it is not on this machine."""
        root = _find(self.name)[1] if self.root is None else self.root
        return Path(root) if root and os.path.exists(root) else None

    def load(self) -> ImageDataset:
        """Load the dataset.

        Raises:
            InputError: If the dataset is unknown, missing or malformed, or ``root`` is given and it takes none.
        """
        return load_dataset(
            self.name,
            root=self.root,
            size=self.size,
            channels=self.channels,
            split=self.split,
            **(self.model_extra or {}),
        )


@cache
def _section(function: Callable[..., ImageDataset]) -> type[Section]:
    """Return a section with the options of one dataset.

    Raises:
        InputError: If an annotation is not a valid type of a recipe's field.
    """
    try:
        types = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {
            name: (types.get(name, Any), ... if option.default is option.empty else option.default)
            for name, option in _options(function).items()
            if name not in DataConfig.model_fields
        }
        return create_model("Options", __base__=Section, **fields)
    except Exception as error:  # annotations of third-party code may raise any error
        reason = printable(first_line(error))
        raise InputError(
            f"the options of the dataset function {function.__module__}.{function.__qualname__} are no fields of a "
            f"recipe ({reason}): annotate them with types such as int, float, bool or str"
        ) from None
