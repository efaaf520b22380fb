"""Datasets by name, with pixels in uint8; models use the range [−1, 1]."""

from __future__ import annotations

from robustdiff.data.dataset import ArrayDataset, ImageDataset, to_uint8, to_unit
from robustdiff.data.registry import DATASETS, DataConfig, load_dataset

__all__ = ["DATASETS", "ArrayDataset", "DataConfig", "ImageDataset", "load_dataset", "to_uint8", "to_unit"]
