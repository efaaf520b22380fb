"""Pixels and the model's range; batches as torch's DataLoader fetches them; errors of arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from robustdiff.data import ArrayDataset, to_uint8, to_unit
from robustdiff.errors import InputError


def identity(batch):
    return batch


def test_to_uint8_inverts_to_unit_on_every_value():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(pixels)
    assert unit.dtype == torch.float32
    assert unit.min() == -1
    assert unit.max() == 1
    assert torch.equal(to_uint8(unit), pixels)


@given(st.floats(-4, 4, width=32))
def test_to_uint8_is_the_nearest_pixel(x):
    nearest = min(range(256), key=lambda k: abs(k / 127.5 - 1 - x))
    assert abs(int(to_uint8(torch.tensor([x]))[0]) - nearest) <= (0 if abs(x) > 1 else 1)
    assert abs(int(to_uint8(torch.tensor([x]))[0]) / 127.5 - 1 - min(max(x, -1), 1)) <= 1 / 255 + 1e-6


@pytest.fixture
def dataset():
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    return ArrayDataset("mine", images, np.array([0, 2, 1, 0, 2], np.int32))


def test_shapes_and_classes(dataset):
    assert dataset.shape == (3, 2, 3)
    assert len(dataset) == 5
    assert dataset.num_classes == 3
    assert "mine" in repr(dataset)


def test_batch_and_single_agree(dataset):
    images, labels = dataset.__getitems__([3, 0, 3])
    assert images.shape == (3, 3, 2, 3)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0]
    assert labels.dtype == torch.int64
    for position, index in enumerate([3, 0, 3]):
        image, label = dataset[index]
        assert torch.equal(image, images[position])
        assert label == labels[position]
    assert images[0, 1, 0, 2] == 3 * 18 + 2 * 3 + 1  # channel 1 of pixel (0, 2) of image 3


def test_iteration_ends_and_negative_indices_count_from_the_end(dataset):
    assert len(list(dataset)) == 5
    assert torch.equal(dataset[-1][0], dataset[4][0])
    with pytest.raises(IndexError, match="5 images"):
        dataset[5]


def test_without_labels():
    dataset = ArrayDataset("mine", np.zeros((2, 4, 4, 1), np.uint8))
    assert dataset.num_classes is None
    assert dataset.__getitems__([0, 1])[1] is None
    assert dataset[0][1] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_fetches_whole_batches(dataset, workers):
    sampler = BatchSampler(SequentialSampler(dataset), batch_size=2, drop_last=False)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=identity, num_workers=workers)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 2, 1, 0, 2]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), None, "float32, not uint8"),
        (np.zeros((2, 4, 4), np.uint8), None, r"shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 2), np.uint8), None, "C = 1 or 3"),
        (np.zeros((0, 4, 4, 1), np.uint8), None, "N ≥ 1"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64), "labels"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "labels are float64"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, -1]), "non-negative"),
    ],
)
def test_bad_arrays(images, labels, message):
    with pytest.raises(InputError, match=message):
        ArrayDataset("mine", images, labels)
