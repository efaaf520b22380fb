"""The registry, the embedded datasets and the one of IDX files."""

import gzip
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from robustdiff.data import DATASETS, DataConfig, load_dataset
from robustdiff.data.idx import FASHION_MNIST_ROOT, read_fashion_mnist, read_idx
from robustdiff.errors import InputError

ROOT = Path(__file__).parents[2]


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """A tiny Fashion-MNIST: plain training files, gzipped test files."""
    generator = np.random.default_rng(0)
    arrays = {}
    for prefix, n in (("train", 7), ("t10k", 3)):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        arrays[prefix] = images, labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx_bytes(array)
            if prefix == "train":
                (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(data)
            else:
                (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
    return tmp_path, arrays


@pytest.mark.parametrize(("split", "n"), [("train", 60_000), ("test", 10_000)])
def test_fashion_16(split, n):
    dataset = load_dataset("fashion-16", split=split)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (n, (1, 16, 16), 10)
    _, labels = dataset.__getitems__(range(n))[:2]
    assert np.bincount(labels.numpy()).tolist() == [n // 10] * 10


def test_fashion_16_is_small():
    assert (ROOT / "src/robustdiff/data/fashion16.npz").stat().st_size < 10_000_000


def test_make_fashion16_pads_averages_and_is_deterministic(idx_folder, tmp_path):
    root, arrays = idx_folder
    outputs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for output in outputs:
        command = [sys.executable, ROOT / "scripts/make_fashion16.py", "--source", root, "--output", output]
        subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with np.load(outputs[0], allow_pickle=False) as made:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = arrays[prefix]
            assert np.array_equal(made[f"{split}_labels"], labels)
            small = made[f"{split}_images"]
            for i, row, column in np.ndindex(small.shape):
                y, x = 2 * row - 2, 2 * column - 2  # of the block's corner, before padding
                inside = 0 <= y < 28 and 0 <= x < 28
                mean = images[i, y : y + 2, x : x + 2].astype(float).mean() if inside else 0.0
                assert small[i, row, column] == int(mean + 0.5)


@pytest.mark.skipif(not FASHION_MNIST_ROOT.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_16_is_what_its_source_says(split):
    shrink = runpy.run_path(str(ROOT / "scripts/make_fashion16.py"))["shrink"]
    images, labels = read_fashion_mnist(FASHION_MNIST_ROOT, split)
    dataset = load_dataset("fashion-16", split=split)
    shipped_images, shipped_labels = dataset.__getitems__(range(len(dataset)))[:2]
    assert np.array_equal(shipped_images[:, 0].numpy(), shrink(images))
    assert np.array_equal(shipped_labels.numpy(), labels)


def test_digits_are_those_of_scikit_learn():
    dataset = load_dataset("digits")
    assert (len(dataset), dataset.shape, dataset.num_classes) == (1797, (1, 8, 8), 10)
    images, labels = dataset.__getitems__(range(1797))[:2]
    bunch = load_digits()
    assert np.allclose(images[:, 0].numpy() / 255 * 16, bunch.images, atol=0.5 / 255 * 16)
    assert images.min() == 0
    assert images.max() == 255
    assert np.array_equal(labels.numpy(), bunch.target)


def test_fashion_mnist(idx_folder):
    root, arrays = idx_folder
    for split, prefix in (("train", "train"), ("test", "t10k")):
        dataset = load_dataset("fashion-mnist", root=root, split=split)
        images, labels = dataset.__getitems__(range(len(dataset)))[:2]
        assert np.array_equal(images[:, 0].numpy(), arrays[prefix][0])
        assert np.array_equal(labels.numpy(), arrays[prefix][1])


def test_size_and_channels(idx_folder):
    dataset = load_dataset("fashion-mnist", root=idx_folder[0], size=32, channels=3)
    assert dataset.shape == (3, 32, 32)
    image, _ = dataset[0]
    expected = Image.fromarray(idx_folder[1]["train"][0][0]).resize((32, 32), Image.Resampling.BICUBIC)
    for channel in image.numpy():
        assert np.array_equal(channel, np.asarray(expected))
    grey, colour = load_dataset("digits"), load_dataset("digits", channels=3)
    assert all(np.array_equal(channel, grey[7][0][0]) for channel in colour[7][0])


def test_idx_of_any_dimension(tmp_path):
    for shape in [(4,), (2, 3), (2, 3, 4, 5)]:
        array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        (tmp_path / "x").write_bytes(idx_bytes(array))
        assert np.array_equal(read_idx(tmp_path / "x"), array)


GOOD = idx_bytes(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG", "starts with 89504e47"),
        (bytes([0, 0, 13, 1]) + struct.pack(">I", 1) + b"....", "unsigned bytes"),  # float32
        (bytes([0, 0, 8, 0]), "header is truncated"),
        (GOOD[:9], "header is truncated"),
        (GOOD[:-1], "5 bytes of values"),
        (GOOD + b"x", "7 bytes of values"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be read"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 20, "not an IDX file"),
    ],
)
def test_bad_idx(tmp_path, data, message):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_idx(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_idx(tmp_path, idx_folder):
    with pytest.raises(InputError, match="no such folder"):
        load_dataset("fashion-mnist", root=tmp_path / "nowhere")
    (idx_folder[0] / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\.gz: no such file"):
        load_dataset("fashion-mnist", root=idx_folder[0])


def test_images_and_labels_that_do_not_match(idx_folder):
    (idx_folder[0] / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(InputError, match="do not belong together"):
        load_dataset("fashion-mnist", root=idx_folder[0])


def test_the_classes_are_ten_whatever_labels_there_are(idx_folder):
    assert load_dataset("fashion-mnist", root=idx_folder[0], split="test").num_classes == 10
    (idx_folder[0] / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(7, 10, np.uint8)))
    with pytest.raises(InputError, match="the label of image 0 is 10; labels are 0 to 9"):
        load_dataset("fashion-mnist", root=idx_folder[0])


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError) as caught:
        load_dataset("cifar")
    for name in [*DATASETS, "hf:NAME"]:
        assert name in str(caught.value)


def test_what_follows_a_prefix_is_the_root(monkeypatch):
    def echo(*, size, channels, split, root, lines: int = 1):
        return root, lines

    monkeypatch.setitem(DATASETS._entries, "echo:NAME", echo)
    assert load_dataset("echo:a:b", lines=2) == ("a:b", 2)
    assert DataConfig(name="echo:c").load() == ("c", 1)
    with pytest.raises(InputError, match=r"unknown dataset 'ech:x'.*echo:NAME"):
        load_dataset("ech:x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digits", "size": 0}, "size is 0"),
        ({"name": "digits", "channels": 2}, "channels is 2"),
        ({"name": "digits", "root": "x"}, "takes no root"),
        ({"name": "fashion-16", "root": "x"}, "takes no root"),
        ({"name": "hf:x", "root": "x"}, "takes no root"),
        ({"name": "digits", "split": "test"}, "no split 'test'"),
        ({"name": "fashion-16", "split": "valid"}, "no split 'valid'; use one of: train, test"),
        ({"name": "imagefolder"}, "needs root"),
        ({"name": "npz"}, "needs root"),
        ({"name": "imagefolder", "root": "x", "split": "test"}, "no split"),
        ({"name": "npz", "root": "x", "split": "test"}, "no split"),
        (
            {"name": "digits", "background": "black"},
            "takes no background; leave it out; it is for hf:NAME, imagefolder",
        ),
        (
            {"name": "imagefolder", "root": "x", "image_column": "a"},
            "takes no image_column; leave it out; it is for hf:",
        ),
        ({"name": "npz", "root": "x", "label_column": "a"}, "npz takes no label_column"),
        ({"name": "digits", "colour": "red"}, "digits takes no colour; leave it out"),
        ({"name": "imagefolder", "root": "x", "background": "whit"}, "background 'whit' is not an opaque colour"),
        ({"name": "imagefolder", "root": "x", "background": "#00000080"}, "is not an opaque colour"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        load_dataset(**arguments)
