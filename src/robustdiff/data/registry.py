"""Datasets by name: one name, one function.

A function takes `root`, `size`, `channels` and `split` by name, and any options that are its own.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

from robustdiff.data.archive import npz
from robustdiff.data.dataset import ImageDataset
from robustdiff.data.embedded import digits, fashion_16
from robustdiff.data.folder import imagefolder
from robustdiff.data.huggingface import hf
from robustdiff.data.idx import fashion_mnist
from robustdiff.errors import InputError

__all__ = ["DATASETS", "load_dataset"]

DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "fashion-16": fashion_16,
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "imagefolder": imagefolder,
    "npz": npz,
}


def load_dataset(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    **options: str | None,
) -> ImageDataset:
    """Load a dataset by its name.

    Args:
        name: A key of `DATASETS`, or `hf:NAME` for a dataset of the Hugging Face hub or a folder of one.
        root: Folder (`imagefolder`, `fashion-mnist`) or file (`npz`) of the data.
        size: Side in pixels: the centred square is resized to it. None keeps the images' own.
        channels: 1 (grey) or 3 (RGB). None keeps the images' own.
        split: "train", or where there is one "test"; for `hf:` its own names.
        options: What only some datasets take, None where it is not given: `background` (`imagefolder`, `hf:`), the
            colour that shows where an image is transparent, white by default; `image_column` and `label_column`
            (`hf:`).

    Returns:
        The dataset.

    Raises:
        InputError: An unknown name, an option that the dataset does not take, or data that is missing or malformed;
            the message says what to do.
    """
    function: Callable[..., ImageDataset]
    if size is not None and size < 1:
        raise InputError(f"size is {size}; give the side of the images in pixels, 1 or more")
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels}; use 1 for grey or 3 for colour")
    if name.startswith("hf:"):
        if root is not None:
            raise InputError(f"{name} takes no root; put the path into the name: hf:PATH")
        function, root = hf, name.removeprefix("hf:")
    elif name in DATASETS:
        function = DATASETS[name]
    else:
        raise InputError(f"unknown dataset {name!r}; use one of: {', '.join(DATASETS)}, hf:NAME")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if not _takes(function, option):
            users = [known for known, other in {**DATASETS, "hf:NAME": hf}.items() if _takes(other, option)]
            remedy = f"leave it out; it is for {', '.join(users)}" if users else "leave it out"
            raise InputError(f"{name} takes no {option}; {remedy}")
    return function(root=root, size=size, channels=channels, split=split, **given)


def _takes(function: Callable[..., ImageDataset], option: str) -> bool:
    return option in inspect.signature(function).parameters
