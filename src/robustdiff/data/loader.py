"""Batches of a dataset, loaded here or ahead in worker processes, with the same errors in the same words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustdiff.data.dataset import ImageDataset
from robustdiff.errors import InputError, RunError

__all__ = ["load_batches", "worker_failures"]

Batch = tuple[Tensor, Tensor | None]

# What torch says when a worker is gone, or when workers can no longer hand over what they loaded.
GONE = (
    "DataLoader worker (pid",
    "unable to allocate shared memory",
    "unable to open shared memory",
    "unable to mmap",
    "No space left on device",
    "Too many open files",
    "received 0 items of ancdata",
)


class _Reporting(Dataset[Any]):
    """A dataset that returns its error: of one that a worker raises, torch makes another with a traceback in it."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> Batch | InputError:
        try:
            return self.dataset.__getitems__(indices)
        except InputError as error:
            return InputError(str(error))


def _as_it_is(batch: Any) -> Any:
    return batch


def load_batches(
    dataset: ImageDataset, indices: Iterable[list[int]], workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Load one batch after the other.

    Args:
        dataset: The images.
        indices: Those of each batch.
        workers: Processes that load ahead; 0: none.
        pin_memory: Whether the batches are put into page-locked memory.

    Yields:
        Images uint8 (B, C, H, W), and labels int64 (B,) or None.

    Raises:
        InputError: What the dataset raised, in this process or in a worker.
    """
    loader = DataLoader(
        _Reporting(dataset),
        batch_sampler=indices,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        # Of its own: it would take a number from the global one, which a resumed run has just restored.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


@contextmanager
def worker_failures() -> Iterator[None]:
    """Turn the end of a worker process, which torch may report at any instruction, into an error that says what to do.

    Raises:
        RunError: A worker was killed or cannot hand over its batches.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if isinstance(error, RunError) or not any(words in message for words in GONE):
            raise
        reason = next(line for line in reversed(message.splitlines()) if any(words in line for words in GONE))
        raise RunError(
            f"a process that loads images ended ({reason.strip()}): free memory or shared memory (/dev/shm), "
            "lower batch_size, or set data.workers=0; --resume goes on from the last checkpoint"
        ) from error
