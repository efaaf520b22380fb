"""Batches, and errors that are the same with worker processes and without."""

import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from robustdiff.data import ArrayDataset, ImageDataset
from robustdiff.data.loader import load_batches, select_batches, worker_failures
from robustdiff.errors import InputError, RunError

BATCHES = [[0, 1], [4, 2], [3]]


class Failing(ImageDataset):
    """Fails, in its own way, at image 2."""

    def __init__(self, fail):
        super().__init__("failing", (1, 2, 2), None)
        self.fail = fail

    def __len__(self):
        return 5

    def __getitems__(self, indices):
        if 2 in indices:
            self.fail()
        return torch.zeros(len(indices), 1, 2, 2, dtype=torch.uint8), None


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_order(workers):
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    captions = [(f"image {k}", "an image") for k in range(5)]
    dataset = ArrayDataset("mine", images, np.arange(5), captions=captions)
    state = torch.get_rng_state()
    batches = list(load_batches(dataset, BATCHES, workers))
    assert [labels.tolist() for _, labels, *_ in batches] == BATCHES
    assert [images.ravel().tolist() for images, *_ in batches] == BATCHES
    assert [captions[0][0] for _, _, captions, _ in batches] == ["image 0", "image 4", "image 3"]
    assert all(batch.geometry is None for batch in batches)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("labels", [True, False])
def test_selected_batches_are_those_that_are_loaded(labels):
    images = np.arange(40, dtype=np.uint8).reshape(5, 2, 4, 1)
    dataset = ArrayDataset("mine", images, np.arange(5), captions=[(f"image {k}",) for k in range(5)])
    resident = dataset.resident(torch.device("cpu"), 0)
    batches = list(select_batches(dataset, resident, BATCHES, labels))
    for batch, wanted in zip(batches, load_batches(dataset, BATCHES), strict=True):
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.labels, wanted.labels) if labels else batch.labels is None
        assert (batch.captions, batch.geometry) == (wanted.captions, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_is_the_same_line(workers):
    def fail():
        raise InputError("a.png: cannot be decoded")

    batches = load_batches(Failing(fail), BATCHES, workers)
    next(batches)
    with pytest.raises(InputError) as caught:
        next(batches)
    assert str(caught.value) == "a.png: cannot be decoded"


def test_a_killed_worker_is_a_failed_run():
    def fail():
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunError, match=r"DataLoader worker \(pid.*data.workers=0") as caught, worker_failures():
        list(load_batches(Failing(fail), BATCHES, 1))
    assert "\n" not in str(caught.value)


WRAPPED = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  …\n"


@pytest.mark.parametrize(
    "reason",
    [
        "unable to write to file </torch_1_2>: No space left on device (28)",
        "unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)",
        "received 0 items of ancdata",
    ],
)
def test_no_shared_memory_is_a_failed_run(reason):
    with (
        pytest.raises(RunError, match=r"a process that loads images ended .*: free memory") as caught,
        worker_failures(),
    ):
        raise RuntimeError(f"{WRAPPED}RuntimeError: {reason}\n")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError(f"{WRAPPED}RuntimeError: a fault of ours"), RunError("the loss is nan")]
)
def test_other_failures_stay_what_they_are(error):
    with pytest.raises(RuntimeError) as caught, worker_failures():
        raise error
    assert caught.value is error
