"""Make src/robustdiff/data/fashion16.npz from Fashion-MNIST's IDX files.

    python scripts/make_fashion16.py [--source FOLDER] [--output FILE]

28 × 28 is padded with zeros to 32 × 32; each pixel of the result is the mean of a 2 × 2 block, rounded to the
nearest integer, halves up. The same input gives the same bytes: the archive holds no dates.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.idx import FASHION_MNIST_ROOT, read_fashion_mnist
from robustdiff.files import atomic_write

OUTPUT = Path(__file__).parents[1] / "src/robustdiff/data/fashion16.npz"


def shrink(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 28, 28) → (N, 16, 16)."""
    padded = np.pad(images.astype(np.uint16), ((0, 0), (2, 2), (2, 2)))
    sums = padded.reshape(-1, 16, 2, 16, 2).sum(axis=(2, 4))
    return np.asarray((sums + 2) // 4, dtype=np.uint8)


def write_npz(path: Path, arrays: dict[str, NDArray[np.uint8]]) -> None:
    """As numpy.savez_compressed, but at zlib's best level."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980-01-01, the format's earliest
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry._compresslevel = 9  # type: ignore[attr-defined]  # public only from Python 3.13 on
            with archive.open(entry, "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=FASHION_MNIST_ROOT, help="folder of the IDX files")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    arrays: dict[str, NDArray[np.uint8]] = {}
    for split in ("train", "test"):
        images, labels = read_fashion_mnist(arguments.source, split)
        arrays |= {f"{split}_images": shrink(images), f"{split}_labels": labels}
    write_npz(arguments.output, arrays)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
