"""Images in one `.npz` file: the format in which guided-diffusion (ADM) exchanges samples and references."""

from __future__ import annotations

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
from robustdiff.errors import InputError

__all__ = ["npz", "read_npz"]

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
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; correct the path of the .npz file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return {name: loaded[name] for name in loaded.files if names is None or name in names}
    except UNREADABLE as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable .npz file ({message}); make it with numpy.savez") from error
    raise InputError(f"{path}: a single array, not an .npz file; make it with numpy.savez(path, images=…)")


def npz(root: str | os.PathLike[str] | None, size: int | None, channels: int | None, split: str) -> ArrayDataset:
    """The file `root`: uint8 `images` (N, H, W, C) and perhaps integer `labels` (N,).

    guided-diffusion's names `arr_0` and `arr_1` are understood too.
    """
    if root is None:
        raise InputError("npz needs root, the path of the .npz file")
    if split != "train":
        raise InputError(f"npz has no split {split!r}; give the file of that split as root")
    arrays = read_npz(root)
    images = arrays.get("images", arrays.get("arr_0"))
    labels = arrays.get("labels", arrays.get("arr_1"))
    if images is None:
        names = ", ".join(arrays) or "nothing"
        raise InputError(f"{root}: no array images or arr_0 (it has: {names}); rename the array")
    dataset = ArrayDataset(str(root), images, labels)  # checks dtype and shape before anything is resized
    if size is None and channels is None:
        return dataset
    return ArrayDataset(str(root), fit_array(images, size, channels), labels)
