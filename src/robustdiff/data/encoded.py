"""Encoded images, decoded on access: the base class of datasets of files, tables and archives.

Images are cropped to the aspect ratio of the batch and resized. With (H, W) the size of an image in pixels, upright,
and (top, left) the corner of the crop in the resized image, the geometry of a sample is (H, W, top, left), which Stable
Diffusion XL is conditioned on (Podell et al., 2023, arXiv 2307.01952, sections 2.2 and 2.3).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustdiff.data.captions import Captions
from robustdiff.data.dataset import Batch, ImageDataset
from robustdiff.data.decode import Colour, Header, Source, common_channels, common_side, decode_batch
from robustdiff.data.pixels import Position, crop_box

__all__ = ["EncodedDataset"]


class EncodedDataset(ImageDataset):
    """Encoded images, decoded on access.

    Args:
        name: The name of the dataset in messages.
        headers: The properties of the images.
        size: The side in pixels of images from :meth:`__getitems__`, which are centred squares; None requires images of
            the same side.
        channels: The number of channels, 1 or 3; None is 1 if every image is grey, otherwise 3.
        background: The colour behind transparent pixels.
        word: A function that returns the name of an image in messages, from its index.
        num_classes: The number of classes.
        labels: The labels.
        captions: The captions.

    Raises:
        InputError: Images of different sides with `size` None.
    """

    sizes: Tensor

    def __init__(
        self,
        name: str,
        headers: Sequence[Header],
        size: int | None,
        channels: int | None,
        background: Colour,
        word: Callable[[int], str],
        num_classes: int | None = None,
        labels: Tensor | None = None,
        captions: Captions | None = None,
    ) -> None:
        if size is None:
            size = common_side(name, headers, word)
        if channels is None:
            channels = common_channels(headers, background)
        super().__init__(name, (channels, size, size), num_classes, labels, captions)
        self._background = background
        self.sizes = torch.tensor([(header.height, header.width) for header in headers], dtype=torch.int64)
        digest = hashlib.sha256(f"{background}\n".encode())
        for index, header in enumerate(headers):
            digest.update(self.prefix(index) + header.sample)
        self._contents = digest.digest()

    @abstractmethod
    def encoded(self, indices: Sequence[int]) -> list[tuple[Source, str]]:
        """Return a function that opens the encoded image, and its name in messages, for each index."""

    def prefix(self, index: int) -> bytes:
        """Return the bytes before an image in the hash of the contents, by default none."""
        return b""

    def contents(self) -> bytes:
        """Return a hash of the background and of the images in order: of :meth:`prefix` and of the header's sample.

        Whole files are not read if they are compressed, because that would take hours for a million files.
        """
        return self._contents

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.fetch(indices)

    def fetch(
        self,
        indices: Sequence[int],
        size: tuple[int, int] | None = None,
        positions: Sequence[Position] | None = None,
    ) -> Batch:
        size = self.shape[1:] if size is None else size
        images = decode_batch(self.encoded(indices), (self.shape[0], *size), self._background, positions)
        geometry = self.geometry_of(indices, size, positions)
        return Batch(images, self.labels_of(indices), self.captions_of(indices), geometry)

    def geometry_of(
        self,
        indices: Sequence[int],
        size: tuple[int, int] | None = None,
        positions: Sequence[Position] | None = None,
    ) -> Tensor:
        """Return the geometry of a batch, int64 (B, 4); see :class:`Batch`. Arguments are those of :meth:`fetch`."""
        size = self.shape[1:] if size is None else size
        rows = []
        sizes = self.sizes[torch.as_tensor(indices, dtype=torch.int64)].tolist()
        for k, (height, width) in enumerate(sizes):
            position = None if positions is None else positions[k]
            top, left, crop_height, crop_width = crop_box((height, width), size, position)
            rows.append((height, width, round(top * size[0] / crop_height), round(left * size[1] / crop_width)))
        return torch.tensor(rows, dtype=torch.int64)
