"""Existing images, in a folder or an ``.npz`` file, which are measured as generated images are.

A folder is read as the dataset ``imagefolder``. A file holds ``arr_0``, uint8 (N, H, W, C), as ``robustdiff sample``
and guided-diffusion write it. Labels are not used.
"""

from __future__ import annotations

from pathlib import Path

from robustdiff.backbones.model import PRETRAINED, is_model_folder
from robustdiff.data import ArrayDataset, ImageDataset, load_dataset
from robustdiff.data.archive import read_npz
from robustdiff.errors import InputError
from robustdiff.metrics.reference import FEWEST

__all__ = ["check_size", "load_images", "number_of_images"]

PART = ("recipe.yaml", "unet/config.json", "config.json")
"""The files by which unfinished runs and networks without a pipeline are recognised."""


def load_images(source: str) -> ImageDataset | None:
    """Load the images, uint8, of a folder or an ``.npz`` file. Return None for a source of ``robustdiff.load_model``.

    Raises:
        InputError: If the file is of another kind, or the images are missing or malformed.
    """
    path = Path(source)
    if path.is_dir():
        shipped = "/" not in source and (PRETRAINED / source).is_dir()  # ./NAME names a folder
        model = is_model_folder(path) or is_model_folder(path / "model")
        if shipped or model or any((path / name).is_file() for name in PART):
            return None
        return load_dataset("imagefolder", root=source)
    if path.suffix.lower() == ".npz":
        arrays = read_npz(path, ("arr_0",))
        if "arr_0" not in arrays:
            raise InputError(f"{source}: no array arr_0; store the images under that name, uint8 (N, H, W, C)")
        return ArrayDataset(source, arrays["arr_0"])
    if path.is_file():
        raise InputError(f"{source}: not a run; give images as a folder, or as an .npz file with arr_0")
    return None


def check_size(dataset: ImageDataset, shape: tuple[int, int, int]) -> None:
    """Check that images have the shape (C, H, W) of the real ones.

    Raises:
        InputError: If the shapes differ.
    """
    if dataset.shape != shape:
        (channels, height, width), of = dataset.shape, "×".join(map(str, shape))
        changes = [f"--set data.channels={channels}"] if channels != shape[0] else []
        changes += [f"--set data.size={height}"] if (height, width) != shape[1:] else []
        remedy = f"add {' '.join(changes)}" if height == width else "give real images of that size by --data and --root"
        raise InputError(f"{dataset.name}: images of {channels}×{height}×{width}, the real ones are {of}; {remedy}")


def number_of_images(dataset: ImageDataset, num: int | None) -> int:
    """Return the number of images to measure: all, or ``num`` if it is given.

    Raises:
        InputError: If there are fewer than ``num``, or too few to measure.
    """
    if len(dataset) < FEWEST:
        raise InputError(f"{dataset.name}: {len(dataset)} images; give {FEWEST} or more, better thousands")
    if num is not None and num > len(dataset):
        raise InputError(f"{dataset.name}: {len(dataset)} images; give --num {len(dataset)} or less, or leave it out")
    return len(dataset) if num is None else num
