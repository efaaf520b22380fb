"""Files of prompts, the captions of existing images, and the real images that captions of COCO name."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.data import ArrayDataset, load_dataset
from robustdiff.errors import InputError
from robustdiff.evaluation.prompts import Prompts, load_prompts, prompts_of
from robustdiff.evaluation.real_images import load_target
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.recipe import load_data_config


def coco(images: int = 4, captions: int = 2) -> dict[str, Any]:
    """Return captions of COCO, whose annotations are not in the order of the images."""
    return {
        "info": {"year": 2014},
        "images": [{"id": i, "file_name": f"{i}.png", "height": 8} for i in range(images)],
        "annotations": [
            {"image_id": i, "id": 10 * i + k, "caption": f" caption {k} of {i}\n"}
            for k in range(captions)
            for i in reversed(range(images))
        ],
    }


def write(path: Path, contents: Any) -> Path:
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of six images, in which pixel values are the number of the image."""
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "contents",
    [
        "a red shoe\n a blue shoe \nÄpfel",
        "a red shoe\r\na blue shoe\r\nÄpfel\r\n",
        "\ufeffa red shoe\na blue shoe\nÄpfel\n",
    ],
)
def test_a_text_file_has_a_prompt_in_each_line(tmp_path, contents):
    path = write(tmp_path / "p.txt", contents.encode())
    assert load_prompts(path).texts == ("a red shoe", "a blue shoe", "Äpfel")


def test_a_line_is_ended_by_a_line_feed_alone(tmp_path):
    assert load_prompts(write(tmp_path / "p.txt", "a\x0bb\u2028c\nd\n")).texts == ("a\x0bb\u2028c", "d")


def test_coco_has_the_first_caption_of_each_image(tmp_path):
    prompts = load_prompts(write(tmp_path / "c.json", coco(3)))
    assert prompts.texts == ("caption 0 of 2", "caption 0 of 1", "caption 0 of 0")
    assert prompts.files == {f"{i}.png": f"caption 0 of {i}" for i in range(3)}


def test_coco_may_have_no_images_and_images_no_captions(tmp_path):
    alone = coco(3)
    del alone["images"]
    assert load_prompts(write(tmp_path / "a.json", alone)).files == {}
    more = {**coco(3), "images": coco(4)["images"]}
    prompts = load_prompts(write(tmp_path / "b.json", more))
    assert (len(prompts.texts), prompts.files["3.png"]) == (3, None)


def test_the_record_tells_prompts_apart(tmp_path):
    one, other = Prompts("p.txt", ("a", "b")), Prompts("p.txt", ("a\nb",))
    assert one.record["n"] == 2
    assert one.record["sha256"] != other.record["sha256"]


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("p.csv", "a", ["p.csv", "give a .txt"]),
        ("p.jsonl", "{}", ["give a .txt"]),
        ("missing.txt", None, ["missing.txt", "No such file"]),
        ("p.txt", "", ["p.txt is empty"]),
        ("p.txt", "a\n\nb\n", ["p.txt, line 2 is empty"]),
        ("p.txt", "a\n \t\n", ["p.txt, line 2 is empty"]),
        ("p.txt", b"a\n\xff\n", ["p.txt, line 2 is not UTF-8"]),
        ("c.json", "{", ["c.json", "JSON"]),
        ("c.json", "[" * 100_000, ["c.json", "JSON"]),
        ("c.json", ["a"], ["no list of annotations"]),
        ("c.json", {"annotations": 7}, ["no list of annotations"]),
        ("c.json", {"annotations": []}, ["no annotations"]),
        ("c.json", {"annotations": ["a"]}, ["annotations[0]", "not an object"]),
        ("c.json", {"annotations": [{"caption": "a"}]}, ["annotations[0]", "image_id null"]),
        ("c.json", {"annotations": [{"image_id": [1], "caption": "a"}]}, ["annotations[0]", "image_id [1]"]),
        ("c.json", {"annotations": [{"image_id": True, "caption": "a"}]}, ["image_id true"]),
        ("c.json", {"annotations": [{"image_id": 1}]}, ["annotations[0]", "caption null"]),
        ("c.json", {"annotations": [{"image_id": 1, "caption": " "}]}, ['caption " "']),
        ("c.json", {"annotations": [{"image_id": 1, "caption": ["a"]}]}, ['caption ["a"]']),
        ("c.json", {"annotations": [{"image_id": 1, "caption": "\ud800"}]}, ["not Unicode"]),
        ("c.json", {**coco(), "images": 7}, ["images is 7, not a list"]),
        ("c.json", {**coco(), "images": [{"id": 1}]}, ["images[0]", "file_name null"]),
        ("c.json", {**coco(), "images": [{"file_name": "a"}]}, ["images[0]", "id null"]),
        ("c.json", {**coco(), "images": coco(3)["images"]}, ["annotations[0]", "image 3", "not among the images"]),
        ("c.json", {**coco(), "images": [*coco()["images"], {"id": 0, "file_name": "x"}]}, ["images[4]", "another"]),
        ("c.json", {**coco(), "images": [*coco()["images"], {"id": 9, "file_name": "0.png"}]}, ["images[4]"]),
    ],
)
def test_files_that_hold_no_prompts_are_one_line(tmp_path, name, contents, words):
    if contents is not None:
        write(tmp_path / name, contents)
    with pytest.raises(InputError) as error:
        load_prompts(tmp_path / name)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_folder_is_no_file_of_prompts(tmp_path):
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        load_prompts(tmp_path / "p.txt")


