"""Batches, and errors that are the same with worker processes and without."""

import multiprocessing
import os
import pickle
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from robustdiff.data import ArrayDataset, ImageDataset, load_dataset
from robustdiff.data.huggingface import HuggingFaceDataset
from robustdiff.data.loader import _Reporting, load_batches, select_batches, worker_failures
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


@pytest.fixture
def spawning():
    """Start processes as Windows and macOS do."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawning")
def test_processes_that_are_not_forked_load_images(tmp_path):
    for k in range(3):
        Image.new("L", (4, 4), k).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"the {k}")
    dataset = load_dataset("imagefolder", root=tmp_path)
    batches = list(load_batches(dataset, [[0, 1], [2]], workers=1))
    assert [batch.images.ravel().tolist()[::16] for batch in batches] == [[0, 1], [2]]
    assert [batch.captions for batch in batches] == [[("the 0",), ("the 1",)], [("the 2",)]]


@pytest.mark.usefixtures("spawning")
def test_where_processes_import_the_script_the_remedy_says_so():
    with pytest.raises(RunError, match='call train under if __name__ == "__main__"'), worker_failures():
        raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")


@pytest.mark.parametrize("kind", ["webdataset", "hf", "npz", "digits"])
def test_every_kind_of_data_is_sent_to_a_process(tmp_path, kind):
    """Processes that are not forked get it as a pickle."""
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", arr_0=images)
        dataset = load_dataset("npz", root=tmp_path / "a.npz")
    elif kind == "webdataset":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for k, image in enumerate(images):
                Image.fromarray(image).save(tmp_path / f"{k}.png")
                archive.add(tmp_path / f"{k}.png", f"{k}.png")
        dataset = load_dataset("webdataset", root=tmp_path / "a.tar")
    elif kind == "hf":
        table = pytest.importorskip("datasets").Dataset.from_dict({"image": [Image.fromarray(one) for one in images]})
        dataset = HuggingFaceDataset("hf", table)
    else:
        dataset = load_dataset(kind)
    sent = pickle.loads(pickle.dumps(_Reporting(dataset)))
    assert torch.equal(sent.__getitems__([0, 2]).images, dataset.__getitems__([0, 2])[0])
