"""Folders of image files."""

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.data import load_dataset
from robustdiff.errors import InputError


def save(path, size=(8, 8), mode="RGB", seed=0, **options):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path, **options)
    return array


def test_without_subfolders_there_are_no_labels(tmp_path):
    arrays = [save(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate("ba")]
    dataset = load_dataset("imagefolder", root=tmp_path)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (2, (3, 8, 8), None)
    images, labels = dataset.__getitems__([0, 1])
    assert labels is None
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(arrays[::-1]))  # a before b


def test_subfolders_are_classes(tmp_path):
    for name in ("dog/2.png", "cat/deep/1.jpg", "cat/0.bmp", "ant/x.WEBP"):
        save(tmp_path / name)
    (tmp_path / "dog/notes.txt").write_text("not an image and not called one")
    dataset = load_dataset("imagefolder", root=tmp_path)
    images, labels = dataset.__getitems__(range(4))
    assert dataset.num_classes == 3
    assert [path.name for path in dataset.paths] == ["x.WEBP", "0.bmp", "1.jpg", "2.png"]
    assert labels.tolist() == [0, 1, 1, 2]
    assert labels.dtype == torch.int64
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert dataset[3][1] == 2


def test_crop_is_centred_and_resize_is_pillow_bicubic(tmp_path):
    array = save(tmp_path / "a.png", size=(20, 12))
    save(tmp_path / "b.png", size=(12, 30))
    dataset = load_dataset("imagefolder", root=tmp_path)
    assert dataset.shape == (3, 12, 12)
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), array[:, 4:16])
    dataset = load_dataset("imagefolder", root=tmp_path, size=6)
    expected = Image.fromarray(array[:, 4:16]).resize((6, 6), Image.Resampling.BICUBIC)
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_channels(tmp_path):
    grey = save(tmp_path / "a.png", mode="L")
    assert load_dataset("imagefolder", root=tmp_path).shape == (1, 8, 8)
    image, _ = load_dataset("imagefolder", root=tmp_path, channels=3)[0]
    assert all(np.array_equal(channel, grey) for channel in image.numpy())
    rgba = save(tmp_path / "b.png", mode="RGBA")
    dataset = load_dataset("imagefolder", root=tmp_path)
    assert dataset.shape == (3, 8, 8)
    assert np.array_equal(dataset[1][0].permute(1, 2, 0).numpy(), rgba[..., :3])
    luma = Image.fromarray(rgba[..., :3]).convert("L")
    assert np.array_equal(load_dataset("imagefolder", root=tmp_path, channels=1)[1][0][0], np.asarray(luma))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    array = np.array([[0, 255, 256, 65535]] * 4, np.uint16)
    Image.fromarray(array).save(tmp_path / "a.png")
    image, _ = load_dataset("imagefolder", root=tmp_path)[0]
    assert image[0, 0].tolist() == [0, 0, 1, 255]


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((16, 16), np.uint8)
    array[:8] = 255  # the upper half is bright
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(array).save(tmp_path / "a.jpg", exif=exif)
    image, _ = load_dataset("imagefolder", root=tmp_path)[0]
    assert image[0, :6].max() < 50
    assert image[0, -6:].min() > 200


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x89PNG\r\n\x1a\n1234"])
def test_a_file_that_is_no_image_is_named_when_the_folder_is_loaded(tmp_path, content):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.png: not an image") as caught:
        load_dataset("imagefolder", root=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_corrupt_pixels_are_named_on_access(tmp_path):
    save(tmp_path / "a.png", size=(64, 64))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    dataset = load_dataset("imagefolder", root=tmp_path)
    with pytest.raises(InputError, match=r"a\.png: cannot be decoded"):
        dataset[0]


def test_a_file_that_goes_away_is_named(tmp_path):
    save(tmp_path / "a.png")
    dataset = load_dataset("imagefolder", root=tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: cannot be decoded"):
        dataset[0]


def test_sizes_that_differ(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", size=(9, 9))
    with pytest.raises(InputError, match=r"a\.png: 8, b\.png: 9 pixels\); pass size="):
        load_dataset("imagefolder", root=tmp_path)
    assert load_dataset("imagefolder", root=tmp_path, size=8).shape == (3, 8, 8)


def test_images_beside_class_folders(tmp_path):
    save(tmp_path / "cat/a.png")
    save(tmp_path / "stray.png")
    with pytest.raises(InputError, match=r"stray\.png: lies beside class folders"):
        load_dataset("imagefolder", root=tmp_path)


def test_missing_and_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_dataset("imagefolder", root=tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(InputError, match="no images in it"):
        load_dataset("imagefolder", root=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_dataset("imagefolder", root=tmp_path / "notes.txt")
