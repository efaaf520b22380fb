"""A study file or a cell of somebody else's writes, deletes and locks nothing outside the study's folder."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdiff.errors import InputError
from robustdiff.files import MARKER
from robustdiff.study.plan import plan
from robustdiff.study.run import run_study
from robustdiff.study.schema import Measurement, load_study
from robustdiff.study.store import CellRecord, reproducible

STUDY = {
    "title": "A study",
    "recipe": "fashion-16-at",
    "set": {"threads": 1, "steps": 1, "batch_size": 4, "log_every": 1},
    "baseline": "plain",
    "methods": {"plain": {"set": {"adversary": "none"}}},
    "measure": {"samplers": ["ddim"], "steps": [1], "num": 8, "batch_size": 8},
}
RECIPE = {**STUDY["set"], "model": {"name": "pretrained", "path": "fashion-16"}, "output": ""}
CELL = {
    "method": "plain",
    "seed": 0,
    "sampler": "ddim",
    "steps": 1,
    "n": 8,
    "fid": 2.0,
    "fid_ci": [1.0, 3.0],
    "kid": 0.1,
    "kid_se": 0.01,
    "precision": 0.5,
    "recall": 0.5,
    "replicates": [2.0] * 200,
    "seconds": 1.0,
    "measure": {"num": 8, "batch_size": 8},
    "weights": "0",
    "noise": "philox",
    "threads": 1,
    "torch": "2",
    "device": "cpu",
    "training": {"steps": 1},
    "recipe": RECIPE,
}


def changed(keys: str, value: object) -> dict:
    """The cell with another value; keys are separated by dots."""
    cell = copy.deepcopy(CELL)
    *sections, last = keys.split(".")
    inner = cell
    for section in sections:
        inner = inner[section]
    inner[last] = value
    return cell


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with something of the user's beside the one that the command is given."""
    monkeypatch.chdir(tmp_path)
    for name in ("precious", "precious-s0", "x/precious-s0"):
        folder = tmp_path / name
        for inner in ("model", "checkpoints", ".mine.tmp"):
            (folder / inner).mkdir(parents=True)
            (folder / inner / "file").write_text("mine")
    return tmp_path


def listing(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_the_cell_that_is_changed_below_is_valid():
    assert reproducible(CELL, Path("cell.json")).method == "plain"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("method", "../precious"),
        ("method", "/tmp/precious"),
        ("method", "x/precious"),
        ("method", ".."),
        ("method", ""),
        ("method", "a\0b"),
        ("method", "a\nb"),
        ("method", "\x1b[2J"),
        ("method", "x" * 5000),
        ("method", None),
        ("method", 3),
        ("seed", "0/../../precious"),
        ("seed", "0"),
        ("seed", -1),
        ("seed", 0.0),
        ("seed", True),
        ("seed", 10**30),
        ("steps", "1"),
        ("steps", 0),
        ("steps", True),
        ("steps", 1.5),
        ("steps", 10**9),
        ("sampler", "../ddim"),
        ("sampler", ["ddim"]),
        ("threads", 0),
        ("threads", 10**9),
        ("threads", "1"),
        ("device", 3),
        ("fid", float("nan")),
        ("fid", float("inf")),
        ("fid", "2.0"),
        ("fid", 1e300),
        ("fid", None),
        ("kid", [0.1]),
        ("replicates", []),
        ("replicates", [2.0] * 199),
        ("replicates", [2.0] * 199 + [float("nan")]),
        ("replicates", "2"),
        ("measure", {"num": 10**12}),
        ("measure", {"batch_size": 10**12}),
        ("measure", {"seed": 10**30}),
        ("measure", {"weights": "a\0b"}),
        ("measure", []),
        ("recipe", {**RECIPE, "batch_size": 10**12}),
        ("recipe", {**RECIPE, "data": {"workers": 10**6}}),
        ("recipe", None),
        ("recipe", "digits"),
        ("training", {"steps": "1"}),
        ("reference", {"name": "../base", "path": "fashion-16", "data": {}, "precision": "fp32"}),
        ("reference", {"name": "base", "path": "fashion-16", "precision": "fp32"}),
        ("reference", {"name": "base"}),
        ("reference", "base"),
    ],
)
def test_a_cell_that_holds_what_no_cell_does_makes_nothing(home, robustdiff, keys, value):
    (home / "cell.json").write_text(json.dumps(changed(keys, value)))
    before = listing(home)
    outcome = robustdiff("reproduce", "cell.json", "--output", "x")
    assert outcome.code == 2
    assert "cell.json" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.err[:-1].isprintable()
    assert listing(home) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        '"cell"',
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        "\ufeff{}",
        "{}{}",
        "\0",
        "NaN",
    ],
)
def test_a_file_that_is_no_cell_is_named(home, robustdiff, text):
    (home / "cell.json").write_text(text)
    outcome = robustdiff("reproduce", "cell.json", "--output", "out")
    assert (outcome.code, len(outcome.err.strip().splitlines())) == (2, 1)
    assert "cell.json" in outcome.err
    assert not (home / "out").exists()


def test_a_large_cell_or_a_pipe_is_not_read(home, robustdiff):
    with (home / "cell.json").open("wb") as file:
        file.truncate(2**33)  # no blocks on the disk
    os.mkfifo(home / "pipe.json")
    for name in "cell.json", "pipe.json":
        outcome = robustdiff("reproduce", name, "--output", "out")
        assert (outcome.code, len(outcome.err.strip().splitlines())) == (2, 1)


