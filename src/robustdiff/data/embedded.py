"""Datasets without a download, shipped with this package or scikit-learn.

`fashion-16` is Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747) averaged over 2 × 2 blocks: 28 × 28
padded with zeros to 32 × 32, then y_ij = round(¼ Σ x over the block). `scripts/make_fashion16.py` creates it.

`digits` is scikit-learn's copy of the UCI optical digits (Alpaydin and Kaynak, 1998), 8 × 8, 17 grey levels.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np

from robustdiff.data.dataset import ArrayDataset
from robustdiff.data.pixels import fit_array
from robustdiff.data.registry import DATASETS
from robustdiff.errors import InputError

__all__ = ["digits", "fashion_16"]


@DATASETS.register("fashion-16")
def fashion_16(*, size: int | None, channels: int | None, split: str) -> ArrayDataset:
    """Load Fashion-MNIST at 16 × 16 grey: 60,000 training and 10,000 test images, 10 classes."""
    if split not in ("train", "test"):
        raise InputError(f"fashion-16 has no split {split!r}; use one of: train, test")
    with (
        as_file(files("robustdiff.data") / "fashion16.npz") as path,
        np.load(path, allow_pickle=False) as arrays,
    ):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return ArrayDataset("fashion-16", fit_array(images[..., None], size, channels), labels, num_classes=10)


@DATASETS.register("digits")
def digits(*, size: int | None, channels: int | None, split: str) -> ArrayDataset:
    """Load scikit-learn's 1,797 digits, 8 × 8 grey, 10 classes; the values 0 … 16 become 0 … 255."""
    from sklearn.datasets import load_digits

    if split != "train":
        raise InputError(f"digits has no split {split!r}; it has one: train")
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return ArrayDataset("digits", fit_array(images[..., None], size, channels), bunch.target, num_classes=10)
