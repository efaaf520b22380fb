"""The emoji: their composition, captions and splits, and the files that hold them."""

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.data import load_dataset
from robustdiff.data.emoji import compose
from robustdiff.errors import InputError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src/robustdiff/data"


@pytest.fixture(scope="module")
def splits():
    return {split: load_dataset("emoji", split=split) for split in ("train", "test", "unseen")}


def test_shapes_and_numbers(splits):
    assert {split: len(data) for split, data in splits.items()} == {"train": 17_237, "test": 1_567, "unseen": 768}
    assert all(data.shape == (3, 64, 64) and data.captioned for data in splits.values())
    batch = splits["test"].__getitems__([3, 0, 1566])
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.labels is None
    assert [len(captions) for captions in batch.captions] == [4] * 3


def test_splits_are_disjoint_and_are_all_pairs(splits):
    pairs = {split: set(map(tuple, data.pairs.tolist())) for split, data in splits.items()}
    emoji = {split: {index for index, _ in found} for split, found in pairs.items()}
    assert len(set.union(*pairs.values())) == sum(map(len, pairs.values())) == 1_631 * 12
    assert emoji["train"] == emoji["test"]
    assert not emoji["train"] & emoji["unseen"]
    held_out = np.bincount(splits["test"].pairs[:, 1].numpy())
    assert held_out.max() - held_out.min() <= 1


def test_captions_name_the_emoji_and_the_background(splits):
    data = splits["unseen"]
    names = [entry["name"] for entry in data.entries]
    for (index, colour), captions in zip(data.pairs.tolist(), data.captions, strict=True):
        assert len(set(captions)) == 4
        assert all(names[index] in caption and data.backgrounds[colour] in caption for caption in captions)
    assert len(set(names)) == len(names)
    (row,) = ((data.pairs[:, 0] == names.index("pizza")) & (data.pairs[:, 1] == 6)).nonzero()
    assert data.captions[int(row)] == (
        "a pizza on a pale blue background",
        "pizza, pale blue background",
        "an emoji of a pizza on pale blue",
        "pizza, food and drink, on a pale blue background",
    )


def test_emoji_are_composed_on_their_background(splits):
    data = splits["train"]
    index, colour = data.pairs[100].tolist()
    image = data[100][0].double()
    rgba, background = data.rgba[index].double(), data.colours[colour].double()[:, None, None]
    exact = background + (rgba[:3] - background) * rgba[3] / 255
    assert (image - exact).abs().max() <= 0.5
    assert (data.rgba[:, :3] * (data.rgba[:, 3:] == 0)).max() == 0


def test_composition_of_opaque_and_transparent_pixels():
    rgba = torch.tensor([[[[9, 9]], [[8, 8]], [[7, 7]], [[255, 0]]]], dtype=torch.uint8)
    composed = compose(rgba, torch.tensor([[200, 0, 255]], dtype=torch.uint8))
    assert composed[0, :, 0].T.tolist() == [[9, 8, 7], [200, 0, 255]]


def test_two_loads_are_equal_and_splits_differ(splits):
    again = load_dataset("emoji", split="test")
    assert torch.equal(again.__getitems__(range(50)).images, splits["test"].__getitems__(range(50)).images)
    assert again.fingerprint() == splits["test"].fingerprint()
    assert len({data.fingerprint() for data in splits.values()}) == 3
    assert load_dataset("emoji", size=32, split="test").fingerprint() != again.fingerprint()


def test_size_and_channels(splits):
    data = load_dataset("emoji", split="unseen", size=16, channels=1)
    assert data.shape == (1, 16, 16)
    whole = Image.fromarray(splits["unseen"][5][0].permute(1, 2, 0).numpy())
    expected = np.asarray(whole.convert("L").resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(data[5][0][0].numpy(), expected)


def test_another_split_is_refused():
    with pytest.raises(InputError, match="emoji has no split 'validation'; use one of: train, test, unseen"):
        load_dataset("emoji", split="validation")


def test_fewer_phrasings(splits):
    data = load_dataset("emoji", split="unseen", phrasings=1)
    assert list(data.captions) == [captions[:1] for captions in splits["unseen"].captions]
    for phrasings in (0, 5):
        with pytest.raises(InputError, match=f"data.phrasings is {phrasings}; emoji have 1 to 4 captions each"):
            load_dataset("emoji", phrasings=phrasings)


def test_the_files_are_a_picture_and_text():
    assert (FOLDER / "emoji.webp").stat().st_size + (FOLDER / "emoji.json").stat().st_size < 6_000_000
    with Image.open(FOLDER / "emoji.webp") as atlas:
        assert (atlas.format, atlas.mode) == ("WEBP", "RGBA")
    assert len(json.loads((FOLDER / "emoji.json").read_text(encoding="utf-8"))["emoji"]) == 1_631


def add(archive, name, data):
    entry = tarfile.TarInfo(f"package/{name}")
    entry.size = len(data)
    archive.addfile(entry, BytesIO(data))


@pytest.fixture
def packages(tmp_path):
    """The archives of eighty emoji, with a flag and a duplicate."""
    generator = np.random.default_rng(0)
    pictures = generator.integers(1, 256, (81, 64, 64, 4), dtype=np.uint8)
    pictures[80] = pictures[79]
    listed, titles = [], {}
    with tarfile.open(tmp_path / "images.tgz", "w:gz") as archive:
        for index, picture in enumerate(pictures):
            category = "Flags" if index == 0 else "Animals & Nature"
            emoji = {"unified": f"1F{index:03X}-FE0F", "image": f"{index}.png", "sort_order": index}
            listed.append({**emoji, "category": category, "has_img_google": True})
            titles[f"1f{index:03x}"] = f"odd-thing-{index}"
            data = BytesIO()
            Image.fromarray(picture).save(data, "PNG")
            add(archive, f"img/google/64/{index}.png", data.getvalue())
        add(archive, "emoji.json", json.dumps(listed[::-1]).encode())
    with tarfile.open(tmp_path / "names.tgz", "w:gz") as archive:
        add(archive, "chars.json", json.dumps(titles).encode())
    return tmp_path, pictures


def test_make_emoji_is_lossless_and_deterministic(packages):
    folder, pictures = packages
    for output in ("a", "b"):
        (folder / output).mkdir()
        command = [sys.executable, ROOT / "scripts/make_emoji.py", "--images", folder / "images.tgz"]
        command += ["--names", folder / "names.tgz", "--output", folder / output]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True)
    assert (folder / "a/emoji.webp").read_bytes() == (folder / "b/emoji.webp").read_bytes()
    assert (folder / "a/emoji.json").read_bytes() == (folder / "b/emoji.json").read_bytes()
    entries = json.loads((folder / "a/emoji.json").read_text(encoding="utf-8"))["emoji"]
    assert [entry["name"] for entry in entries] == [f"odd thing {index}" for index in range(1, 80)]
    assert entries[0]["phrase"] == "an odd thing 1"
    assert entries[0]["group"] == "animals and nature"
    assert sum(entry["held_out"] == "all" for entry in entries) == 64
    atlas = np.asarray(Image.open(folder / "a/emoji.webp"))
    assert np.array_equal(atlas[64:128, 64:128], pictures[1 + 49])
