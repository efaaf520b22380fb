r"""Image datasets, and the conversion between pixels and the range of models.

A dataset holds pixels k ∈ {0, …, 255}; a model takes x. The conversions are

    x = k / 127.5 − 1 ∈ [−1, 1]        and       k = clip(round(127.5 (x + 1)), 0, 255)

The second is the exact inverse of the first on all 256 values. Pixels are converted on the model's device, because
uint8 needs a quarter of the memory and of the traffic between processes.

torch's DataLoader fetches a batch by `__getitems__`, with one indexing operation per batch.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from robustdiff.codecs.codec import Codec
from robustdiff.data.captions import Captions
from robustdiff.data.pixels import Position
from robustdiff.errors import InputError

__all__ = ["ArrayDataset", "Batch", "ImageDataset", "check_labels", "to_uint8", "to_unit"]

logger = logging.getLogger(__name__)

# A network has a row of weights for each class, so larger labels are refused.
MOST_CLASSES = 1_000_000


def to_unit(x: Tensor) -> Tensor:
    """Map pixels, uint8 of any shape, to the range of models: float32 of the same shape, in [−1, 1]."""
    return x.to(torch.float32) / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Map floating-point numbers of any shape, nominally in [−1, 1], to pixels, uint8 of the same shape.

    The numbers are rounded and clipped; this is the inverse of `to_unit`.
    """
    return ((x.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Batch(NamedTuple):
    """A batch of a dataset.

    Attributes:
        images: The images, uint8 (B, C, H, W).
        labels: The class labels, int64 (B,); None without labels.
        captions: All captions of each image; None without captions.
        geometry: The height and width of each original image, and the top and left of the crop in the resized image,
            in pixels, int64 (B, 4); None if the images were stored in the size that they have.
    """

    images: Tensor
    labels: Tensor | None = None
    captions: Sequence[tuple[str, ...]] | None = None
    geometry: Tensor | None = None


class ImageDataset(Dataset[tuple[Tensor, Any]]):
    """Images of one shape, with class labels and captions or without.

    Use it with `DataLoader(dataset, batch_sampler=…, collate_fn=lambda batch: batch)`: `__getitems__` returns whole
    batches, which need no collation.

    Attributes:
        name: The name of the dataset.
        shape: The shape (C, H, W) of every image.
        num_classes: The number of classes K, with labels in {0, …, K − 1}; None without labels.
        labels: The labels of all images, int64 (N,); None without labels.
        captions: The captions of all images, one or more of each; None without captions.
        sizes: The heights and widths of the images in pixels before cropping, int64 (N, 2); None for images that are
            stored as they are fetched.
    """

    sizes: Tensor | None = None

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        num_classes: int | None,
        labels: Tensor | None = None,
        captions: Iterable[Sequence[str]] | None = None,
    ) -> None:
        self.name = name
        self.shape = shape
        self.num_classes = num_classes
        self.labels = labels
        self.captions = captions if captions is None or isinstance(captions, Captions) else Captions(captions)

    @property
    def captioned(self) -> bool:
        """True if every image has one or more captions."""
        return self.captions is not None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch a batch.

        Args:
            indices: The B indices of the images, in {0, …, N − 1}.
        """

    def fetch(
        self,
        indices: Sequence[int],
        size: tuple[int, int] | None = None,
        positions: Sequence[Position] | None = None,
    ) -> Batch:
        """Fetch a batch of other crops than :meth:`__getitems__`, if :attr:`sizes` are known.

        Args:
            indices: The B indices of the images.
            size: The height and width of the crops after resizing; None is those of :attr:`shape`.
            positions: The place of the crop in each image; None is the centre.
        """
        raise NotImplementedError

    def resident(self, device: torch.device, room: int) -> Tensor | None:
        """Return all images on a device, so that a batch is selected there, or None to have batches loaded instead.

        It is for datasets that are stored as :meth:`__getitems__` returns them. By default it is None.

        Args:
            device: The device.
            room: The largest number of bytes that may be allocated.

        Returns:
            The images of :meth:`__getitems__` at indices 0 … N − 1, uint8 (N, C, H, W).
        """
        return None

    def latents(self, batch: Tensor, codec: Codec, flipped: Tensor | None, noise: Tensor | None) -> Tensor:
        """Return the latents of a batch, float32 (B, C', H', W').

        Args:
            batch: The images from :meth:`__getitems__`, on any device.
            codec: The codec from images to latents.
            flipped: The mask (B,) of the images to mirror; None mirrors none.
            noise: Standard normal noise of the shape of the result, if the codec is random.
        """
        images = to_unit(batch)
        if flipped is not None:
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return codec.encode(images, noise)

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        """Return the labels of a batch, int64 (B,), or None without labels."""
        return None if self.labels is None else self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def first_captions(self, indices: Sequence[int]) -> list[str] | None:
        """Return the first caption of each of some images, or None if there are none."""
        captions = self.captions_of(indices)
        return None if captions is None else [first for first, *_ in captions]

    def captions_of(self, indices: Sequence[int]) -> list[tuple[str, ...]] | None:
        """Return all captions of each image of a batch, or None without captions."""
        return None if self.captions is None else [self.captions[int(index)] for index in indices]

    def geometry_of(self, indices: Sequence[int]) -> Tensor | None:
        """Return the geometry of a batch from :meth:`__getitems__`, int64 (B, 4), or None; see :class:`Batch`."""
        return None

    def file_names(self) -> list[str] | None:
        """Return the name of each image's file, with "/" between folders, or None if images have no names.

        A name may occur more than once, as in several tar files.
        """
        return None

    def contents(self) -> bytes:
        """Return a hash of the images; it does not depend on the process or on the location of the data.

        By default it is the sha256 of all pixels; datasets that are slow to decode hash the encoded images.
        """
        digest = hashlib.sha256()
        for start in range(0, len(self), 256):
            images = self.__getitems__(range(start, min(start + 256, len(self))))[0]
            digest.update(images.contiguous().numpy().data)
        return digest.digest()

    def caption_digest(self) -> str | None:
        """Return the sha256, in hexadecimal, of all captions in order, or None without captions."""
        if self.captions is None:
            return None
        digest = hashlib.sha256()
        for texts in self.captions:
            encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
            # Lengths first, so that no two lists of captions have the same bytes.
            digest.update(f"{[len(text) for text in encoded]}\n".encode() + b"".join(encoded))
        return digest.hexdigest()

    def fingerprint(self, captions: bool = True) -> str:
        """Return the sha256, in hexadecimal, of the shape, the classes, the labels, the contents and the captions.

        Args:
            captions: Whether the captions are included. The sha256 of data without captions is the same either way.
        """
        digest = hashlib.sha256(f"{len(self)} {tuple(self.shape)} {self.num_classes}\n".encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        digest.update(self.contents())
        if captions and (texts := self.caption_digest()) is not None:
            digest.update(texts.encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Fetch one image, uint8 (C, H, W), and its label, int64 (), or None."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {self.name}, which has {len(self)} images")
        images, labels = self.__getitems__([index % len(self)])[:2]
        return images[0], None if labels is None else labels[0]

    def __repr__(self) -> str:
        classes = "" if self.num_classes is None else f", num_classes={self.num_classes}"
        return f"{type(self).__name__}({self.name!r}, n={len(self)}, shape={self.shape}{classes})"


class ArrayDataset(ImageDataset):
    """Images held in memory.

    Args:
        name: The name of the dataset in messages.
        images: The images, uint8 (N, H, W, C), with C = 1 or 3 and N ≥ 1.
        labels: The labels, non-negative integers (N,), or None.
        num_classes: The number of classes; by default the largest label + 1.
        captions: The captions of each image, one or more of each, or None.

    Raises:
        InputError: Wrong dtype or shape, a label that is negative or not below `num_classes`, or an image without a
            caption.
    """

    def __init__(
        self,
        name: str,
        images: NDArray[np.uint8],
        labels: NDArray[Any] | None = None,
        num_classes: int | None = None,
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        if images.dtype != np.uint8:
            raise InputError(f"{name}: images are {images.dtype}, not uint8; store pixels as integers 0 to 255")
        if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
            raise InputError(f"{name}: images have shape {images.shape}; make it (N, H, W, C), N ≥ 1 and C = 1 or 3")
        checked = None
        if labels is not None:
            if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
                raise InputError(
                    f"{name}: labels are {labels.dtype} of shape {labels.shape}; "
                    f"make them {len(images)} non-negative integers, one per image"
                )
            checked, num_classes = check_labels(name, "image", labels, num_classes)
        if captions is not None and (len(captions) != len(images) or not all(captions)):
            raise InputError(f"{name}: captions are not those of {len(images)} images; give one or more of each image")
        height, width, channels = images.shape[1:]
        super().__init__(name, (channels, height, width), num_classes, checked, captions)
        # torch warns of tensors on memory that is not writable.
        self._images = torch.from_numpy(np.require(images.transpose(0, 3, 1, 2), requirements=["C", "W"]))

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = self._images[torch.as_tensor(indices, dtype=torch.int64)]
        return Batch(images, self.labels_of(indices), self.captions_of(indices))

    def resident(self, device: torch.device, room: int) -> Tensor | None:
        """Return all images on a device, uint8 (N, C, H, W), or None without room. A CPU needs none."""
        if device.type != "cpu" and self._images.nbytes > room:
            return None
        return self._images.to(device)

    def contents(self) -> bytes:
        """Return the sha256 of all pixels."""
        return hashlib.sha256(self._images.numpy().data).digest()


def check_labels(name: str, row: str, labels: NDArray[Any], num_classes: int | None) -> tuple[Tensor, int]:
    """Check the labels of a dataset and count its classes.

    Args:
        name: The name of the dataset in messages.
        row: The word for a row of the dataset in messages.
        labels: The labels, integers (N,).
        num_classes: The number of classes; by default the largest label + 1, with a warning of classes without a row.

    Returns:
        The labels as int64 (N,), and the number of classes.

    Raises:
        InputError: A label that is negative, not below `num_classes`, or too large to be a class.
    """
    limit = MOST_CLASSES if num_classes is None else num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        k = int(wrong[0])
        right = "non-negative integers below a million" if num_classes is None else f"0 to {limit - 1}"
        raise InputError(
            f"{name}: the label of {row} {k} is {labels[k]}; labels are {right}: correct it, or leave such {row}s out"
        )
    if num_classes is None:
        present = np.unique(labels)
        num_classes = int(present[-1]) + 1
        if len(present) < num_classes:
            missing = int(np.flatnonzero(present != np.arange(len(present)))[0])
            logger.warning(
                "%s: labels go from 0 to %d, and no image has %d of them, such as %d; if no class is missing, "
                "number them without gaps",
                name,
                num_classes - 1,
                num_classes - len(present),
                missing,
            )
    return torch.from_numpy(labels.astype(np.int64)), num_classes
