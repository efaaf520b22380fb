"""The IDX file format of MNIST and similar datasets, and Fashion-MNIST.

An IDX file consists of two zero bytes, one byte for the type (0x08, unsigned byte, in these datasets), one byte for the
number of dimensions D, D big-endian uint32 sizes, and the values in C order (Y. LeCun, C. Cortes and C. Burges, "The
MNIST database of handwritten digits").

Fashion-MNIST: H. Xiao, K. Rasul and R. Vollgraf, arXiv 1708.07747, 2017.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.archive import expands_too_far, read_into
from robustdiff.data.dataset import ArrayDataset
from robustdiff.data.pixels import fit_array
from robustdiff.data.registry import DATASETS
from robustdiff.errors import InputError, printable

__all__ = ["FASHION_MNIST_ROOT", "fashion_mnist", "read_fashion_mnist", "read_idx"]

# The folder of Debian's package dataset-fashion-mnist.
FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")

MOST_DIMENSIONS = 8


def read_idx(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or plain.

    Args:
        path: The file. Compression is detected from its first bytes, not from its name.

    Returns:
        The values, uint8 of the shape in the header.

    Raises:
        InputError: No such file, not IDX, another type than unsigned byte, or a length that contradicts the header.
    """
    name = printable(path)
    if not os.path.isfile(path):
        raise InputError(f"{name}: no such file; give the folder of the IDX files as root")
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stored = os.fstat(file.fileno()).st_size
            if not gzipped:
                return _read_values(file, name, stored, stored)
            with gzip.GzipFile(fileobj=file) as expanded:
                return _read_values(expanded, name, stored)
    except MemoryError as error:
        raise InputError(f"{name}: larger than the memory of this machine; make it smaller") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read ({printable(str(error))}); fetch the file again") from error


def _read_values(
    file: IO[bytes] | gzip.GzipFile, name: str, stored: int, length: int | None = None
) -> NDArray[np.uint8]:
    """Read the header and the values; `stored` is the size on disk, and so is `length`, or None if gzipped."""
    head = file.read(4)
    if len(head) < 4 or head[:3] != b"\x00\x00\x08":
        raise InputError(f"{name}: not an IDX file of unsigned bytes (it starts with {head.hex() or 'nothing'})")
    dimensions = head[3]
    if dimensions > MOST_DIMENSIONS:
        raise InputError(f"{name}: {dimensions} dimensions, where images and labels have 4 or fewer; fetch it again")
    sizes = file.read(4 * dimensions)
    if dimensions == 0 or len(sizes) < 4 * dimensions:
        raise InputError(f"{name}: the IDX header is truncated; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", sizes)
    size, start = math.prod(shape), 4 + 4 * dimensions
    if size == 0:
        raise InputError(f"{name}: its header {shape} says that it is empty; fetch the file again")
    if expands_too_far(stored, size) and length is None:
        raise InputError(f"{name}: {stored} bytes that expand to {size}, as no images do; fetch the file again")
    if length is not None and length - start != size:
        found = str(length - start)
    else:
        data = read_into(file, size)
        if len(data) == size and not file.read(1):
            return data.reshape(shape)
        found = f"more than {size}" if len(data) == size else str(len(data))
    raise InputError(f"{name}: {found} bytes of values where its header {shape} needs {size}; fetch the file again")


def read_fashion_mnist(root: str | os.PathLike[str], split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one split of a folder in MNIST's layout.

    Args:
        root: The folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-…`, with `.gz` or without.
        split: The split, "train" or "test".

    Returns:
        Images uint8 (N, 28, 28) and labels uint8 (N,).

    Raises:
        InputError: A missing or malformed file, or an unknown split.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise InputError(f"fashion-mnist has no split {split!r}; use one of: {', '.join(prefixes)}")
    if not Path(root).is_dir():
        raise InputError(
            f"{root}: no such folder; give the IDX files' as root, or install Debian's dataset-fashion-mnist"
        )
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        plain = Path(root) / f"{prefixes[split]}-{kind}-ubyte"
        arrays.append(read_idx(plain if plain.exists() else plain.with_name(plain.name + ".gz")))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise InputError(f"{root}: images {images.shape} and labels {labels.shape} do not belong together")
    return images, labels


@DATASETS.register("fashion-mnist")
def fashion_mnist(
    *, root: str | os.PathLike[str] = FASHION_MNIST_ROOT, size: int | None, channels: int | None, split: str
) -> ArrayDataset:
    """Load Fashion-MNIST, 28 × 28 grey, 60,000 training and 10,000 test images, from its IDX files."""
    images, labels = read_fashion_mnist(root, split)
    return ArrayDataset("fashion-mnist", fit_array(images[..., None], size, channels), labels, num_classes=10)
