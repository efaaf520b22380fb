"""The real images with which generated images are compared, and the features for the comparison."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from robustdiff.data import ImageDataset
from robustdiff.data.huggingface import is_remote
from robustdiff.data.remote import is_url, shown
from robustdiff.errors import InputError, printable
from robustdiff.evaluation.prompts import Prompts
from robustdiff.metrics.extractors.classifier import SHIPPED
from robustdiff.metrics.extractors.extractor import FeatureExtractor, load_extractor
from robustdiff.metrics.extractors.inception import INCEPTION_URL
from robustdiff.metrics.reference import Reference, load_reference, reference_statistics
from robustdiff.progress import SILENT, Progress
from robustdiff.recipe import DataConfig, load_data_config

__all__ = ["Target", "choose_real_images", "load_target"]


def choose_real_images(
    run: str | None,
    name: str | None = None,
    root: str | None = None,
    overrides: Sequence[str] = (),
    on_read: Callable[[str], None] = lambda message: None,
    workers: bool = False,
) -> DataConfig:
    """Return the data section of a run's recipe, or that of fashion-16 if there is no recipe, with overrides.

    A run may come from somebody else. A recipe alone never causes a download, nor the reading of the working folder or
    of one that contains it.

    Args:
        run: A run, a model without a recipe, or None.
        name: The name of another dataset.
        root: The path of another folder or file.
        overrides: Assignments ``data.key=value``.
        on_read: A function that the main process calls with a message before the folder that the recipe names is read.
        workers: Whether the command uses ``data.workers``, as the statistics of the images do.

    Raises:
        InputError: If a field is unknown or out of its range, or the recipe names images that it must not.
    """
    recipe = None if run is None else Path(run) / "recipe.yaml"
    if recipe is None or not recipe.is_file():
        return load_data_config("fashion-16", overrides, name, root, workers=workers)
    config = load_data_config(str(recipe), overrides, name, root, workers=workers)
    fields = {assignment.partition("=")[0] for assignment in overrides}
    named = name is not None or not fields.isdisjoint({"data", "data.name"})
    rooted = root is not None or "data.root" in fields
    remote = config.name.startswith("hf:")
    if config.root is not None and not rooted and is_url(config.root):
        raise InputError(
            f"{recipe} names the data {shown(config.root)}, which is fetched from the network: add --root URL if "
            "that is wanted, or name other images by --data and --root"
        )
    if named or not (remote or (config.root is not None and not rooted)):
        return config
    if remote and is_remote(config.name):
        raise InputError(
            f"{recipe} names the data {config.name}, which is fetched from the network: add --data {config.name} if "
            "that is wanted, or name other images by --data"
        )
    folder = (config.folder or Path(str(config.root))).resolve()
    while any(character in str(folder) for character in "*?[{") and not os.path.exists(folder):
        folder = folder.parent  # the root is a pattern of files
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise InputError(
            f"{recipe} names the data {folder}, which this folder is or lies in: add --root {folder} if all of it is "
            "meant, or name other images by --data and --root"
        )
    if os.path.exists(folder) and PartialState().is_main_process:
        on_read(f"{recipe} names the data: reading {folder}")
    return config


@dataclass(frozen=True)
class Target:
    """Real images, or an ``.npz`` file of their statistics, with the extractor of the features for comparisons.

    Without an extractor, nothing is compared.
    """

    source: DataConfig | Path | None = None
    dataset: ImageDataset | None = None
    extractor: FeatureExtractor | None = None

    @property
    def name(self) -> str | None:
        """The name of the images, the path of the file, or None without a source."""
        if self.dataset is not None:
            return self.dataset.name
        return None if self.source is None else str(self.source)

    @property
    def record(self) -> dict[str, Any]:
        """The settings that a result records, as JSON values."""
        source = self.source.model_dump(mode="json") if isinstance(self.source, DataConfig) else self.name
        data = None if self.dataset is None else self.dataset.name
        features = None if self.extractor is None else self.extractor.name
        return {"data": data, "reference": source, "features": features}

    def statistics(self, accelerator: Accelerator, progress: Progress = SILENT) -> Reference | None:
        """Return the statistics of the real images, from the cache if possible, or None without a source.

        Raises:
            InputError: If an image cannot be read, or the file is malformed or of another number of features.
        """
        if self.extractor is None:
            return None
        if self.dataset is None:
            return load_reference(str(self.source), self.extractor)
        workers = self.source.workers if isinstance(self.source, DataConfig) else 0
        with accelerator.main_process_first():  # the other processes read the cache
            return reference_statistics(self.dataset, self.extractor, workers=workers, progress=progress)


class _Named(ImageDataset):
    """The images of a dataset with some names."""

    def __init__(self, dataset: ImageDataset, indices: list[int]) -> None:
        super().__init__(dataset.name, dataset.shape, dataset.num_classes, dataset.labels_of(indices))
        self._dataset, self._indices = dataset, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._dataset.__getitems__([self._indices[i] for i in indices])

    def contents(self) -> bytes:
        digest = hashlib.sha256(self._dataset.contents())
        digest.update(np.array(self._indices, np.int64).tobytes())
        return digest.digest()


def _select(dataset: ImageDataset, source: DataConfig, prompts: Prompts) -> ImageDataset:
    """Return the images that captions of COCO name."""
    names = dataset.file_names()
    if names is None:
        raise InputError(
            f"{prompts.source} names the real images, which {source.name} has no names of: give their folder by --data "
            "imagefolder --root DIR, or the prompts as a .txt"
        )
    if missing := set(prompts.files) - set(names):
        raise InputError(
            f"{prompts.source} names {len(missing)} images that {dataset.name} does not have, such as "
            f"{printable(min(missing))}: give the folder of its images by --root"
        )
    indices = [i for i, name in enumerate(names) if name in prompts.files]
    if len(indices) > len(prompts.files):
        twice = next(name for name, count in Counter(names[i] for i in indices).items() if count > 1)
        raise InputError(
            f"{dataset.name} has {printable(twice)} more than once, which {prompts.source} names: give the files of "
            "its images alone by --root"
        )
    return _Named(dataset, indices)


def load_target(
    source: DataConfig | Path | None,
    features: str | None,
    weights: Path | None,
    device: torch.device,
    prompts: Prompts | None = None,
    compare: bool = True,
) -> Target:
    """Load real images, and the extractor of the given name or else the one made for the dataset.

    Args:
        source: The real images, or a file of their statistics, or None.
        features: The name of the extractor, or None.
        weights: The weights of the extractor, or None.
        device: The device of the extractor.
        prompts: The prompts; if they name files, these alone are the real images.
        compare: False to load the real images for their captions alone, without an extractor.

    Raises:
        InputError: If the images cannot be loaded or are not all there, or the extractor is unknown, not given, or
            lacks its weights.
    """
    if source is None:
        return Target()
    dataset, data = (source.load(), source.name) if isinstance(source, DataConfig) else (None, None)
    if prompts is not None and prompts.files and isinstance(source, DataConfig) and dataset is not None:
        dataset = _select(dataset, source, prompts)
    if not compare:
        return Target(source, dataset)
    if features is None and data is None:
        raise InputError("--reference needs the features that it is of: give --features inception --weights FILE")
    if features is None and data not in SHIPPED:
        raise InputError(f"no features are known for {data}: give --features inception --weights FILE, or others")
    if features == "inception" and weights is None:
        raise InputError(f"--features inception needs --weights FILE; download it from {INCEPTION_URL}")
    return Target(source, dataset, load_extractor(features or str(data), weights=weights, device=device))
