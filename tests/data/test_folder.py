"""Folders of image files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

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
    images, labels = dataset.__getitems__([0, 1])[:2]
    assert labels is None
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(arrays[::-1]))  # a before b


def test_subfolders_are_classes(tmp_path):
    for name in ("dog/2.png", "cat/deep/1.jpg", "cat/0.bmp", "ant/x.WEBP"):
        save(tmp_path / name)
    (tmp_path / "dog/notes.txt").write_text("not an image and not called one")
    dataset = load_dataset("imagefolder", root=tmp_path)
    images, labels = dataset.__getitems__(range(4))[:2]
    assert dataset.num_classes == 3
    assert dataset.file_names() == ["ant/x.WEBP", "cat/0.bmp", "cat/deep/1.jpg", "dog/2.png"]
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
    composed = Image.alpha_composite(Image.new("RGBA", (8, 8), "white"), Image.fromarray(rgba)).convert("RGB")
    assert np.array_equal(dataset[1][0].permute(1, 2, 0).numpy(), np.asarray(composed))
    luma = composed.convert("L")
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
    with pytest.raises(InputError, match=r"a\.png: cannot be read \(No such file"):
        dataset[0]


def test_sizes_that_differ(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", size=(9, 9))
    with pytest.raises(InputError, match=r"a\.png: 8, b\.png: 9 pixels\); give images of one size; data.size=PIXELS"):
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


# -- what is looked at ------------------------------------------------------------------------------------------


def test_what_is_hidden_is_skipped(tmp_path, caplog):
    for name in ("cat/1.png", "dog/1.png"):
        save(tmp_path / name)
    for name in (".ipynb_checkpoints/1.png", "cat/.thumbs/1.png", "cat/.2.png", "__MACOSX/cat/1.png"):
        save(tmp_path / name)
    (tmp_path / "dog/._1.png").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / ".DS_Store").write_bytes(b"")
    dataset = load_dataset("imagefolder", root=tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in dataset.paths] == ["cat/1.png", "dog/1.png"]
    assert dataset.classes == ["cat", "dog"]
    assert not caplog.text
    save(tmp_path / ".photos/a.png")
    assert len(load_dataset("imagefolder", root=tmp_path / ".photos")) == 1


def test_a_class_folder_without_images_is_named(tmp_path):
    for name in ("ant/1.png", "elk/1.png"):
        save(tmp_path / name)
    (tmp_path / "dog/.hidden").mkdir(parents=True)
    save(tmp_path / "dog/.hidden/1.png")
    with pytest.raises(InputError, match=r"dog: a class folder without images"):
        load_dataset("imagefolder", root=tmp_path)


def test_a_folder_called_as_an_image_holds_none(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert len(load_dataset("imagefolder", root=tmp_path)) == 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "TIFF", "webp"])
def test_formats(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    animated = {"save_all": True, "append_images": [second]} if suffix in ("png", "gif", "tif", "webp") else {}
    first.save(tmp_path / f"a.{suffix}", **animated)
    red, green, blue = load_dataset("imagefolder", root=tmp_path)[0][0][:, 4, 4].tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_other_files_are_counted_in_one_line(tmp_path, caplog):
    save(tmp_path / "a.png")
    for name in ("b.txt", "notes.txt", "z.heic"):
        (tmp_path / name).write_text("text")
    load_dataset("imagefolder", root=tmp_path)
    (record,) = caplog.records
    assert f"{tmp_path}: 3 files are passed over, such as b.txt" in record.getMessage()
    caplog.clear()
    (tmp_path / "b.txt").unlink()
    (tmp_path / "z.heic").unlink()
    os.mkfifo(tmp_path / "notes.png")  # must not be opened: that waits for a writer
    (tmp_path / "notes.txt").unlink()
    load_dataset("imagefolder", root=tmp_path)
    assert "1 file is passed over, such as notes.png" in caplog.text


def test_an_eps_file_is_not_opened_whatever_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"a\.png: not an image that can be read as BMP, GIF"):
        load_dataset("imagefolder", root=tmp_path)


def test_links_are_followed(tmp_path):
    save(tmp_path / "elsewhere/1.png")
    save(tmp_path / "root/cat/1.png")
    (tmp_path / "root/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/dog/2.png").symlink_to(tmp_path / "root/cat/1.png")
    dataset = load_dataset("imagefolder", root=tmp_path / "root")
    assert [str(p.relative_to(tmp_path / "root")) for p in dataset.paths] == ["cat/1.png", "dog/1.png", "dog/2.png"]
    assert dataset.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("root/cat/again", "root/cat"),
        ("root/cat/again", "root"),
        ("root/cat/again", "."),
        ("root/again", "/"),
        ("root/again", "root/again"),
        ("elsewhere/again", "elsewhere"),
        ("elsewhere/again", "root"),
    ],
)
def test_a_loop_of_links_is_named(tmp_path, link, target):
    save(tmp_path / "root/cat/1.png")
    save(tmp_path / "elsewhere/2.png")
    (tmp_path / "root/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(
        InputError, match=r"again\S*: (a link to a folder that it lies in|cannot be followed)"
    ) as caught:
        load_dataset("imagefolder", root=tmp_path / "root")
    assert "\n" not in str(caught.value)


def test_a_broken_link_is_named(tmp_path):
    save(tmp_path / "cat/1.png")
    (tmp_path / "dog").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"dog: cannot be followed \(No such file"):
        load_dataset("imagefolder", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"\xff\xe9.png", r"\xff\xe9.png"), (b"a\nb\x1b[0m.png", r"a\nb\x1b[0m.png"), (b"a b\t.png", r"a b\t.png")],
)
def test_odd_names_are_escaped(tmp_path, name, shown):
    path = os.path.join(os.fsencode(tmp_path), name)
    save(tmp_path / "good.png")
    os.rename(tmp_path / "good.png", path)
    assert len(load_dataset("imagefolder", root=tmp_path)) == 1
    with open(path, "wb") as file:
        file.write(b"not an image")
    with pytest.raises(InputError) as caught:
        load_dataset("imagefolder", root=tmp_path)
    assert f"{tmp_path}/{shown}: not an image" in str(caught.value)
    str(caught.value).encode()


def test_the_background_decides_whether_transparent_grey_is_grey(tmp_path):
    Image.new("LA", (8, 8), (100, 0)).save(tmp_path / "a.png")
    assert load_dataset("imagefolder", root=tmp_path).shape == (1, 8, 8)
    dataset = load_dataset("imagefolder", root=tmp_path, background="#ff8000")
    assert dataset.shape == (3, 8, 8)
    assert dataset[0][0][:, 0, 0].tolist() == [255, 128, 0]


# -- the fingerprint --------------------------------------------------------------------------------------------


def test_fingerprint(tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        save(tmp_path / "root" / name, size=(64, 64))

    def fingerprint(**options):
        return load_dataset("imagefolder", root=tmp_path / "root", size=8, **options).fingerprint()

    first = fingerprint()
    os.utime(tmp_path / "root/cat/1.png", (0, 0))
    os.rename(tmp_path / "root", tmp_path / "moved")
    (tmp_path / "root").symlink_to(tmp_path / "moved")
    assert fingerprint() == first
    assert fingerprint(background="black") != first
    assert fingerprint(channels=1) != first
    save(tmp_path / "root/cat/1.png", size=(64, 64), seed=1)
    second = fingerprint()
    os.rename(tmp_path / "root/cat", tmp_path / "root/bat")
    assert len({first, second, fingerprint()}) == 3


# -- sizes and crops --------------------------------------------------------------------------------------------


def oriented(path, late=False):
    """Save an image of 6×16 pixels that is shown as 16 high and 6 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 16, 3), dtype=np.uint8))
    image.save(path, exif=exif)
    if late:  # PNG allows the chunk behind the pixels
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        tail = data.index(b"IEND") - 4
        path.write_bytes(data[:start] + data[end:tail] + data[start:end] + data[tail:])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "late.png", "a.webp", "a.tif"])
