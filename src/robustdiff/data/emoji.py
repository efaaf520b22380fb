"""Noto's emoji with captions, shipped with this package: 64 × 64 RGB.

An image is an emoji of colour c and opacity α on a background of a named colour b: round((α c + (255 − α) b) / 255).
Its captions name both, such as "a red apple on a pale blue background". The images are all pairs of 1,631 emoji and
12 backgrounds, composed as they are fetched, in three disjoint splits:

- ``train``: the pairs of known emoji, except one pair of each;
- ``test``: that one pair, a combination of a known emoji and a known background that training does not show;
- ``unseen``: all pairs of 64 emoji that training does not show at all.

The last two are in a fixed random order, so that their first images are a sample of all kinds.

`scripts/make_emoji.py` creates `emoji.webp`, a lossless picture of all emoji, and `emoji.json`, their names and the
pairs that are held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustdiff.data.dataset import Batch, ImageDataset
from robustdiff.data.pixels import fit_array
from robustdiff.data.registry import DATASETS
from robustdiff.errors import InputError

__all__ = ["Emoji", "compose", "emoji"]

SIDE = 64
SPLITS = ("train", "test", "unseen")
MOST_PHRASINGS = 4


class Emoji(ImageDataset):
    """A split of the emoji on backgrounds.

    Args:
        size: The side in pixels to which the images are resized; None keeps 64.
        channels: The number of channels, 1 (grey) or 3 (RGB); None is 3.
        split: "train", "test" or "unseen".
        phrasings: The number of captions of each image, 1 to 4. Each caption is encoded once before training.

    Attributes:
        pairs: The emoji and the background of every image, int64 (N, 2).
        entries: The name, the phrase with its article, the group and the code of every emoji, and what it holds out.
        backgrounds: The names of the backgrounds.
        rgba: All emoji, uint8 (E, 4, 64, 64).
        colours: The colours of the backgrounds, uint8 (K, 3).
    """

    def __init__(self, size: int | None, channels: int | None, split: str, phrasings: int) -> None:
        if split not in SPLITS:
            raise InputError(f"emoji has no split {split!r}; use one of: {', '.join(SPLITS)}")
        if not 1 <= phrasings <= MOST_PHRASINGS:
            raise InputError(f"data.phrasings is {phrasings}; emoji have 1 to {MOST_PHRASINGS} captions each")
        side = SIDE if size is None else size
        folder = files("robustdiff.data")
        contents = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        self.entries: list[dict[str, str]] = contents["emoji"]
        self.backgrounds = list(contents["backgrounds"])
        chosen = [
            (index, background)
            for index, entry in enumerate(self.entries)
            for background, colour in enumerate(self.backgrounds)
            if split == _split_of(entry["held_out"], colour)
        ]
        if split != "train":  # training draws its own order
            chosen.sort(key=lambda pair: hashlib.sha256(bytes(f"{pair}", "ascii")).digest())
        captions = (_captions(self.entries[i], self.backgrounds[k])[:phrasings] for i, k in chosen)
        shape = (3 if channels is None else channels, side, side)
        super().__init__("emoji", shape, None, captions=captions)
        self.pairs = torch.tensor(chosen)
        self.colours = torch.tensor(list(contents["backgrounds"].values()), dtype=torch.uint8)
        with (folder / "emoji.webp").open("rb") as file, Image.open(file) as atlas:
            self.rgba = _cut(np.asarray(atlas), len(self.entries))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index, background = self.pairs[torch.as_tensor(indices)].T
        images = compose(self.rgba[index], self.colours[background])
        if self.shape != (3, SIDE, SIDE):
            fitted = fit_array(images.permute(0, 2, 3, 1).numpy(), self.shape[1], self.shape[0])
            images = torch.from_numpy(np.ascontiguousarray(fitted.transpose(0, 3, 1, 2)))
        return Batch(images, captions=self.captions_of(indices))

    def contents(self) -> bytes:
        """Return the sha256 of the emoji, of the colours and of the pairs."""
        digest = hashlib.sha256()
        for array in (self.rgba, self.colours, self.pairs):
            digest.update(array.numpy().data)
        return digest.digest()


def compose(rgba: Tensor, colours: Tensor) -> Tensor:
    """Draw images uint8 (B, 4, H, W) on backgrounds of colours uint8 (B, 3); returns uint8 (B, 3, H, W)."""
    alpha = rgba[:, 3:].int()
    mixed = alpha * rgba[:, :3] + (255 - alpha) * colours[:, :, None, None]
    return ((mixed + 127) // 255).to(torch.uint8)


def _cut(atlas: NDArray[Any], count: int) -> Tensor:
    """Return the first images, uint8 (count, 4, 64, 64), of a picture (rows · 64, columns · 64, 4) of them."""
    rows, columns = atlas.shape[0] // SIDE, atlas.shape[1] // SIDE
    tiles = atlas.reshape(rows, SIDE, columns, SIDE, 4).transpose(0, 2, 4, 1, 3).reshape(-1, 4, SIDE, SIDE)
    return torch.from_numpy(np.ascontiguousarray(tiles[:count]))


def _split_of(held_out: str, colour: str) -> str:
    if held_out == "all":
        return "unseen"
    return "test" if held_out == colour else "train"


def _captions(entry: dict[str, str], colour: str) -> tuple[str, ...]:
    """Return the captions of an emoji on a background."""
    name, phrase, article = entry["name"], entry["phrase"], "an" if colour[0] in "aeio" else "a"
    return (
        f"{phrase} on {article} {colour} background",
        f"{name}, {colour} background",
        f"an emoji of {phrase} on {colour}",
        f"{name}, {entry['group']}, on {article} {colour} background",
    )


@DATASETS.register("emoji")
def emoji(*, size: int | None, channels: int | None, split: str, phrasings: int = MOST_PHRASINGS) -> Emoji:
    """Load Noto's emoji on coloured backgrounds, 64 × 64 RGB with captions: 17,237 training and 1,567 test images."""
    return Emoji(size, channels, split, phrasings)
