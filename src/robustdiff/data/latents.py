"""A cache on disk of the latents of a dataset.

The entry of a dataset in the cache is a folder of parts, ``00000.float16`` and so on: raw float16 arrays of shape
(n, V, C', H', W'), read by memory map. V is 1, or 2 if the latents of the mirrored images follow, because the latents
of a mirrored image are not the mirrored latents. If latents are samples of a posterior, the C' channels are the means
and then the standard deviations, so that every epoch draws new samples.

The name of the folder is a hash of the VAE's weights and settings, of the images, of V and of a key of the user. A
change of any of them gives another entry, and entries of other users are not read; captions may change. Parts are
written atomically, so a killed process loses at most one part, and several processes can fill an entry together.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.codecs.codec import Codec
from robustdiff.data.dataset import Batch, ImageDataset, to_unit
from robustdiff.data.loader import load_batches
from robustdiff.errors import RunError, printable
from robustdiff.files import STALE, atomic_write, cache_folder, claim_folder, open_regular, remove_leftovers, user_key
from robustdiff.progress import SILENT, Progress

__all__ = ["LatentDataset"]

logger = logging.getLogger(__name__)

_PART_BYTES = 2**26
_MOST_PARTS = 128  # each open part uses a file descriptor
_BATCH = 64


class LatentDataset(ImageDataset):
    """A dataset whose batches are cached latents instead of images.

    Args:
        images: The dataset.
        codec: The codec that encodes them.
        flip: Whether mirrored images are encoded as well.
        folder: The folder of the cache; by default ``latents`` in :func:`robustdiff.files.cache_folder`.

    Raises:
        InputError: If the codec does not take images of this shape.
    """

    def __init__(self, images: ImageDataset, codec: Codec, flip: bool = False, folder: Path | None = None) -> None:
        super().__init__(images.name, images.shape, images.num_classes, images.labels, images.captions)
        self.images, self.codec, self.flip = images, codec, flip
        channels, height, width = codec.encoded_shape(images.shape)
        self.latent_shape = (1 + flip, channels * (1 + codec.random), height, width)
        size = 2 * math.prod(self.latent_shape)
        self.part = max(1, _PART_BYTES // size, math.ceil(len(images) / _MOST_PARTS))
        content = f"1 {codec.fingerprint()} {images.fingerprint(captions=False)} {self.latent_shape} {self.part}"
        name = hmac.new(user_key(), content.encode(), hashlib.sha256).hexdigest()
        self.folder = (cache_folder() / "latents" if folder is None else folder) / name
        self._open: dict[int, NDArray[np.float16]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # pickling would copy the memory maps

    def contents(self) -> bytes:
        return self.images.contents()

    def fingerprint(self, captions: bool = True) -> str:
        return self.images.fingerprint(captions)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch a batch with the latents, float16 (B, V, C', H', W'), in place of the images.

        Raises:
            RunError: If a part is missing or damaged.
        """
        rows = [self._map(index // self.part)[index % self.part] for index in indices]
        captions, geometry = self.captions_of(indices), self.images.geometry_of(indices)
        return Batch(torch.from_numpy(np.stack(rows)), self.labels_of(indices), captions, geometry)

    def resident(self, device: torch.device, room: int) -> Tensor | None:
        """Return all latents on a device, float16 (N, V, C', H', W'), or None without room.

        Raises:
            RunError: If a part is missing or damaged.
        """
        if 2 * len(self) * math.prod(self.latent_shape) > room:
            return None
        latents = torch.empty((len(self), *self.latent_shape), dtype=torch.float16, device=device)
        for part in self._parts():
            rows = self._rows(part)
            latents[rows.start : rows.stop].copy_(torch.from_numpy(np.array(self._map(part))))
        return latents

    def latents(self, batch: Tensor, codec: Codec, flipped: Tensor | None, noise: Tensor | None) -> Tensor:
        view = torch.zeros(len(batch), dtype=torch.int64, device=batch.device) if flipped is None else flipped.long()
        return self.codec.draw(batch[torch.arange(len(batch), device=batch.device), view].float(), noise)

    # -- the cache -------------------------------------------------------------------------------------------

    def fill(
        self,
        device: torch.device | str = "cpu",
        workers: int = 0,
        process: int = 0,
        processes: int = 1,
        progress: Progress = SILENT,
    ) -> None:
        """Compute the missing parts.

        Args:
            device: The device of the codec.
            workers: The number of processes that load images.
            process: The index of this process. Each process computes a share of the missing parts; all must finish
                before the dataset is read.
            processes: The number of processes that fill the entry together.
            progress: The progress, in images.

        Raises:
            InputError: If the folder of the entry was not created by this package, or an image cannot be read.
            RunError: If latents are not finite.
            OSError: If the cache cannot be written.
        """
        claim_folder(self.folder, "a cache of latents")
        remove_leftovers(self.folder, r"\d{5}\.float16", age=STALE)  # other processes may write now
        missing = [part for part in self._parts() if part % processes == process and not self._is_whole(part)]
        if not missing:
            return
        self.codec.to(device)
        progress.begin("latents", sum(len(self._rows(part)) for part in missing))
        loaded = load_batches(self.images, self._batches(missing), workers)
        for part in missing:
            self._make(part, loaded, device, progress)

    def _batches(self, parts: Sequence[int]) -> Iterator[list[int]]:
        for rows in map(self._rows, parts):
            for start in rows[::_BATCH]:
                yield list(range(start, min(start + _BATCH, rows.stop)))

    def _make(self, part: int, loaded: Iterator[Any], device: torch.device | str, progress: Progress) -> None:
        rows = self._rows(part)
        latents = np.empty((len(rows), *self.latent_shape), np.float16)
        done = 0
        while done < len(rows):
            images = to_unit(next(loaded)[0].to(device))
            views = [self.codec.moments(view) for view in (images, images.flip(-1))[: 1 + self.flip]]
            batch = torch.stack(views, dim=1).to(torch.float16)
            if not (finite := batch.isfinite().flatten(1).all(1)).all():
                raise RunError(
                    f"{self.name}: the latents of image {rows[done + int((~finite).nonzero()[0])]} are not finite in "
                    "float16: check the weights of the codec, or leave the image out"
                )
            latents[done : done + len(batch)] = batch.cpu().numpy()
            done += len(batch)
            progress.advance(len(batch))
        with atomic_write(self._path(part)) as file:
            file.write(latents.data)

    def _parts(self) -> range:
        return range(math.ceil(len(self) / self.part))

    def _rows(self, part: int) -> range:
        return range(part * self.part, min((part + 1) * self.part, len(self)))

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.float16"

    def _is_whole(self, part: int) -> bool:
        path = self._path(part)
        if not path.exists():
            return False
        with open_regular(path) as file:
            whole = file.seek(0, 2) == 2 * len(self._rows(part)) * math.prod(self.latent_shape)
        if not whole:
            logger.warning("%s is damaged, and is computed again", printable(path))
        return whole

    def _map(self, part: int) -> NDArray[np.float16]:
        if part not in self._open:
            path = self._path(part)
            if not self._is_whole(part):
                raise RunError(f"{printable(path)} is missing or damaged: start the run again, which computes it anew")
            with open_regular(path) as file:
                shape = (len(self._rows(part)), *self.latent_shape)
                self._open[part] = np.memmap(file, np.float16, mode="r", shape=shape)
        return self._open[part]
