"""Images in `.npz` files."""

import numpy as np
import pytest

from robustdiff.data import load_dataset
from robustdiff.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])
def test_names(tmp_path, names):
    np.savez(tmp_path / "a.npz", **{names[0]: IMAGES, names[1]: np.array([1, 0, 3, 1])})
    dataset = load_dataset("npz", root=tmp_path / "a.npz")
    assert (len(dataset), dataset.shape, dataset.num_classes) == (4, (3, 6, 6), 4)
    images, labels = dataset.__getitems__([2, 0])[:2]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), IMAGES[[2, 0]])
    assert labels.tolist() == [3, 1]


def test_size_and_channels(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    assert load_dataset("npz", root=tmp_path / "a.npz").num_classes is None
    assert load_dataset("npz", root=tmp_path / "a.npz", size=4, channels=1).shape == (1, 4, 4)
    assert load_dataset("npz", root=tmp_path / "a.npz", channels=1).shape == (1, 6, 6)


def test_a_change_of_channels_does_not_crop(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES[:, :4], np.zeros(4, int))
    assert load_dataset("npz", root=tmp_path / "a.npz", channels=1).shape == (1, 4, 6)


def corrupt_member(path):
    """Damage the stored pixels and leave the zip directory intact."""
    np.savez_compressed(path, images=IMAGES)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "no such file"),
        (lambda p: p.write_bytes(b""), "not a readable .npz"),
        (lambda p: p.write_bytes(b"hello"), "not a readable .npz"),
        (lambda p: p.write_bytes(b"PK\x03\x04 hello"), "not a readable .npz"),
        (corrupt_member, "not a readable .npz"),
        (lambda p: np.savez(p, images=np.array([{"a": 1}], dtype=object)), "not a readable .npz"),
        (lambda p: np.savez(p, pixels=IMAGES), "it has: pixels"),
        (lambda p: np.savez(p), "it has: nothing"),
        (lambda p: np.savez(p, images=IMAGES / 255), "float64, not uint8"),
        (lambda p: np.savez(p, images=IMAGES[0]), "shape"),
        (lambda p: np.savez(p, images=IMAGES, labels=np.zeros(3, int)), "labels"),
    ],
)
@pytest.mark.parametrize("size", [None, 4])
def test_bad_files(tmp_path, make, message, size):
    path = tmp_path / "a.npz"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset("npz", root=path, size=size)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lone_array(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(InputError, match="a single array"):
        load_dataset("npz", root=tmp_path / "a.npz")


def test_arrays_that_are_passed_over_are_said(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", images=IMAGES, y=np.zeros(4, int))
    assert load_dataset("npz", root=tmp_path / "a.npz").num_classes is None
    assert "a.npz: passed over y" in caplog.text