def test_existing_images_have_prompts_in_turn(folder):
    prompts = Prompts("p.txt", ("a", "b", "c", "d"))
    assert prompts.of(load_dataset("imagefolder", root=folder)) == ["a", "b", "c", "d", "a", "b"]
    assert prompts.of(ArrayDataset("x", np.zeros((5, 8, 8, 1), np.uint8))) == ["a", "b", "c", "d", "a"]
    (folder / "5.png").rename(folder / "10.png")
    (folder / "1.png").rename(folder / "999.png")
    dataset = load_dataset("imagefolder", root=folder)
    assert [path.name for path in dataset.paths] == ["0.png", "10.png", "2.png", "3.png", "4.png", "999.png"]
    assert prompts.of(dataset) == ["a", "a", "b", "c", "d", "b"]  # by the numbers: 0, 2, 3, 4, 10, 999
    (folder / "4.png").rename(folder / "b.png")
    assert prompts.of(load_dataset("imagefolder", root=folder)) == ["a", "b", "c", "d", "a", "b"]


def test_existing_images_that_coco_names_have_their_own_captions(folder, tmp_path):
    prompts = load_prompts(write(tmp_path / "c.json", coco(6)))
    dataset = load_dataset("imagefolder", root=folder)
    assert prompts.of(dataset) == [f"caption 0 of {i}" for i in range(6)]
    fewer = load_prompts(write(tmp_path / "d.json", coco(4)))
    with pytest.raises(InputError, match=r"4\.png: .*d\.json has no caption of it"):
        fewer.of(dataset)
    others = coco(4)
    for image in others["images"]:
        image["file_name"] = f"photos/{image['file_name'].replace('.png', '.jpg')}"
    assert load_prompts(write(tmp_path / "e.json", others)).of(dataset)[:2] == ["caption 0 of 3", "caption 0 of 2"]
    for image in others["images"]:
        image["file_name"] = image["file_name"].replace(".jpg", ".png")
    for i in (4, 5):
        (folder / f"{i}.png").unlink()
    named = load_prompts(write(tmp_path / "f.json", others)).of(load_dataset("imagefolder", root=folder))
    assert named == [f"caption 0 of {i}" for i in range(4)]


def test_captions_of_a_dataset_are_prompts(folder):
    assert prompts_of(None) is None
    assert prompts_of(load_dataset("imagefolder", root=folder)) is None
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"the {i}")
    found = prompts_of(load_dataset("imagefolder", root=folder))
    assert found is not None
    assert (found.texts, found.files) == (tuple(f"the {i}" for i in fixed_order(6)), {})


def test_the_first_captions_of_a_dataset_are_of_all_of_it(folder):
    """Take captions of all subfolders first, whose files are in order one after the other."""
    subfolder = [f"{name}" for name in "abcd" for _ in range(100)]
    prompts = prompts_of(ArrayDataset("x", np.zeros((400, 2, 2, 1), np.uint8), captions=[[name] for name in subfolder]))
    assert prompts is not None
    assert sorted(prompts.texts) == subfolder
    counts = Counter(prompts.texts[:100])
    assert all(10 < counts[name] < 40 for name in "abcd"), counts


def test_the_real_images_are_those_that_coco_names(folder, tmp_path):
    value = coco(6, 1)
    value["images"] = [image for image in value["images"] if image["id"] in (1, 3, 4, 5)]
    value["annotations"] = value["annotations"][:1]
    prompts = load_prompts(write(tmp_path / "c.json", value))
    config = load_data_config("fashion-16", [], "imagefolder", str(folder))
    target = load_target(config, None, None, torch.device("cpu"), prompts, compare=False)
    assert target.dataset is not None
    assert (len(target.dataset), target.extractor) == (4, None)
    batch = target.dataset.__getitems__([0, 3, 1])
    assert batch.images[:, 0, 0, 0].tolist() == [1, 5, 3]
    whole, chosen = config.load().contents(), target.dataset.contents()
    assert chosen != whole
    # The same images as a tar, whose names are its members'.
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, ".")
    tars = load_data_config("fashion-16", [], "webdataset", str(tmp_path / "a.tar"))
    target = load_target(tars, None, None, torch.device("cpu"), prompts, compare=False)
    assert target.dataset is not None
    assert target.dataset.__getitems__([0, 3, 1]).images[:, 0, 0, 0].tolist() == [1, 5, 3]
    shutil.copy(tmp_path / "a.tar", tmp_path / "b.tar")
    twice = load_data_config("fashion-16", [], "webdataset", str(tmp_path / "{a,b}.tar"))
    with pytest.raises(InputError, match=r"has \d\.png more than once, which .*c\.json names"):
        load_target(twice, None, None, torch.device("cpu"), prompts, compare=False)
    (folder / "4.png").unlink()
    with pytest.raises(InputError, match=r"names 1 images that .*photos does not have, such as 4\.png"):
        load_target(config, None, None, torch.device("cpu"), prompts, compare=False)
    with pytest.raises(InputError, match="which digits has no names of"):
        load_target(load_data_config("digits", []), None, None, torch.device("cpu"), prompts, compare=False)
