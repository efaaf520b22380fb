"""Datasets by name: one name, one function."""

from __future__ import annotations

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

# name → (root, size, channels, split) → dataset
DATASETS: dict[str, Callable[[str | os.PathLike[str] | None, int | None, int | None, str], ImageDataset]] = {
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
) -> ImageDataset:
    """Load a dataset by its name.

    Args:
        name: A key of `DATASETS`, or `hf:NAME` for a dataset of the Hugging Face hub or a folder of one.
        root: Folder (`imagefolder`, `fashion-mnist`) or file (`npz`) of the data.
        size: Side in pixels: the centred square is resized to it. None keeps the images' own.
        channels: 1 (grey) or 3 (RGB). None keeps the images' own.
        split: "train", or where there is one "test"; for `hf:` its own names.

    Returns:
        The dataset.

    Raises:
        InputError: An unknown name, or data that is missing or malformed; the message says what to do.
    """
    if size is not None and size < 1:
        raise InputError(f"size is {size}; give the side of the images in pixels, 1 or more")
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels}; use 1 for grey or 3 for colour")
    if name.startswith("hf:"):
        if root is not None:
            raise InputError(f"{name} takes no root; put the path into the name: hf:PATH")
        return hf(name.removeprefix("hf:"), size, channels, split)
    if name not in DATASETS:
        raise InputError(f"unknown dataset {name!r}; use one of: {', '.join(DATASETS)}, hf:NAME")
    return DATASETS[name](root, size, channels, split)
