"""Batches of a dataset.

They are loaded in this process or in worker processes, with the same error messages, or selected from images that are
on the device as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_start_method
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustdiff.data.dataset import Batch, ImageDataset
from robustdiff.data.pixels import Position
from robustdiff.errors import InputError, RunError

__all__ = ["Request", "load_batches", "select_batches", "to_device", "worker_failures"]

# Parts of torch's error messages for a worker that was killed, or that cannot send its batches.
GONE = (
    "DataLoader worker (pid",
    "unable to allocate shared memory",
    "unable to open shared memory",
    "unable to mmap",
    "No space left on device",
    "Too many open files",
    "received 0 items of ancdata",
)


@dataclass(frozen=True)
class Request:
    """The arguments of :meth:`ImageDataset.fetch`."""

    indices: list[int]
    size: tuple[int, int] | None
    positions: list[Position] | None


class _Reporting(Dataset[Any]):
    """A dataset that returns its errors, because torch adds a traceback to the message of an error in a worker."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, wanted: Sequence[int] | Request) -> Batch | InputError:
        try:
            if isinstance(wanted, Request):
                return self.dataset.fetch(wanted.indices, wanted.size, wanted.positions)
            return Batch(*self.dataset.__getitems__(wanted))
        except InputError as error:
            return InputError(str(error))


def _as_it_is(batch: Any) -> Any:
    return batch


def load_batches(
    dataset: ImageDataset, indices: Iterable[list[int] | Request], workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Load batches in order.

    Args:
        dataset: The images.
        indices: The indices of each batch, or its request if it has other crops than the centred squares.
        workers: The number of worker processes; with 0 this process loads the batches.
        pin_memory: Whether batches are copied to page-locked memory.

    Raises:
        InputError: An error of the dataset, in this process or in a worker.
    """
    sampler: Any = indices  # a batch may be anything that the dataset takes
    loader = DataLoader(
        _Reporting(dataset),
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without a generator, DataLoader draws from the global one, which a resumed run has just restored.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def select_batches(
    dataset: ImageDataset, images: Tensor, indices: Iterable[Sequence[int]], labels: bool = True
) -> Iterator[Batch]:
    """Select batches in order, from images that are on a device.

    Args:
        dataset: The dataset.
        images: All of its images, as :meth:`ImageDataset.resident` returns them.
        indices: The indices of each batch.
        labels: Whether the batches have the labels of the dataset, if it has any, on the device of the images.
    """
    classes = dataset.labels.to(images.device) if labels and dataset.labels is not None else None
    for own in indices:
        rows = to_device(torch.tensor(own, dtype=torch.int64), images.device)
        chosen = None if classes is None else classes.index_select(0, rows)
        yield Batch(images.index_select(0, rows), chosen, dataset.captions_of(own), dataset.geometry_of(own))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. The host does not wait for a CUDA device, which copies from page-locked memory."""
    on_gpu = device.type == "cuda"  # other memory may change before another device has copied it
    if on_gpu and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # the tensor itself if it is page-locked
    return tensor.to(device, non_blocking=on_gpu)


@contextmanager
def worker_failures() -> Iterator[None]:
    """Replace torch's error for a killed worker process, which may come at any instruction, by one with a remedy.

    Raises:
        RunError: A worker was killed or cannot send its batches.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if isinstance(error, RunError) or not any(words in message for words in GONE):
            raise
        reason = next(line for line in reversed(message.splitlines()) if any(words in line for words in GONE))
        # Where processes are not forked, as on Windows and macOS, each of them imports the script that trains.
        script = "" if get_start_method() == "fork" else 'call train under if __name__ == "__main__" in a script, '
        raise RunError(
            f"a process that loads images ended ({reason.strip()}): {script}free memory or shared memory (/dev/shm), "
            "lower batch_size, or set data.workers=0; --resume goes on from the last checkpoint"
        ) from error
