"""Datasets through Hugging Face's `datasets`, offline: saved to disk by the test."""

import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from robustdiff.data import load_dataset
from robustdiff.data.huggingface import HuggingFaceDataset
from robustdiff.errors import InputError

ARRAYS = [np.full((6, 8), value, np.uint8) for value in (10, 20, 30)]


def table(features, **columns):
    images = [Image.fromarray(array) for array in ARRAYS]
    return datasets.Dataset.from_dict({"picture": images, **columns}, features=datasets.Features(features))


def test_saved_to_disk_with_class_labels(tmp_path):
    features = {
        "picture": datasets.Image(),
        "caption": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["cat", "dog", "owl"]),
    }
    table(features, caption=["a", "b", "c"], kind=[1, 0, 1]).save_to_disk(tmp_path / "set")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    assert (len(dataset), dataset.shape, dataset.num_classes) == (3, (1, 6, 6), 3)
    images, labels = dataset.__getitems__([2, 0])
    assert images[:, 0, 0, 0].tolist() == [30, 10]
    assert labels.tolist() == [1, 1]
    dataset = load_dataset(f"hf:{tmp_path / 'set'}", size=4, channels=3)
    assert dataset[1][0].shape == (3, 4, 4)
    assert dataset[1][1] == 0


def test_integer_labels_and_splits(tmp_path):
    features = {"picture": datasets.Image(), "label": datasets.Value("int32")}
    splits = {"train": table(features, label=[0, 4, 2]), "validation": table(features, label=[1, 1, 1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert load_dataset(f"hf:{tmp_path / 'set'}").num_classes == 5
    _, labels = load_dataset(f"hf:{tmp_path / 'set'}", split="validation").__getitems__(range(3))
    assert labels.tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="no split 'test'; use one of: train, validation"):
        load_dataset(f"hf:{tmp_path / 'set'}", split="test")


def test_a_folder_that_datasets_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("cat", "dog"):
        (tmp_path / "set/train" / name).mkdir(parents=True)
        Image.fromarray(ARRAYS[0]).save(tmp_path / "set/train" / name / "a.png")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    assert (len(dataset), dataset.num_classes) == (2, 2)


def test_without_labels(tmp_path):
    table({"picture": datasets.Image()}).save_to_disk(tmp_path / "set")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    assert dataset.num_classes is None
    assert dataset.__getitems__([0])[1] is None


def test_sizes_that_differ(tmp_path):
    images = [Image.fromarray(np.zeros((n, n), np.uint8)) for n in (6, 7)]
    datasets.Dataset.from_dict({"image": images}).save_to_disk(tmp_path / "set")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    with pytest.raises(InputError, match="row 1: 7 pixels"):
        dataset[1]


def test_rows_without_an_image_or_with_a_broken_one(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    good = Image.fromarray(ARRAYS[0])
    rows = [good, None, {"bytes": b"hello", "path": None}]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "set")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    with pytest.raises(InputError, match="row 1 has no image"):
        dataset[1]
    with pytest.raises(InputError, match="cannot be decoded"):
        dataset[2]


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(InputError, match="no image column"):
        load_dataset(f"hf:{tmp_path / 'text'}")
    with pytest.raises(InputError, match="no split 'test'"):
        load_dataset(f"hf:{tmp_path / 'text'}", split="test")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_dataset(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no rows"):
        HuggingFaceDataset("mine", table({"picture": datasets.Image()}).select([]))
    (tmp_path / "text/state.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_dataset(f"hf:{tmp_path / 'text'}")


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_dataset("hf:mnist")
