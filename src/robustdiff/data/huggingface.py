"""Datasets of the Hugging Face hub, and datasets saved to disk by `datasets`.

`datasets` provides only the tables. Images are decoded by :mod:`robustdiff.data.decode`, and all headers and labels are
checked when the dataset is loaded, so that an invalid row raises an error at once, with its number.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from robustdiff.data.captions import COLUMNS, Captions, check_captions, warn_of_empty
from robustdiff.data.dataset import check_labels
from robustdiff.data.decode import (
    Background,
    Header,
    Source,
    allow_large,
    file_source,
    parse_colour,
    read_header,
)
from robustdiff.data.encoded import EncodedDataset
from robustdiff.data.registry import DATASETS
from robustdiff.errors import InputError, first_line, installing, printable
from robustdiff.section import Text
from robustdiff.yaml_reader import parse_yaml

__all__ = ["HuggingFaceDataset", "hf", "is_remote"]

logger = logging.getLogger(__name__)

CARD_BYTES = 2**22
MOST_CARD_VALUES = 100_000


def is_remote(name: str) -> bool:
    """Return whether loading a dataset uses the network: `hf:NAME`, where NAME is no folder on this machine."""
    return not os.path.isdir(name.removeprefix("hf:"))


class HuggingFaceDataset(EncodedDataset):
    """A `datasets.Dataset` with an image column, decoded on access.

    By default the image column is `image` or `img`, or else the only column of type `Image`. The label column is
    `label` or `labels`, or else the only column of type `ClassLabel`; other datasets have no labels. Labels are class
    labels, non-negative integers, or strings, which are numbered in sorted order. The caption column is `text` or
    `caption`, of strings or of lists of strings, which are several captions of one image.

    Args:
        name: The name of the dataset in messages.
        table: One split of the dataset.
        size: The side in pixels to which the centred square is resized; None requires images of the same side.
        channels: The number of channels, 1 or 3; None is 1 if every image is grey, otherwise 3.
        background: The colour behind transparent pixels.
        image_column: The name of the image column.
        label_column: The name of the label column.
        caption_column: The name of the caption column.
        folders: The folders that may contain the files named by rows; None allows any folder on this machine.

    Raises:
        InputError: No such column, or more than one candidate; no rows; a row without an image or a label, or without
            a caption in `caption_column`; an image that cannot be read, is not in `folders`, or is remote; images of
            different sides with `size` None. Later, on access: corrupt pixels.
    """

    def __init__(
        self,
        name: str,
        table: Any,
        size: int | None = None,
        channels: int | None = None,
        background: str = "white",
        image_column: str | None = None,
        label_column: str | None = None,
        caption_column: str | None = None,
        folders: Sequence[Path] | None = None,
    ) -> None:
        name = printable(name)
        self._folders = folders
        colour = parse_colour(background)
        images = _image_column(name, table.features, image_column)
        labels = _label_column(name, table.features, label_column)
        if len(table) == 0:
            raise InputError(f"{name}: no rows; choose another split")
        checked, num_classes = (None, None) if labels is None else _labels(name, table, labels)
        texts = _caption_column(name, table.features, caption_column)
        captions = None if texts is None else _captions(name, table, texts, asked=caption_column is not None)
        # The format "arrow" does not decode images.
        self._table = table.select_columns([images]).with_format("arrow")
        self._name = name
        with allow_large():
            headers = list(self._headers())
        mode = table.features[images].mode  # the mode to which `datasets` converts images
        if channels is None and mode is not None:
            channels = 1 if mode in ("1", "L") else 3
        labelled = num_classes, checked, captions
        super().__init__(name, headers, size, channels, colour, lambda row: f"row {row}", *labelled)

    def _headers(self) -> Iterator[Header]:
        batch = 1000
        for start in range(0, len(self._table), batch):
            column = self._table[start : start + batch].column(0)
            for row, value in enumerate(column, start):
                yield read_header(self._source(row, value), self._row(row))

    def _row(self, row: int) -> str:
        return f"{self._name}: row {row}"

    def _source(self, row: int, value: Any) -> Source:
        """Return a function that opens the encoded image of a row. Bytes in the table are memory-mapped, not copied."""
        import pyarrow

        data = value["bytes"] if value.is_valid else None
        path = value["path"].as_py() if value.is_valid else None
        if data is not None and data.is_valid:
            return partial(pyarrow.BufferReader, data.as_buffer())
        if path is None:
            raise InputError(f"{self._row(row)} has no image; filter such rows out")
        return file_source(self._checked_path(row, path))

    def _checked_path(self, row: int, path: str) -> Path:
        """Return the file of a row, if it is in `folders`: rows of a downloaded table can name any file."""
        remedy = "store the images themselves in the table, as its save_to_disk does with rows of pixels or bytes"
        if "://" in path or "::" in path or "\0" in path:
            raise InputError(f"{self._row(row)} is at {printable(path[:200])}, which is not fetched; {remedy}")
        if self._folders is None:
            return Path(path)
        file = self._folders[0] / path  # unchanged if the path is absolute
        if not any(file.resolve().is_relative_to(folder.resolve()) for folder in self._folders):
            raise InputError(
                f"{self._row(row)} is the file {printable(path[:200])}, outside the folder of the dataset; {remedy}"
            )
        return file

    def encoded(self, indices: Sequence[int]) -> list[tuple[Source, str]]:
        rows = [int(index) for index in indices]
        values = self._table[rows].column(0)
        return [(self._source(row, value), self._row(row)) for row, value in zip(rows, values, strict=True)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names)) or "none"


def _image_column(name: str, features: Any, asked: str | None) -> str:
    """Return the name of the image column."""
    import datasets

    columns = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if asked is not None:
        if asked not in columns:
            raise InputError(
                f"{name}: data.image_column={asked} is not an image column; use one of: {_listed(columns)}"
            )
        return asked
    if not columns:
        raise InputError(f"{name}: no image column (it has: {_listed(features)}); choose a dataset of images")
    for usual in ("image", "img"):
        if usual in columns:
            return usual
    if len(columns) > 1:
        raise InputError(f"{name}: several image columns ({_listed(columns)}); choose one with data.image_column")
    return columns[0]


def _label_column(name: str, features: Any, asked: str | None) -> str | None:
    """Return the name of the label column, or None."""
    import datasets

    def labels(feature: Any) -> bool:
        if isinstance(feature, datasets.ClassLabel):
            return True
        kind = feature.dtype if isinstance(feature, datasets.Value) else ""
        return "int" in kind or "string" in kind or kind == "bool"

    columns = [column for column, feature in features.items() if labels(feature)]
    if asked is not None:
        if asked not in columns:
            raise InputError(
                f"{name}: data.label_column={asked} is not a column of class labels, integers or strings; "
                f"use one of: {_listed(columns)}"
            )
        return asked
    for usual in ("label", "labels"):
        if usual in columns:
            return usual
        if usual in features:
            logger.warning(
                "%s: column %s is not of class labels, integers or strings, so it is passed over; data.label_column "
                "chooses another: %s",
                name,
                usual,
                _listed(columns),
            )
    classes = [column for column in columns if isinstance(features[column], datasets.ClassLabel)]
    if len(classes) > 1:
        raise InputError(f"{name}: several label columns ({_listed(classes)}); choose one with data.label_column")
    return classes[0] if classes else None


def _labels(name: str, table: Any, column: str) -> tuple[Tensor, int]:
    """Return the labels of all rows and the number of classes."""
    import datasets
    import pyarrow.compute

    feature = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:].column(0)
    if values.null_count:
        missing = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise InputError(f"{name}: row {missing} has no {column}; filter such rows out, or set data.label_column")
    if isinstance(feature, datasets.ClassLabel):
        return check_labels(name, "row", values.to_numpy(), feature.num_classes)
    if "string" in feature.dtype:
        names = pyarrow.array(sorted(values.unique().to_pylist()), values.type)
        return check_labels(name, "row", pyarrow.compute.index_in(values, names).to_numpy(), len(names))
    labels = values.to_numpy()
    return check_labels(name, "row", labels.astype(np.int64) if labels.dtype == bool else labels, None)


def _caption_column(name: str, features: Any, asked: str | None) -> str | None:
    """Return the name of the caption column, or None."""
    import datasets

    def captions(feature: Any) -> bool:
        feature = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
        return isinstance(feature, datasets.Value) and "string" in feature.dtype

    columns = [column for column, feature in features.items() if captions(feature)]
    if asked is not None and asked not in columns:
        raise InputError(
            f"{name}: data.caption_column={printable(asked)} is not a column of strings or of lists of strings; "
            f"use one of: {_listed(columns)}"
        )
    return asked or next((usual for usual in COLUMNS if usual in columns), None)


def _captions(name: str, table: Any, column: str, asked: bool) -> Captions | None:
    """Return the captions of all rows; None, with a warning, if a column that was not asked for has none in a row."""

    def rows() -> Iterator[tuple[str, ...]]:
        texts, batch = table.select_columns([column]).with_format("arrow"), 1000
        for start in range(0, len(texts), batch):
            for row, value in enumerate(texts[start : start + batch].column(0).to_pylist(), start):
                yield check_captions(value, f"{name}: {printable(column)} of row {row}")

    try:
        captions = Captions(rows())
    except InputError as error:
        if asked:
            raise InputError(f"{error}; filter such rows out") from None
        logger.warning("%s, so captions are not read; filter such rows out to read them", error)
        return None
    warn_of_empty(name, captions, lambda row: f"row {row}")
    return captions


def _check_name(name: str) -> None:
    """Refuse the names of readers in `datasets`, which would read files of the working folder."""
    from datasets import packaged_modules

    readers = {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}
    bare = name.removeprefix("hf://datasets/")
    if not bare:
        raise InputError("hf: needs the name of a dataset, such as hf:ylecun/mnist, or the path of a folder")
    if bare in readers:
        raise InputError(
            f"hf:{name} is a file reader of the datasets library, not a dataset; for images in a folder use "
            f"data.name=imagefolder with data.root=FOLDER, for other files the path of their folder: hf:./FOLDER"
        )


@DATASETS.register("hf:NAME")
def hf(
    *,
    root: str | os.PathLike[str],
    size: int | None,
    channels: int | None,
    split: str,
    config: Text | None = None,
    background: Background = "white",
    image_column: Text | None = None,
    label_column: Text | None = None,
    caption_column: Text | None = None,
) -> HuggingFaceDataset:
    """Load a dataset through Hugging Face's `datasets`.

    The other arguments are those of :class:`HuggingFaceDataset`.

    Args:
        root: A name on the hub (`ylecun/mnist`), a folder written by `Dataset.save_to_disk`, or any other folder that
            `datasets.load_dataset` reads. Scripts of datasets are not run.
        split: The name of the split in the dataset.
        config: The name of the configuration (subset), if the dataset has several.

    Raises:
        InputError: `datasets` is not installed, or the dataset, the configuration, the split or the image column is
            missing.
    """
    root = str(root)
    name = f"hf:{printable(root)}"
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise InputError(f"{name} needs Hugging Face's datasets: {installing('datasets')}") from error
    if tuple(map(int, re.findall(r"\d+", datasets.__version__)[:2])) < (5, 2):
        raise InputError(
            f"{name} needs datasets 5.2 or later, which runs no scripts and no pickles: {installing('datasets')}"
        )
    _check_name(root)
    try:
        table = _load_table(datasets, name, root, config, split)
    except InputError:
        raise
    except Exception as error:  # the readers of `datasets` may raise any error
        if configs := re.search(r"(?:available configs|not found\. Available): \[(.*)\]", str(error)):
            fault = "has several configurations" if config is None else f"has no data.config={printable(config)}"
            raise InputError(f"{name} {fault}; choose one with data.config: {printable(configs[1][:500])}") from error
        message = printable(first_line(error))
        raise InputError(f"{name}: cannot be loaded ({message}); check the name, the split and the network") from error
    # `datasets` downloads and unpacks files into its cache.
    cache = [Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]
    folders = [Path(root), *cache] if os.path.isdir(root) else cache
    columns = image_column, label_column, caption_column
    return HuggingFaceDataset(name, table, size, channels, background, *columns, folders)


def _check_card(name: str, folder: Path) -> None:
    """Refuse a folder whose dataset card names files outside the folder, on this machine or in the network."""
    for path in (folder / "README.md", folder / ".huggingface.yaml"):
        if not path.is_file():
            continue
        if path.stat().st_size > CARD_BYTES:
            raise InputError(f"{printable(path)} has more than {CARD_BYTES >> 20} MiB: remove it")
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".md":
            text = text[3:].partition("\n---")[0] if text.startswith("---") else ""
        card = parse_yaml(text, str(path))
        stack, seen = [card.get("configs") if isinstance(card, dict) else None], 0
        while stack:
            value = stack.pop()
            seen += 1
            if seen > MOST_CARD_VALUES:
                raise InputError(
                    f"{printable(path)} lists more than {MOST_CARD_VALUES} values under configs: shorten it"
                )
            if isinstance(value, dict | list):
                stack += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str) and (
                ":" in value or value.startswith(("/", "\\", "~")) or ".." in re.split(r"[/\\]", value)
            ):
                raise InputError(
                    f"{name}: {path.name} names data outside the folder ({printable(value[:200])}), which is not read; "
                    "remove it from the file's configs"
                )


def _load_table(datasets: Any, name: str, root: str, config: str | None, split: str) -> Any:
    """Return the table of one split."""
    folder = Path(root)
    if not ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        if folder.is_dir():
            _check_card(name, folder)
        return datasets.load_dataset(root, config, split=split)
    if config is not None:
        raise InputError(f"{name}: a folder of save_to_disk has no configurations; leave data.config out")
    table = datasets.load_from_disk(root)
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(f"{name}: no split {split!r}; use one of: {_listed(table)}")
        return table[split]
    if split != "train":
        raise InputError(f"{name}: no split {split!r}; this folder holds a single one, call it train")
    return table
