"""Images as files in a folder, decoded when they are asked for.

    root/a.png, root/b.jpg, …          no labels
    root/CLASS/…/a.png, …              the label is the rank of CLASS among the sorted sub-folder names

Every header is looked at when the folder is loaded: a file that is not an image must fail now and by name,
not in a worker process three hours into a run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustdiff.data.dataset import ImageDataset
from robustdiff.data.pixels import fit_image
from robustdiff.errors import InputError

__all__ = ["FolderDataset", "imagefolder"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# What Pillow raises for a bad file: OSError mostly, SyntaxError from some decoders, and for a giant its own.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _header(path: Path) -> tuple[int, bool]:
    """Side of the centred square, and whether the image is grey, without decoding the pixels."""
    try:
        with Image.open(path) as image:
            return min(image.size), image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: not an image, whatever its name says; remove it or replace it") from error


class FolderDataset(ImageDataset):
    """Image files, opened on demand.

    Args:
        root: The folder; searched at all depths for png, jpg, jpeg, webp and bmp.
        size: Side in pixels to which the centred square is resized; None: all images must share their side.
        channels: 1 or 3; None: 1 if every image is grey, otherwise 3.

    Raises:
        InputError: No such folder, no images in it, a file that is not an image, sides that differ while
            `size` is None, or images both in sub-folders and beside them. Later, on access: corrupt pixels.
    """

    def __init__(self, root: str | os.PathLike[str], size: int | None = None, channels: int | None = None) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a folder of images as root")
        # Sorted, because the order of a directory listing differs between machines and the seed must not.
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.paths:
            raise InputError(f"{folder}: no images in it; put files in it that end in {', '.join(sorted(SUFFIXES))}")
        with ThreadPoolExecutor() as pool:
            headers = list(pool.map(_header, self.paths))
        if size is None:
            size = headers[0][0]
            for path, (side, _) in zip(self.paths, headers, strict=True):
                if side != size:
                    raise InputError(
                        f"{folder}: images differ in size ({self.paths[0].name}: {size}, "
                        f"{path.name}: {side} pixels); pass size=PIXELS to resize all"
                    )
        if channels is None:
            channels = 1 if all(grey for _, grey in headers) else 3
        classes = [p.relative_to(folder).parts[0] if p.parent != folder else None for p in self.paths]
        names = sorted({name for name in classes if name is not None})
        if names and None in classes:
            stray = self.paths[classes.index(None)]
            raise InputError(f"{stray}: lies beside class folders ({names[0]}, …); move it into one or out of {folder}")
        self._labels = torch.tensor([names.index(c) for c in classes if c is not None]) if names else None
        super().__init__(str(folder), (channels, size, size), len(names) or None)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        images = np.empty((len(indices), *self.shape), np.uint8)
        for k, index in enumerate(indices):
            path = self.paths[int(index)]
            try:
                with Image.open(path) as image:
                    images[k] = fit_image(image, self.shape[1], self.shape[0]).transpose(2, 0, 1)
            except DECODE_ERRORS as error:
                raise InputError(f"{path}: cannot be decoded ({error}); remove it or replace it") from error
        labels = None if self._labels is None else self._labels[torch.as_tensor(indices)]
        return torch.from_numpy(images), labels


def imagefolder(
    root: str | os.PathLike[str] | None, size: int | None, channels: int | None, split: str
) -> FolderDataset:
    """The images under the folder `root`; see `FolderDataset`."""
    if root is None:
        raise InputError("imagefolder needs root, the folder of the images")
    if split != "train":
        raise InputError(f"imagefolder has no split {split!r}; give the folder of that split as root")
    return FolderDataset(root, size, channels)