def test_sizes_are_those_of_upright_images(tmp_path, name):
    oriented(tmp_path / name, late=name == "late.png")
    dataset = load_dataset("imagefolder", root=tmp_path, size=4)
    assert dataset.sizes.tolist() == [[16, 6]]
    with Image.open(tmp_path / name) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    batch = dataset.fetch([0], (16, 6))
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), upright)
    assert batch.geometry.tolist() == [[16, 6, 0, 0]]


def test_crops_of_other_sizes_and_places(tmp_path):
    array = save(tmp_path / "a.png", size=(40, 20))
    dataset = load_dataset("imagefolder", root=tmp_path, size=10)
    assert dataset.__getitems__([0]).geometry.tolist() == [[20, 40, 0, 5]]
    assert torch.equal(dataset.fetch([0]).images, dataset.__getitems__([0]).images)
    batch = dataset.fetch([0, 0], positions=[(0.0, 0.0), (0.99, 0.999)])
    assert batch.geometry.tolist() == [[20, 40, 0, 0], [20, 40, 0, 10]]
    for image, left in zip(batch.images, (0, 20), strict=True):
        wanted = Image.fromarray(array[:, left : left + 20]).resize((10, 10), Image.Resampling.BICUBIC)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(wanted))
    batch = dataset.fetch([0], (20, 10), [(0.3, 0.5)])
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), array[:, 15:25])
    assert batch.geometry.tolist() == [[20, 40, 0, 15]]
