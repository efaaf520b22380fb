"""Datasets of the Hugging Face hub, and those that `datasets` saved to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustdiff.data.dataset import ImageDataset
from robustdiff.data.pixels import fit_image
from robustdiff.errors import InputError

__all__ = ["HuggingFaceDataset", "hf"]


class HuggingFaceDataset(ImageDataset):
    """A `datasets.Dataset` with an image column, decoded on demand.

    The image column is the first of type `Image`. The label column is the first of type `ClassLabel`, else an
    integer column called `label`; other datasets have no labels.

    Args:
        name: What to call it in messages.
        table: The dataset, one split of it.
        size: Side in pixels to which the centred square is resized; None: that of the first image.
        channels: 1 or 3; None: those of the first image.

    Raises:
        InputError: No image column, no rows, or (on access) an image of another size while `size` is None.
    """

    def __init__(self, name: str, table: Any, size: int | None = None, channels: int | None = None) -> None:
        import datasets

        features = table.features
        self._image = next((k for k, v in features.items() if isinstance(v, datasets.Image)), None)
        if self._image is None:
            raise InputError(f"{name}: no image column (it has: {', '.join(features)}); choose a dataset of images")
        if len(table) == 0:
            raise InputError(f"{name}: no rows; choose another split")
        self._label = next((k for k, v in features.items() if isinstance(v, datasets.ClassLabel)), None)
        num_classes: int | None = None
        if self._label is not None:
            num_classes = features[self._label].num_classes
        elif isinstance(features.get("label"), datasets.Value) and "int" in features["label"].dtype:
            self._label = "label"
            num_classes = int(max(table["label"])) + 1
        columns = [self._image] if self._label is None else [self._image, self._label]
        self._table = table.select_columns(columns)
        self._size = size
        first = self._table[0][self._image]
        if first is None:
            raise InputError(f"{name}: row 0 has no image; filter such rows out")
        if channels is None:
            channels = 1 if first.mode in ("1", "L", "LA") or first.mode.startswith("I") else 3
        side = min(first.size) if size is None else size
        super().__init__(name, (channels, side, side), num_classes)

    def __len__(self) -> int:
        return len(self._table)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        rows = [int(index) for index in indices]
        try:
            batch = self._table[rows]
        except OSError as error:  # what Pillow raises for bytes that are not an image
            raise InputError(
                f"{self.name}: an image among rows {rows} cannot be decoded ({error}); filter it out"
            ) from error
        images = np.empty((len(rows), *self.shape), np.uint8)
        for k, (row, image) in enumerate(zip(rows, batch[self._image], strict=True)):
            if image is None:
                raise InputError(f"{self.name}: row {row} has no image; filter such rows out")
            if self._size is None and min(image.size) != self.shape[1]:
                raise InputError(
                    f"{self.name}: images differ in size (row 0: {self.shape[1]}, "
                    f"row {row}: {min(image.size)} pixels); pass size=PIXELS to resize all"
                )
            images[k] = fit_image(image, self.shape[1], self.shape[0]).transpose(2, 0, 1)
        labels = None if self._label is None else torch.tensor(batch[self._label], dtype=torch.int64)
        return torch.from_numpy(images), labels


def hf(name: str, size: int | None, channels: int | None, split: str) -> HuggingFaceDataset:
    """Load a dataset through Hugging Face's `datasets`.

    Args:
        name: A name on the hub (`ylecun/mnist`), a folder that `Dataset.save_to_disk` wrote, or any other
            folder that `datasets.load_dataset` reads.
        size: See `HuggingFaceDataset`.
        channels: See `HuggingFaceDataset`.
        split: Its name for the split.

    Returns:
        The dataset.

    Raises:
        InputError: `datasets` is not installed, or there is no such dataset, split or image column.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise InputError(f"hf:{name} needs Hugging Face's datasets; run: pip install datasets") from error
    try:
        folder = Path(name)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            table = datasets.load_from_disk(name)
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise InputError(f"hf:{name}: no split {split!r}; use one of: {', '.join(table)}")
                table = table[split]
            elif split != "train":
                raise InputError(f"hf:{name}: no split {split!r}; this folder holds a single one, call it train")
        else:
            table = datasets.load_dataset(name, split=split)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError, DatasetsError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"hf:{name}: cannot be loaded ({message}); check the name, the split and the network"
        ) from error
    return HuggingFaceDataset(f"hf:{name}", table, size, channels)
