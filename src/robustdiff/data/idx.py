"""The IDX file format of MNIST and its descendants, and Fashion-MNIST in it.

An IDX file is: two zero bytes; one byte for the type (0x08: unsigned byte, the only one these datasets use);
one byte for the number of dimensions D; D big-endian uint32 sizes; the values in C order and nothing after
them (Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits").

Fashion-MNIST: H. Xiao, K. Rasul and R. Vollgraf, arXiv 1708.07747, 2017.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.dataset import ArrayDataset
from robustdiff.data.pixels import fit_array
from robustdiff.errors import InputError

__all__ = ["FASHION_MNIST_ROOT", "fashion_mnist", "read_fashion_mnist", "read_idx"]

# Where Debian's package dataset-fashion-mnist puts them.
FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")


def read_idx(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or plain.

    Args:
        path: The file. It is gzipped if it starts as gzip does, whatever its name.

    Returns:
        uint8 of the shape in the file's header.

    Raises:
        InputError: No such file, not IDX, another type than unsigned byte, truncated, or longer than it says.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the folder of the IDX files as root") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch the file again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise InputError(f"{path}: not an IDX file of unsigned bytes (it starts with {data[:4].hex() or 'nothing'})")
    dimensions = data[3]
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(data) < start:
        raise InputError(f"{path}: the IDX header is truncated; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise InputError(
            f"{path}: {len(data) - start} bytes of values where its header {shape} needs {math.prod(shape)}; "
            "fetch the file again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_fashion_mnist(root: str | os.PathLike[str], split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one split of an MNIST-like folder.

    Args:
        root: Folder of `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-…`, with `.gz` or without.
        split: "train" or "test".

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


def fashion_mnist(
    *, root: str | os.PathLike[str] | None, size: int | None, channels: int | None, split: str
) -> ArrayDataset:
    """Load Fashion-MNIST, 28 × 28 grey, 60,000 training and 10,000 test images, from its IDX files."""
    images, labels = read_fashion_mnist(FASHION_MNIST_ROOT if root is None else root, split)
    return ArrayDataset("fashion-mnist", fit_array(images[..., None], size, channels), labels, num_classes=10)
