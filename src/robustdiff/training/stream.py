r"""The random numbers of a batch, which depend on (seed, batch number) alone.

Batch b of a run holds the rows b·B … (b+1)·B − 1 of an endless list of indices, in which every epoch is a new
permutation of the data. The times, noise and flips of a batch come from a generator that is seeded for each batch, and
so do the choice among the captions of an image and random crops. Therefore

- a resumed run needs its batch number alone;
- two runs that differ in their adversary alone see the same images, times and noise (common random numbers);
- the number of processes and of microbatches does not change the training data, since every process draws the random
  numbers of the whole batch and keeps its own rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from robustdiff.data.pixels import Position

__all__ = ["BatchIndices", "BucketIndices", "batch_generator", "caption_numbers", "crop_positions"]

_ORDER, _NOISE, _CAPTIONS, _CROPS, _ROUNDS, _BUCKETS = range(6)


def batch_generator(seed: int, batch: int, device: torch.device | str) -> torch.Generator:
    """Return the generator of the times, noise and flips of one batch."""
    state = np.random.SeedSequence([seed, _NOISE, batch]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def caption_numbers(seed: int, batch: int, batch_size: int) -> NDArray[np.float64]:
    """Return a uniform number in [0, 1) for each sample of one batch, (B,), which chooses among its captions.

    They are drawn on the CPU by a generator of their own, so that the host waits for no device to choose a caption.
    """
    return np.random.default_rng([seed, _CAPTIONS, batch]).random(batch_size)


def crop_positions(seed: int, batch: int, batch_size: int) -> list[Position]:
    """Return the random place of the crop of each sample of one batch, B pairs of numbers in [0, 1)."""
    places = np.random.default_rng([seed, _CROPS, batch]).random((batch_size, 2)).tolist()
    return [(top, left) for top, left in places]


class _Endless:
    """An endless list of indices, in which every epoch is a new permutation of {0, …, N − 1}.

    Args:
        length: The number N.
        seed: The seed of epoch e is (*seed, e).
    """

    def __init__(self, length: int, *seed: int) -> None:
        self.length, self.seed = length, seed
        self._known: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def batch(self, number: int, batch_size: int) -> NDArray[np.int64]:
        """Return the batch of a number, (B,)."""
        row, stop = number * batch_size, (number + 1) * batch_size
        parts = []
        while row < stop:
            epoch, first = divmod(row, self.length)
            if self._known[0] != epoch:
                self._known = (epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.length))
            parts.append(self._known[1][first : first + stop - row])
            row += len(parts[-1])
        return np.concatenate(parts)


class BatchIndices:
    """A ``batch_sampler`` for torch's DataLoader: the indices of successive microbatches.

    Args:
        length: The number N of images.
        batch_size: The images B of one batch, over all processes and microbatches.
        seed: The run's seed.
        start: The number of the first batch.
        rank: This process, of ``processes``.
        processes: The number P of processes.
        accumulate: The microbatches M of one batch. Microbatch m of process r holds the rows from (m·P + r)·B/(M·P).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        processes: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.rank, self.processes, self.accumulate = rank, processes, accumulate
        self._order = _Endless(length, seed, _ORDER)

    def batch(self, number: int) -> NDArray[np.int64]:
        """Return the indices of all microbatches of one batch, (B,), of all processes."""
        return self._order.batch(number, self.batch_size)

    def rows(self, microbatch: int) -> slice:
        """Return the rows of a batch that belong to this process's microbatch."""
        n = self.batch_size // (self.processes * self.accumulate)
        first = (microbatch * self.processes + self.rank) * n
        return slice(first, first + n)

    def bucket(self, number: int) -> int:
        """Return the bucket of one batch, whose images have the same size."""
        return 0

    def __iter__(self) -> Iterator[list[int]]:
        for number in count(self.start):
            indices = self.batch(number)
            for microbatch in range(self.accumulate):
                yield indices[self.rows(microbatch)].tolist()


class BucketIndices(BatchIndices):
    """Batches in which all images are of one bucket, so that they have one shape.

    The images of a bucket are an endless list as above, of which each batch of the bucket takes the next B, so that no
    image is left out. In round r, bucket i of nᵢ images has ⌊(r + 1) nᵢ/B⌋ − ⌊r nᵢ/B⌋ batches, and those of all
    buckets are in random order. So over any number of rounds all images are drawn equally often, up to the last batch
    of each bucket. A bucket of fewer than B images has repeated images in its batches.

    Args:
        buckets: The bucket of each image, (N,).
        batch_size: The images B of one batch.
        seed: The run's seed.
        more: The other arguments of :class:`BatchIndices`.
    """

    def __init__(self, buckets: NDArray[np.int64], batch_size: int, seed: int, *more: int) -> None:
        super().__init__(len(buckets), batch_size, seed, *more)
        self.names = np.unique(buckets)
        self._images = [np.flatnonzero(buckets == name) for name in self.names]
        self._lists = [
            _Endless(len(images), seed, _BUCKETS, int(name))
            for name, images in zip(self.names, self._images, strict=True)
        ]
        self._round: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def _before(self, number: int) -> list[int]:
        """Return the number of batches of each bucket before a round."""
        return [number * len(images) // self.batch_size for images in self._images]

    def _place(self, number: int) -> tuple[int, int]:
        """Return the bucket of a batch, and its number among the batches of this bucket."""
        most = (number + len(self._images) + 1) * self.batch_size // self.length + 2
        index = bisect_right(range(most), number, key=lambda r: sum(self._before(r))) - 1
        before, after = self._before(index), self._before(index + 1)
        if self._round[0] != index:
            kinds = np.repeat(np.arange(len(before)), np.subtract(after, before))
            self._round = (index, np.random.default_rng([self.seed, _ROUNDS, index]).permutation(kinds))
        place = number - sum(before)
        kind = int(self._round[1][place])
        return kind, before[kind] + int((self._round[1][:place] == kind).sum())

    def bucket(self, number: int) -> int:
        return int(self.names[self._place(number)[0]])

    def batch(self, number: int) -> NDArray[np.int64]:
        kind, position = self._place(number)
        return self._images[kind][self._lists[kind].batch(position, self.batch_size)]
