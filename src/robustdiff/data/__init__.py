"""Datasets by name, with pixels in uint8; models use the range [−1, 1]."""

from __future__ import annotations

from robustdiff.data.dataset import ArrayDataset, Batch, ImageDataset, to_uint8, to_unit
from robustdiff.data.registry import DATASETS, DataConfig, load_dataset

__all__ = ["DATASETS", "ArrayDataset", "Batch", "DataConfig", "ImageDataset", "load_dataset", "to_uint8", "to_unit"]
