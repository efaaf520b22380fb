"""Images in one `.npz` file, guided-diffusion's format for samples and reference batches."""

from __future__ import annotations

import logging
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.dataset import ArrayDataset
from robustdiff.data.pixels import fit_array
from robustdiff.data.registry import DATASETS
from robustdiff.errors import InputError, first_line, printable

__all__ = ["expands_too_far", "list_npz", "npz", "read_into", "read_npz"]

logger = logging.getLogger(__name__)

# Errors that numpy, zipfile and the decompressors raise for malformed files; lzma's own error is caught as an Exception
# where members are read.
UNREADABLE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)

# Data with a higher compression ratio than images have, and more bytes than this when expanded, is refused.
MOST_TIMES = 200
FREE_BYTES = 2**28


def expands_too_far(compressed: int, expanded: int) -> bool:
    """Return whether the ratio of expanded to compressed bytes is too high for images."""
    return expanded > max(FREE_BYTES, MOST_TIMES * compressed)


def read_into(file: Any, size: int) -> NDArray[np.uint8]:
    """Return the next `size` bytes of a file, or fewer at its end.

    Memory is used only as bytes arrive, so a wrong size costs none. `file` must have `readinto`.
    """
    data = np.empty(size, np.uint8)
    done = 0
    while done < size and (count := file.readinto(data[done : done + 2**20].data)):
        done += count
    return data[:done]


def _open(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    """Open an `.npz` file; raises InputError or the errors of zipfile."""
    name = printable(path)
    if not os.path.isfile(path):
        raise InputError(f"{name}: no such file; correct the path of the .npz file")
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise InputError(f"{name}: a single array, not an .npz file; make it with numpy.savez(path, images=…)")
    return zipfile.ZipFile(path)


def _unreadable(path: str | os.PathLike[str], error: Exception) -> InputError:
    message = printable(first_line(error))
    return InputError(f"{printable(path)}: not a readable .npz file ({message}); make it with numpy.savez")


def list_npz(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the arrays in an `.npz` file, without reading the arrays.

    Raises:
        InputError: No such file, or not an `.npz` file.
    """
    try:
        with _open(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except InputError:
        raise
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read arrays of numbers from an `.npz` file.

    An array is read only if the shape in its header agrees with the size of the archive member. `numpy.load` is not
    used, because it allocates memory before it compares them.

    Args:
        path: The file.
        names: The names of the arrays to read. Names that the file does not have are skipped.

    Returns:
        The arrays, in the machine's byte order.

    Raises:
        InputError: No such file, not an `.npz` file, a damaged file, or an array that does not hold numbers.
    """
    try:
        with _open(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            return {name: _read_member(archive, members[name]) for name in names if name in members}
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{printable(path)}: larger than the memory of this machine; make it smaller") from error
    except Exception as error:  # damaged members: errors of numpy, zipfile, lzma and bz2
        raise _unreadable(path, error) from error


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one array; raises ValueError or the errors of zipfile."""
    name = info.filename
    with archive.open(info) as file:
        shape, fortran, dtype = _read_header(file)
        if dtype.kind not in "biufc":
            raise ValueError(f"{name} holds {'objects' if dtype.hasobject else dtype}, not numbers")
        if any(side < 0 for side in shape) or len(shape) > 32:
            raise ValueError(f"{name} has {len(shape)} dimensions {shape[:4]}")
        size = math.prod(shape) * dtype.itemsize
        if size != info.file_size - file.tell():
            raise ValueError(
                f"{name} has {info.file_size - file.tell()} bytes where {dtype} of shape {shape} has {size}"
            )
        stored = info.compress_type == zipfile.ZIP_STORED
        if expands_too_far(info.compress_size, size) or (stored and info.compress_size != info.file_size):
            raise ValueError(f"{name} expands from {info.compress_size} bytes to {size}, as no array does")
        data = read_into(file, size)
        if len(data) != size or file.read(1):  # reading the end verifies the checksum
            raise ValueError(f"{name} is truncated or too long")
    array: NDArray[Any] = data.view(dtype)
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return the shape, whether the order is Fortran's, and the type, from the header of an `.npy` file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version[0]}.{version[1]} of the format, which numbers do not need")


@DATASETS.register("npz")
def npz(
    *, root: str | os.PathLike[str] | None = None, size: int | None, channels: int | None, split: str
) -> ArrayDataset:
    """Load the file `root` with uint8 `images` (N, H, W, C) and optionally integer `labels` (N,).

    guided-diffusion's names `arr_0` and `arr_1` are supported as well.
    """
    if root is None:
        raise InputError("npz needs root, the path of the .npz file")
    if split != "train":
        raise InputError(f"npz has no split {split!r}; give the file of that split as root")
    name, names = printable(root), list_npz(root)
    chosen = [next((n for n in pair if n in names), None) for pair in (("images", "arr_0"), ("labels", "arr_1"))]
    if chosen[0] is None:
        listed = ", ".join(map(printable, names)) or "nothing"
        raise InputError(f"{name}: no array images or arr_0 (it has: {listed}); rename the array")
    if others := [n for n in names if n not in chosen]:
        logger.warning(
            "%s: passed over %s; what is read is images or arr_0, and labels or arr_1",
            name,
            ", ".join(map(printable, others)),
        )
    arrays = read_npz(root, [n for n in chosen if n is not None])
    images, labels = arrays[chosen[0]], None if chosen[1] is None else arrays[chosen[1]]
    dataset = ArrayDataset(name, images, labels)  # checks dtype and shape before resizing
    if size is None and channels is None:
        return dataset
    return ArrayDataset(name, fit_array(images, size, channels), labels, dataset.num_classes)
