r"""The random numbers of a batch, which depend on (seed, batch number) alone.

Batch b of a run holds the rows b·B … (b+1)·B − 1 of an endless list of indices, in which every epoch is a new
permutation of the data. The times, noise and flips of a batch come from a generator that is seeded for each batch, and
so does the choice among the captions of an image. Therefore

- a resumed run needs its batch number alone;
- two runs that differ in their adversary alone see the same images, times and noise (common random numbers);
- the number of processes and of microbatches does not change the training data, since every process draws the random
  numbers of the whole batch and keeps its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["BatchIndices", "batch_generator", "caption_numbers"]

_ORDER, _NOISE, _CAPTIONS = range(3)


def batch_generator(seed: int, batch: int, device: torch.device | str) -> torch.Generator:
    """Return the generator of the times, noise and flips of one batch."""
    state = np.random.SeedSequence([seed, _NOISE, batch]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def caption_numbers(seed: int, batch: int, batch_size: int) -> NDArray[np.float64]:
    """Return a uniform number in [0, 1) for each sample of one batch, (B,), which chooses among its captions.

    They are drawn on the CPU by a generator of their own, so that the host waits for no device to choose a caption.
    """
    return np.random.default_rng([seed, _CAPTIONS, batch]).random(batch_size)


class BatchIndices:
    """A ``batch_sampler`` for torch's DataLoader: the indices of successive microbatches.

    Arguments:
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

    def rows(self, microbatch: int) -> slice:
        """Return the rows of a batch that belong to this process's microbatch."""
        n = self.batch_size // (self.processes * self.accumulate)
        first = (microbatch * self.processes + self.rank) * n
        return slice(first, first + n)

    def __iter__(self) -> Iterator[list[int]]:
        known: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        batch = self.start
        while True:
            batch_rows = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
            indices = np.empty(self.batch_size, np.int64)
            for epoch in np.unique(batch_rows // self.length).tolist():
                if known[0] != epoch:
                    known = (epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.length))
                inside = batch_rows // self.length == epoch
                indices[inside] = known[1][batch_rows[inside] % self.length]
            for microbatch in range(self.accumulate):
                yield indices[self.rows(microbatch)].tolist()
            batch += 1
