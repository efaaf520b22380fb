"""A stranger's run: its recipe has nothing fetched, no disk searched, and nothing read without a word."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COMMANDS = {
    "evaluate": ["--num", "4", "--steps", "1", "--features", "digits"],
    "mismatch": ["--num", "4", "--steps", "2", "--probes", "0"],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Fail on any connection."""
    tried: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits_run, tmp_path / "stranger")
    return tmp_path / "stranger"


def set_data(run: Path, data: str) -> None:
    lines = (run / "recipe.yaml").read_text().splitlines()
    start = lines.index("data:")
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" "))
    (run / "recipe.yaml").write_text("\n".join([*lines[:start], f"data: {data}", *lines[end:]]) + "\n")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["hf:someone/dataset", "hf:https://127.0.0.1:9/x", "hf:s3://bucket/x", "hf:mnist"])
def test_nothing_is_fetched_because_a_recipe_says_so(robustdiff, run, offline, command, name):
    set_data(run, f"{{name: '{name}'}}")
    outcome = robustdiff(command, run, *COMMANDS[command], "--cpu", "--output", run.parent / "out")
    assert outcome.code == 2
    assert f"add --data {name}" in outcome.err
    assert outcome.err.count("\n") == 1
    assert offline == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("named", [[], ["--data", "webdataset"]])
def test_no_tar_is_fetched_because_a_recipe_says_so(robustdiff, run, offline, command, named):
    set_data(run, "{name: webdataset, root: 'http://127.0.0.1:9/{00..99}.tar?key=1'}")
    outcome = robustdiff(command, run, *COMMANDS[command], "--cpu", *named, "--output", run.parent / "out")
    assert outcome.code == 2
    assert (
        "names the data http://127.0.0.1:9/{00..99}.tar, which is fetched from the network: add --root" in outcome.err
    )
    assert outcome.err.count("\n") == 1
    assert offline == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("root", ["/", "above", "here"])
def test_no_disk_is_searched_because_a_recipe_says_so(robustdiff, run, monkeypatch, command, root):
    (run.parent / "deep").mkdir()
    monkeypatch.chdir(run.parent / "deep")
    root = {"above": str(run.parent), "here": str(run.parent / "deep")}.get(root, root)
    set_data(run, f"{{name: imagefolder, root: '{root}'}}")
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("a folder was listed"))
    outcome = robustdiff(command, run, *COMMANDS[command], "--cpu")
    assert outcome.code == 2
    assert f"add --root {root} if" in outcome.err


@pytest.mark.parametrize("pattern", ["*.tar", "{a,b}.tar", "*/*.tar", "a[0-9]/?.tar"])
def test_a_pattern_of_tar_files_is_as_its_folder(robustdiff, run, monkeypatch, pattern):
    (run.parent / "deep").mkdir()
    monkeypatch.chdir(run.parent / "deep")
    set_data(run, f"{{name: webdataset, root: '{run.parent}/{pattern}'}}")
    outcome = robustdiff("evaluate", run, *COMMANDS["evaluate"], "--cpu")
    assert outcome.code == 2
    assert f"add --root {run.parent} if" in outcome.err
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{run.parent}/{pattern}", f"{run}/{pattern}"))
    outcome = robustdiff("evaluate", run, *COMMANDS["evaluate"], "--cpu")
    assert f"names the data: reading {run}" in outcome.err
    assert "no such file" in outcome.err


def test_what_a_recipe_has_read_is_said_first(robustdiff, run):
    images = run.parent / "images"
    images.mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(images / f"{i}.png")
    set_data(run, f"{{name: imagefolder, root: '{images}'}}")
    outcome = robustdiff("evaluate", run, *COMMANDS["evaluate"], "--cpu")
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines()[0] == f"{run / 'recipe.yaml'} names the data: reading {images}"
    asked = robustdiff("evaluate", run, *COMMANDS["evaluate"], "--cpu", "--root", images)
    assert asked.code == 0
    assert "names the data" not in asked.err


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "x/" * 3000, "\udcff", "a\x1b[2Jb"])
@pytest.mark.parametrize("command", ["evaluate", "sample", "solver-error", "search-times"])
def test_impossible_names_are_one_line(robustdiff, tmp_path, monkeypatch, path, command):
    monkeypatch.chdir(tmp_path)
    outcome = robustdiff(command, path, "--cpu")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "\x1b" not in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("root", ["a\\0b", "/dev/zero", "\\ud800", "x" * 5000, "*" * 300 + "\\0{"])
@pytest.mark.parametrize("name", ["imagefolder", "npz", "fashion-mnist", "webdataset"])
def test_impossible_roots_in_a_recipe_are_one_line(robustdiff, run, name, root):
    set_data(run, f'{{name: {name}, root: "{root}"}}')
    outcome = robustdiff("evaluate", run, *COMMANDS["evaluate"], "--cpu")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert len([line for line in outcome.err.splitlines() if line.startswith("robustdiff: ")]) == 1
