"""Pixels and the model's range; batches as torch's DataLoader fetches them; errors of arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from robustdiff.data import ArrayDataset, ImageDataset, to_uint8, to_unit
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
    images, labels = dataset.__getitems__([3, 0, 3])[:2]
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
    assert [len(images) for images, *_ in batches] == [2, 2, 1]
    assert torch.cat([labels for _, labels, *_ in batches]).tolist() == [0, 2, 1, 0, 2]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), None, "float32, not uint8"),
        (np.zeros((2, 4, 4), np.uint8), None, r"shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 2), np.uint8), None, "C = 1 or 3"),
        (np.zeros((0, 4, 4, 1), np.uint8), None, "N ≥ 1"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64), "labels"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "labels are float64"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, np.nan]), "labels are float64"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, -1]), "the label of image 1 is -1; labels are non-negative"),
        (
            np.zeros((2, 4, 4, 1), np.uint8),
            np.array([0, 2**63 + 1], np.uint64),
            "the label of image 1 is 92233720368547",
        ),
    ],
)
def test_bad_arrays(images, labels, message):
    with pytest.raises(InputError, match=message):
        ArrayDataset("mine", images, labels)


def test_a_label_that_is_no_class():
    with pytest.raises(InputError, match="the label of image 1 is 3; labels are 0 to 2"):
        ArrayDataset("mine", np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 3]), num_classes=3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64, np.dtype(">i4")])
def test_a_gap_in_the_labels_is_said(dtype, caplog):
    images = np.zeros((3, 4, 4, 1), np.uint8)
    dataset = ArrayDataset("mine", images, np.array([0, 4, 2], dtype))
    assert dataset.num_classes == 5
    assert dataset.labels.tolist() == [0, 4, 2]
    assert "mine: labels go from 0 to 4, and no image has 2 of them, such as 1" in caplog.text
    caplog.clear()
    ArrayDataset("mine", images, np.array([0, 4, 2], dtype), num_classes=6)
    assert not caplog.text


def test_fingerprint_of_arrays():
    images, labels = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3), np.array([0, 1, 2, 1, 0])
    changed = images.copy()
    changed[4, 1, 1, 2] ^= 1
    fingerprint = ArrayDataset("mine", images, labels).fingerprint()
    assert len(fingerprint) == 64
    assert fingerprint == ArrayDataset("renamed", images.copy(), labels.astype(np.uint8)).fingerprint()
    others = [
        ArrayDataset("mine", changed, labels),
        ArrayDataset("mine", images, labels[::-1].copy() + 1),
        ArrayDataset("mine", images),
        ArrayDataset("mine", images[:4], labels[:4]),
        ArrayDataset("mine", images, labels, num_classes=4),
        ArrayDataset("mine", images.reshape(5, 1, 4, 3), labels),
    ]
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 7


def test_captions_are_fetched_with_their_images_and_are_part_of_the_fingerprint():
    images = np.arange(3 * 12, dtype=np.uint8).reshape(3, 2, 2, 3)
    captions = [("a red shoe",), ("a shirt", "clothes"), ("",)]
    plain, dataset = ArrayDataset("mine", images), ArrayDataset("mine", images, captions=captions)
    assert (plain.captioned, dataset.captioned) == (False, True)
    assert plain.__getitems__([1, 0]).captions is None
    assert dataset.__getitems__([1, 0]).captions == [captions[1], captions[0]]
    assert dataset.fingerprint(captions=False) == plain.fingerprint() == plain.fingerprint(captions=False)
    others = [captions, captions[::-1], [("a red shoe",), ("a shirtclothes", ""), ("",)], [*captions[:2], ("", "")]]
    prints = {ArrayDataset("mine", images, captions=other).fingerprint() for other in others}
    assert len(prints | {plain.fingerprint()}) == 5
    for wrong in (captions[:2], [("a",), (), ("b",)]):
        with pytest.raises(InputError, match="one or more of each image"):
            ArrayDataset("mine", images, captions=wrong)


def test_fingerprint_of_any_dataset_is_that_of_its_pixels():
    class Lazy(ImageDataset):
        def __len__(self):
            return 300

        def __getitems__(self, indices):
            return torch.tensor(list(indices), dtype=torch.int64).to(torch.uint8).reshape(-1, 1, 1, 1), None

    arrays = ArrayDataset("mine", np.arange(300).astype(np.uint8).reshape(-1, 1, 1, 1))
    assert Lazy("lazy", (1, 1, 1), None).fingerprint() == arrays.fingerprint()


def test_images_are_resident_where_there_is_room():
    """The device "meta" stands for a GPU."""
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    dataset = ArrayDataset("mine", np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1))
    here = dataset.resident(cpu, 0)
    assert torch.equal(here, dataset.__getitems__(range(3)).images)
    assert here.data_ptr() == dataset.resident(cpu, 0).data_ptr()  # not a copy
    assert dataset.resident(gpu, 47) is None
    assert dataset.resident(gpu, 48).device == gpu
