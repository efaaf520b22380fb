"""Images in one `.npz` file: the format in which guided-diffusion (ADM) exchanges samples and references."""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.dataset import ArrayDataset
from robustdiff.data.pixels import fit_array
from robustdiff.errors import InputError, printable

__all__ = ["npz", "read_npz"]

logger = logging.getLogger(__name__)

# What numpy, zipfile and zlib raise for a file that is not what it should be.
UNREADABLE = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def read_npz(path: str | os.PathLike[str], names: Container[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of an `.npz` file, none of them pickled.

    Args:
        path: The file.
        names: Which arrays to read; by default all. Those that the file lacks are left out.

    Raises:
        InputError: No such file, or not a whole `.npz` file of plain arrays.
    """
    name = printable(path)
    if not Path(path).is_file():
        raise InputError(f"{name}: no such file; correct the path of the .npz file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return {name: loaded[name] for name in loaded.files if names is None or name in names}
    except UNREADABLE as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: not a readable .npz file ({message}); make it with numpy.savez") from error
    raise InputError(f"{name}: a single array, not an .npz file; make it with numpy.savez(path, images=…)")


def npz(*, root: str | os.PathLike[str] | None, size: int | None, channels: int | None, split: str) -> ArrayDataset:
    """Load the file `root`: uint8 `images` (N, H, W, C) and perhaps integer `labels` (N,).

    guided-diffusion's names `arr_0` and `arr_1` are understood too.
    """
    if root is None:
        raise InputError("npz needs root, the path of the .npz file")
    if split != "train":
        raise InputError(f"npz has no split {split!r}; give the file of that split as root")
    name, arrays = printable(root), read_npz(root)
    images = arrays.pop("images", None)
    images = arrays.pop("arr_0", None) if images is None else images
    labels = arrays.pop("labels", None)
    labels = arrays.pop("arr_1", None) if labels is None else labels
    if images is None:
        names = ", ".join(map(printable, arrays)) or "nothing"
        raise InputError(f"{name}: no array images or arr_0 (it has: {names}); rename the array")
    if arrays:
        logger.warning(
            "%s: passed over %s; what is read is images or arr_0, and labels or arr_1",
            name,
            ", ".join(map(printable, arrays)),
        )
    dataset = ArrayDataset(name, images, labels)  # checks dtype and shape before anything is resized
    if size is None and channels is None:
        return dataset
    return ArrayDataset(name, fit_array(images, size, channels), labels, dataset.num_classes)
