"""The sizes of the batches of a run, and the buckets of its images."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from robustdiff.backbones.model import Model
from robustdiff.data import ImageDataset
from robustdiff.data.buckets import bucket_sizes, nearest_bucket
from robustdiff.errors import InputError
from robustdiff.recipe import Recipe

__all__ = ["arrange"]

logger = logging.getLogger(__name__)


def arrange(
    recipe: Recipe, dataset: ImageDataset, model: Model
) -> tuple[NDArray[np.int64] | None, list[tuple[int, int]]]:
    """Return the bucket of each image, or None without buckets, and the height and width of the batches of each.

    Raises:
        InputError: If the data has no other crops, or the network takes no images of these sizes.
    """
    data, shape = recipe.data, dataset.shape
    if dataset.sizes is None and (data.crop == "random" or data.buckets):
        option = "buckets=true" if data.buckets else "crop=random"
        raise InputError(
            f"data.{option} needs images in files, and {dataset.name} has cropped ones in memory: leave it out, or use "
            "imagefolder, webdataset or hf:NAME"
        )
    if dataset.sizes is None or not data.buckets:
        return None, [shape[1:]]
    if model.backbone.square:
        raise InputError("data.buckets=true: this network takes square images alone: leave data.buckets out")
    unit = model.backbone.multiple * (shape[1] // model.codec.encoded_shape(shape)[1])
    if data.bucket_step % unit:
        raise InputError(
            f"this network takes sides that are multiples of {unit} pixels: set data.bucket_step to such a number"
        )
    sizes = bucket_sizes(shape[1], data.bucket_step)
    buckets = nearest_bucket(dataset.sizes, sizes)
    counts = np.bincount(buckets, minlength=len(sizes))
    logger.info(
        "%s: images in buckets of height×width: %s",
        dataset.name,
        ", ".join(f"{counts[k]} in {height}×{width}" for k, (height, width) in enumerate(sizes) if counts[k]),
    )
    if len(small := np.flatnonzero((counts > 0) & (counts < recipe.batch_size))):
        height, width = sizes[small[0]]
        logger.warning(
            "%s: %d of %d buckets have fewer images than batch_size %d, such as %d×%d with %d: their batches "
            "repeat images",
            dataset.name,
            len(small),
            (counts > 0).sum(),
            recipe.batch_size,
            height,
            width,
            counts[small[0]],
        )
    return buckets, sizes