def test_a_run_that_is_a_link_is_not_followed(home, robustdiff):
    (home / "cell.json").write_text(json.dumps(CELL))
    (home / "out").mkdir()
    (home / "out" / "plain-s0").symlink_to(home / "precious")
    before = listing(home / "precious")
    outcome = robustdiff("reproduce", "cell.json", "--output", "out")
    assert (outcome.code, "symbolic link" in outcome.err) == (2, True)
    assert listing(home / "precious") == before


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return load_study(path)


@pytest.mark.parametrize("part", ["cells", "locks", "mismatch", "runs", "trainings", "runs/plain-s0"])
def test_a_folder_of_a_study_that_is_a_link_is_not_followed(home, study, part):
    folder = home / "study"
    (folder / part).parent.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    (folder / part).symlink_to(home / "precious")
    before = listing(home / "precious")
    with pytest.raises(InputError, match="symbolic link"):
        run_study(study, folder)
    assert listing(home / "precious") == before


def test_a_lock_that_is_a_link_is_neither_truncated_nor_followed(home, study):
    folder = home / "study"
    (folder / "locks").mkdir(parents=True)
    (folder / MARKER).touch()
    (home / "diary").write_text("mine")
    lock = folder / "locks" / f"training {plan(study, folder)[0].name}"
    lock.symlink_to(home / "diary")
    with pytest.raises(InputError, match="not a regular file"):
        run_study(study, folder)
    lock.unlink()
    lock.symlink_to(home / "new")
    with pytest.raises(InputError, match="not a regular file"):
        run_study(study, folder)
    assert not (home / "new").exists()
    lock.unlink()
    os.link(home / "diary", lock)
    with pytest.raises(InputError, match="hard link"):
        run_study(study, folder)
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(InputError, match="not a regular file"):
        run_study(study, folder)
    assert (home / "diary").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": {"../plain": {}}}, "../plain"),
        ({"methods": {"_plain": {}}}, "a letter or digit first"),
        ({"methods": {"-plain": {}}}, "a letter or digit first"),
        ({"methods": {"\x1b[2J": {}}}, "x1b[2J"),
        ({"methods": {"x" * 200: {}}}, "150 bytes"),
        ({"methods": {"[/]": {}}}, "[/]"),
        ({"methods": {"<b>": {}}}, "<b>"),
        ({"references": {"../base": {"path": "fashion-16", "samplers": ["ddim"], "steps": [1]}}}, "../base"),
        ({"references": {"base": {"path": "a\0b", "samplers": ["ddim"], "steps": [1]}}}, "control characters"),
        ({"methods": {"plain": {"seeds": ["0/../x"]}}}, "seeds.0"),
        ({"methods": {"plain": {"seeds": [True]}}}, "seeds.0"),
        ({"methods": {"plain": {"seeds": [10**30]}}}, "seeds.0"),
        ({"methods": {"plain": {"seed_steps": {"0": [1]}}}}, "seed_steps"),
        ({"methods": {"plain": {"set": {"seed=1 #": 2}}}}, "dotted name"),
        ({"methods": {"plain": {"set": {"output.x": 2}}}}, "output is the study's own"),
        ({"methods": {"plain": {"set": {"batch_size": 10**12}}}}, "batch_size"),
        ({"methods": {"plain": {"set": {"lr": float("nan")}}}}, "lr"),
        ({"methods": {f"m{i}": {} for i in range(1000)} | {"plain": {}}}, "methods"),
        ({"methods": {"plain": {"seeds": list(range(5000))}}, "measure": {"steps": list(range(1, 30))}}, "cells"),
        ({"measure": {"num": 10**12}}, "measure.num"),
        ({"measure": {"steps": [10**9]}}, "measure.steps"),
        ({"measure": {"steps": ["5"]}}, "measure.steps"),
        ({"measure": {"data": {"workers": 10**9}}}, "measure.data.workers"),
        ({"measure": {"weights": [1]}}, "measure.weights"),
        ({"title": 3}, "title"),
        ({"title": "x" * 100_000}, "title"),
        ({"recipe": "x" * 4000 + ".yaml"}, "no recipe file"),
        ({"recipe": ["digits"]}, "recipe"),
        ({"set": {"process.T": 10**9}}, "process.T"),
        ({"set": []}, "set"),
    ],
)
def test_a_study_that_holds_what_no_study_does_makes_nothing(tmp_path, robustdiff, change, words):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **change}))
    outcome = robustdiff("study", path, "--output", tmp_path / "out")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.err[:-1].isprintable()
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_letters_that_are_not_ascii_may_be_in_names(tmp_path):
    path = tmp_path / "study.yaml"
    methods = {name: {"set": {"adversary": "none"}} for name in ("plain", "α0.3+ü_1.5", "方法")}
    path.write_text(yaml.safe_dump({**STUDY, "methods": methods}))
    runs = plan(load_study(path), tmp_path / "方 \U0001f600")
    assert [run.method for run in runs] == sorted(methods, key=list(load_study(path).methods).index)
    assert runs[0].recipe.output == str(tmp_path / "方 \U0001f600" / "runs" / runs[0].name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*CELL, *(f"measure.{name}" for name in Measurement.model_fields), "recipe.data", "training.steps", "reference"]


@settings(max_examples=200, deadline=None)
@given(keys=st.sampled_from(KEYS), value=JSON)
def test_any_value_in_a_cell_is_valid_or_named(keys, value):
    try:
        cell = reproducible(changed(keys, value), Path("cell.json"))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(cell, CellRecord)
        assert json.dumps(cell.model_dump(mode="json"), allow_nan=False)
