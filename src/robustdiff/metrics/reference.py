"""Statistics of the real images with which generated images are compared."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustdiff import __version__
from robustdiff.data.archive import list_npz, read_npz
from robustdiff.data.dataset import ImageDataset
from robustdiff.data.loader import load_batches, worker_failures
from robustdiff.errors import InputError
from robustdiff.files import atomic_write, cache_folder
from robustdiff.metrics.bootstrap import Array
from robustdiff.metrics.extractors.extractor import FeatureExtractor
from robustdiff.metrics.moments import Moments
from robustdiff.metrics.reservoir import LIMIT, Reservoir, fixed_order
from robustdiff.progress import SILENT, Progress

__all__ = ["FEWEST", "Reference", "load_reference", "reference_statistics"]

FEWEST = 4
"""The smallest number of images for which every metric is defined: precision needs three neighbours, KID two groups."""

_BATCH = 256  # images at a time


@dataclass(frozen=True, eq=False)
class Reference:
    """The statistics of real images.

    Attributes:
        mean: The mean μ of the features, (D,).
        cov: The covariance C of the features, (D, D).
        fingerprint: The fingerprint of the extractor.
        features: A uniform sample of the features in random order, float32 (n, D), n ≤ 10,000; None if only μ and C are
            known.
        n: The number of images, or None if it is not known.
        brightness: The mean over all images, pixels and channels, in [0, 255]; None if only μ and C are known.
    """

    mean: Array
    cov: Array
    fingerprint: str
    features: NDArray[np.float32] | None = None
    n: int | None = None
    brightness: float | None = None


def load_reference(path: str | os.PathLike[str], extractor: FeatureExtractor) -> Reference:
    """Load precomputed statistics in the format of pytorch-fid and guided-diffusion.

    This is an ``.npz`` file with ``mu``, (D,), and ``sigma``, (D, D); other arrays are not read. Only the number of
    features can be checked, since the file does not name the extractor with which it was made.

    Raises:
        InputError: If the file or an array is missing, or the arrays are not a mean and a covariance of as many
            features.
    """
    arrays = read_npz(path, ("mu", "sigma"))
    if missing := [name for name in ("mu", "sigma") if name not in arrays]:
        if "arr_0" in list_npz(path):
            raise InputError(f"{path}: images (arr_0) and no statistics of them; give it as --data npz --root {path}")
        raise InputError(
            f"{path}: no array {' and no '.join(missing)}; give statistics that pytorch-fid or guided-diffusion wrote"
        )
    for name, shape in (("mu", (extractor.dim,)), ("sigma", (extractor.dim, extractor.dim))):
        array = arrays[name]
        if array.shape != shape:
            raise InputError(
                f"{path}: {name} has shape {array.shape} and {extractor.name} has {extractor.dim} features; "
                "give the features that the statistics were made with"
            )
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} ({array.dtype}) does not hold finite real numbers; make the file again")
    mean, cov = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    scale = np.abs(cov).max()
    if np.abs(cov - cov.T).max() > 1e-4 * scale or np.linalg.eigvalsh(cov + cov.T).min() < -1e-4 * scale:
        raise InputError(f"{path}: sigma is not a covariance (symmetric, no negative eigenvalues); make the file again")
    return Reference(mean, (cov + cov.T) / 2, extractor.fingerprint)


def reference_statistics(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int = 0,
    progress: Progress = SILENT,
) -> Reference:
    """Return the statistics of a dataset under an extractor, and cache them on disk.

    The name of an entry has the fingerprints of the dataset and of the extractor's weights, so that a renamed dataset
    has the same entry, and no image is decoded if there is one. An entry that cannot be read is computed again, and
    statistics that cannot be written are not cached, each with a warning.

    Args:
        dataset: The real images.
        extractor: The feature extractor.
        cache_dir: The folder of the cache, by default :func:`robustdiff.files.cache_folder`.
        workers: The number of processes that load images.
        progress: The receiver of the progress, in images, if there is no entry.

    Raises:
        InputError: If there are fewer than 4 images, or the extractor does not take their size.
        RunError: If a feature is not finite, or a process that loads images is killed.
    """
    if len(dataset) < FEWEST:
        raise InputError(f"{dataset.name}: {len(dataset)} real images; give {FEWEST} or more, better thousands")
    # Of this version, since another may decode images differently.
    content = f"{__version__} {dataset.fingerprint(captions=False)} {dataset.captioned} {extractor.fingerprint}"
    key = hashlib.sha256(content.encode()).hexdigest()
    path = Path(cache_folder() if cache_dir is None else cache_dir) / f"reference-{key}.npz"
    if path.exists():
        try:
            return _read_reference(path, dataset, extractor)
        except (KeyError, TypeError, ValueError) as error:
            warnings.warn(f"unusable cache entry, computed again: {error}", stacklevel=2)
    found, arrays = _compute(dataset, extractor, workers, progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        warnings.warn(f"statistics not cached: {error}", stacklevel=2)
    return found


def _compute(
    dataset: ImageDataset, extractor: FeatureExtractor, workers: int, progress: Progress
) -> tuple[Reference, dict[str, Any]]:
    """Return the statistics of a dataset, and the arrays of their entry in the cache."""
    n = len(dataset)
    # Generated image i may have the caption of image order[i], which then has the number i here as well.
    position = np.argsort(fixed_order(n)) if dataset.captioned else np.arange(n)
    moments, reservoir = Moments(extractor.dim, blocks=1), Reservoir(extractor.dim)
    total = start = 0
    progress.begin(f"statistics of {dataset.name}", n)
    with worker_failures():
        batches = [list(range(start, min(start + _BATCH, n))) for start in range(0, n, _BATCH)]
        for images, *_ in load_batches(dataset, batches, workers):
            features = extractor.extract(images)
            moments.update(features, start)
            reservoir.merge_state({"index": position[start : start + len(images)], "features": features})
            total += int(images.sum(dtype=torch.int64))
            start += len(images)
            progress.advance(len(images))
    sample = reservoir.features
    if dataset.captioned:  # KID compares groups of the two samples: no image with the one of its own caption
        sample = np.roll(sample, len(sample) // 2, axis=0)
    brightness = total / (n * math.prod(dataset.shape))
    found = Reference(moments.mean, moments.cov, extractor.fingerprint, sample, n, brightness)
    return found, {**moments.state(), "features": sample, "brightness": np.float64(brightness)}


def _read_reference(path: Path, dataset: ImageDataset, extractor: FeatureExtractor) -> Reference:
    arrays = read_npz(path, ("count", "total", "outer", "features", "brightness"))
    moments, features, brightness = Moments(extractor.dim, blocks=1), arrays["features"], float(arrays["brightness"])
    moments.merge_state(arrays)
    if moments.n != len(dataset) or features.shape != (min(len(dataset), LIMIT), extractor.dim):
        raise ValueError(f"{moments.n} images, sample of shape {features.shape}")
    return Reference(
        moments.mean, moments.cov, extractor.fingerprint, features.astype(np.float32), moments.n, brightness
    )
