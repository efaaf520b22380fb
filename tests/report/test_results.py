"""A grid as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from robustdiff.errors import InputError
from robustdiff.evaluation.grid import Cell, Difference, Grid
from robustdiff.report.results import claim_results, write_results


def cell(name, sampler, steps):
    return Cell(name, sampler, steps, 40, {"fid": 2.0, "kid": 0.1, "kid_se": 0.01}, {"fid": (1.0, 3.0)}, {}, 1.0)


def test_a_grid_becomes_figures_and_a_record(tmp_path):
    cells = [cell(name, sampler, n) for sampler in ("ddim", "dpm++") for n in (5, 10) for name in ("a", "b")]
    samples = {(c.checkpoint, c.sampler, c.steps): torch.zeros(8, 1, 4, 4, dtype=torch.uint8) for c in cells}
    difference = Difference("b", "a", "ddim", 5, "fid", 0.5, (0.1, 0.9), 0.25, (0.0, 0.5))
    beside = [cell("teacher", "multistep", 2)]
    folder = tmp_path / "new"
    record = write_results(folder, Grid(cells, [difference], samples), "title", {"seed": 3}, beside)
    names = ["fid.png", "result.json", "samples-ddim.png", "samples-dpmpp.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    written = json.loads((folder / "result.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert written["seed"] == 3
    assert [c["fid"] for c in written["cells"]] == [2.0] * 8, "what is beside is no cell of the grid"
    assert list(written["cells"][0]) == [
        "checkpoint", "sampler", "steps", "n", "fid", "fid_ci", "kid", "kid_se", "seconds",
    ]  # fmt: skip
    assert written["differences"] == [
        {
            **{"checkpoint": "b", "baseline": "a", "sampler": "ddim", "steps": 5},
            **{"fid": 0.5, "fid_ci": [0.1, 0.9], "relative": 0.25, "relative_ci": [0.0, 0.5]},
        }
    ]


def test_each_number_with_intervals_has_a_figure(tmp_path):
    cells = [Cell("a", "ddim", 5, 40, {"fid": 2.0, "x": -1.0, "y": 0.0}, {"fid": (1, 3), "x": (-2, 0)}, {}, 1.0)]
    write_results(
        tmp_path, Grid(cells, [], {("a", "ddim", 5): torch.zeros(8, 1, 4, 4, dtype=torch.uint8)}), "title", {}
    )
    assert {path.stem for path in tmp_path.glob("*.png")} == {"fid", "x", "samples-ddim"}


def test_samples_of_captions_stand_beside_them(tmp_path, recwarn):
    captions = ["a red shoe", "a very long caption " * 20, "数学 😀", r"$\frac$ _x", *"efghijkl"]
    samples = {(name, "lcm", n): torch.zeros(12, 3, 4, 4, dtype=torch.uint8) for name in ("a", "b") for n in (1, 4)}
    cells = [Cell(name, "lcm", n, 12, {"x": 1.0}, {}, {}, 1.0, guidance=3.0) for name in ("a", "b") for n in (1, 4)]
    record = write_results(tmp_path, Grid(cells, [], samples, captions), "title", {})
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "samples-lcm.png"}
    assert [cell["guidance"] for cell in record["cells"]] == [3.0] * 4
    assert not recwarn.list, "characters that the font lacks are no warnings"
    with Image.open(tmp_path / "samples-lcm.png") as image:
        assert image.height > image.width, "eight rows, and four columns beside the captions"
    fewer = {cell: images[:3] for cell, images in samples.items()}  # as one of several processes has them
    write_results(tmp_path, Grid(cells, [], fewer, captions), "title", {})
    with Image.open(tmp_path / "samples-lcm.png") as image:
        assert image.height < image.width


def test_a_folder_is_checked_before_anything_is_computed_for_it(tmp_path, monkeypatch):
    claim_results(tmp_path / "a" / "new" / "result.json", [])
    assert not (tmp_path / "a").exists(), "a call that is refused later leaves nothing"
    (tmp_path / "a" / "new").mkdir(parents=True)
    claim_results(tmp_path / "a" / "new" / "result.json", [tmp_path / "b"])
    monkeypatch.chdir(tmp_path)
    claim_results(Path("c/d") / "result.json", [])
    (tmp_path / "a" / "new" / "result.json").write_text("{}")
    with pytest.raises(InputError, match=r"new holds results already \(result\.json\): give another --output"):
        claim_results(tmp_path / "a" / "new" / "result.json", [])
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(InputError, match="file is no folder: give another --output"):
            claim_results(folder / "result.json", [])
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="cannot be written to: give another --output"):
        claim_results(tmp_path / "b" / "result.json", [])
    monkeypatch.undo()
    for folder in (tmp_path / "a", tmp_path / "a" / "deep" / "er"):
        with pytest.raises(InputError, match="which is read: choose another --output"):
            claim_results(folder / "other.json", [tmp_path / "a"])
    assert not (tmp_path / "a" / "deep").exists()
