"""Images that are there already: told from models, and counted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from robustdiff.data import ArrayDataset
from robustdiff.errors import InputError
from robustdiff.evaluation.images import check_size, load_images, number_of_images


@pytest.fixture
def folder(tmp_path):
    """A folder of five grey images, with class folders whose names are those of parts of a pipeline."""
    for i in range(5):
        path = tmp_path / "pictures" / ("model" if i % 2 else "unet") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6), i, np.uint8)).save(path)
    return tmp_path / "pictures"


def test_a_folder_of_images_is_read(folder):
    dataset = load_images(str(folder))
    assert (len(dataset), dataset.shape) == (5, (1, 6, 6))


def test_runs_and_names_of_models_are_no_images(digits_run, tmp_path, monkeypatch):
    (tmp_path / "fashion-16").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora" / "model").mkdir(parents=True)
    (tmp_path / "lora" / "model" / "adapter.json").write_text("{}")
    pipelines = [str(digits_run), str(digits_run / "model"), "lora", "lora/model"]
    for source in (*pipelines, "fashion-16", "unfinished", "nothing"):
        assert load_images(source) is None
    with pytest.raises(InputError, match="no images"):
        load_images("./fashion-16")


def test_a_file_is_read_by_its_suffix(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 6, 5, 3), np.uint8))
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    assert load_images(str(tmp_path / "A.NPZ")).shape == (3, 6, 5)


def test_a_size_that_no_setting_gives_is_said_so():
    dataset = ArrayDataset("a", np.zeros((4, 6, 5, 3), np.uint8))
    check_size(dataset, (3, 6, 5))
    with pytest.raises(InputError, match="a: images of 3×6×5, the real ones are 3×6×6; give real images of that size"):
        check_size(dataset, (3, 6, 6))


@pytest.mark.parametrize(("num", "expected"), [(None, 6), (4, 4), (6, 6)])
def test_all_images_or_the_first(num, expected):
    assert number_of_images(ArrayDataset("a", np.zeros((6, 2, 2, 1), np.uint8)), num) == expected
