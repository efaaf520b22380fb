"""The demonstration, at a size of seconds: equal updates, equal batches, everything that it promises on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from robustdiff import demo
from robustdiff.data import load_dataset
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import evaluate_grid
from robustdiff.files import claim_folder
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.metric import MetricCollection
from robustdiff.metrics.reference import reference_statistics
from robustdiff.recipe import load_recipe
from robustdiff.study.plan import plan, reference_cells
from robustdiff.study.schema import Study
from robustdiff.training.run import train


def shrunk(study: Study, updates: int, images: int, steps: tuple[int, ...], **changes: Any) -> Study:
    """A demonstration of seconds."""
    measure = study.measure.model_copy(update={"num": images, "steps": steps})
    return study.model_copy(update={"set": {**study.set, "steps": updates, **changes}, "measure": measure})


SMALL = shrunk(demo.demo_study("demo"), 6, 20, (1, 2), lr_schedule="constant", batch_size=16)
"""At a constant rate, so that a larger one can go on from it."""


class Percentages(list):
    """The percentages that are said to be done."""

    def begin(self, description, total):
        assert total == 100

    def advance(self, amount, note=""):
        self.append(amount + (self[-1] if self else 0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], list[float]]]:
    """The folder, the record and the percentages of a small demonstration."""
    folder = tmp_path_factory.mktemp("demo")
    reference_statistics(load_dataset("fashion-16"), load_extractor("fashion-16"))  # cached, or both would compute them
    percentages = Percentages()
    result = demo.run_demo(SMALL, folder, processes=2, progress=percentages)
    assert result is not None
    return folder, result[1], percentages


def cells_of(folder: Path) -> dict[str, Any]:
    """All that the files of the cells hold, but for the seconds."""
    return {path.name: {**json.loads(path.read_text()), "seconds": 0} for path in (folder / "cells").glob("*.json")}


def written(folder: Path) -> dict[Path, int]:
    """When each file of a training or a cell was written."""
    return {
        p: p.stat().st_mtime_ns for p in [*folder.glob("cells/*.json"), *folder.glob("runs/*/model/unet/*.safetensors")]
    }


def test_it_fine_tunes_three_ways_and_compares(finished):
    folder, record, percentages = finished
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(record))
    assert len(record["cells"]) == 3 * 3 * 2
    assert {p.name for p in folder.iterdir()} == {
        *(".robustdiff", "cells", "locks", "mismatch", "runs", "trainings"),
        *("fid.png", "result.json", "samples-ddim.png", "samples-dpmpp.png", "samples-iddpm.png", "study.yaml"),
    }
    training = record["training"]
    assert list(training) == ["plain", "random", "free AT"]
    assert {t["steps"] for t in training.values()} == {6}
    assert {t["backward_passes"] for t in training.values()} == {6}
    assert [t["batches"] for t in training.values()] == [6, 2, 2]
    recipes = [dict(t["recipe"], adversary=None, output=None) for t in training.values()]
    assert recipes[0] == recipes[1] == recipes[2], "they differ in nothing but the adversary"
    assert percentages == sorted(percentages)
    assert percentages[-1] == pytest.approx(100)
    assert record["obtained_on"]["threads"] == 2


def test_the_control_has_the_size_of_adversarial_training(finished):
    sizes = {name: t["delta_norm"] for name, t in finished[1]["training"].items()}
    assert sizes["plain"] == 0
    assert sizes["random"] == pytest.approx(sizes["free AT"], rel=0.05)


def test_the_command_prints_the_table_and_does_not_train_again(robustdiff, finished, monkeypatch):
    folder, record, _ = finished
    monkeypatch.setattr(demo, "demo_study", lambda name, full, seed: SMALL)
    before = written(folder)
    outcome = robustdiff("demo", "--output", folder)
    assert outcome.code == 0, outcome.err
    assert written(folder) == before
    for word in ("plain", "random", "vs plain", "free AT", "ddim", "iddpm", "dpm++"):
        assert word in outcome.out
    for cell in record["cells"]:
        assert f" {cell['fid']:.2f} " in outcome.out


def test_its_study_is_one_for_the_study_command(robustdiff, finished, tmp_path):
    folder = finished[0]
    outcome = robustdiff("study", folder / "study.yaml", "--output", folder, "--report", tmp_path / "page.md")
    assert outcome.code == 0, outcome.err
    assert "| free AT vs plain |" in (tmp_path / "page.md").read_text()


def test_the_sizes_of_the_command():
    quick, full = (demo.demo_study("demo", full, seed=3) for full in (False, True))
    assert [(s.set["steps"], s.measure.num) for s in (quick, full)] == [(300, 500), (1200, 5000)]
    assert {run.seed for run in plan(quick, Path())} == {quick.measure.seed} == {3}
    assert demo.demo_study("demo-consistency", True).set["steps"] == 6000


def test_another_size_in_the_same_folder_is_an_error(finished):
    folder, *_ = finished
    other = SMALL.measure.model_copy(update={"seed": 1})
    with pytest.raises(InputError, match="another seed: choose another --output"):
        demo.run_demo(SMALL.model_copy(update={"measure": other}), folder)
    with pytest.raises(InputError, match="another steps"):
        demo.run_demo(shrunk(SMALL, 3, 20, (1, 2)), folder)


def test_a_larger_one_does_not_go_on_where_the_rate_falls_to_0(tmp_path):
    demo._claim(demo.demo_study("demo"), tmp_path)
    with pytest.raises(InputError, match="another steps: choose another --output"):
        demo._claim(demo.demo_study("demo", full=True), tmp_path)


def test_interrupted_it_goes_on_with_what_is_missing_in_any_number_of_processes(finished, tmp_path, request):
    folder = tmp_path / "demo"
    shutil.copytree(finished[0], folder)
    expected = cells_of(folder)
    missing = [*folder.glob("cells/plain-*-2.json"), *folder.glob("cells/random-s0-d*-2.json")]
    for path in [*missing, folder / "result.json"]:
        path.unlink()
    before = written(folder)

    class StopAmidTheCells(Percentages):
        def advance(self, amount, note=""):
            super().advance(amount, note)
            if self[-1] > 30 and self[-1] - amount <= 30:
                os.kill(os.getpid(), signal.SIGINT)

    assert demo.run_demo(SMALL, folder, processes=1, progress=StopAmidTheCells()) is None
    assert not (folder / "result.json").exists()
    assert not list(folder.rglob("*.tmp"))
    assert 1 <= sum(path.exists() for path in missing) < len(missing)
    request.getfixturevalue("in_this_process")
    result = demo.run_demo(SMALL, folder, processes=1)
    assert result is not None
    assert cells_of(folder) == expected
    assert {path: written(folder)[path] for path in before} == before
    assert result[1]["differences"] == finished[1]["differences"]


@pytest.mark.usefixtures("in_this_process")
def test_a_larger_one_goes_on_from_a_smaller_one(finished, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(finished[0], folder)
    result = demo.run_demo(shrunk(SMALL, 9, 24, (1, 2)), folder, processes=2)
    assert result is not None
    assert {t["steps"] for t in result[1]["training"].values()} == {9}
    assert {cell["n"] for cell in result[1]["cells"]} == {24}


def test_a_larger_one_measures_its_references_again(tmp_path):
    small = demo.demo_study("demo-text")
    demo._claim(small, tmp_path)
    cells = reference_cells(small, tmp_path)
    assert cells
    for cell in cells:
        cell.path.parent.mkdir(exist_ok=True)
        cell.path.write_text("{}")
    demo._claim(demo.demo_study("demo-text", full=True), tmp_path)
    assert not [cell for cell in cells if cell.done]


def test_the_differences_are_those_of_the_grid(finished):
    """Paired over the same images, as evaluate_grid has them."""
    folder = finished[0]
    names = {"plain": "plain-s0", "free AT": "free AT-s0"}
    generators = {
        name: Generator.load(folder / "runs" / run, precision=load_recipe("fashion-16-at").precision, batch_size=64)
        for name, run in names.items()
    }
    extractor = load_extractor("fashion-16")
    reference = reference_statistics(load_dataset("fashion-16"), extractor)
    grid = evaluate_grid(generators, ["iddpm"], [2], 20, MetricCollection(None, extractor, reference), Accelerator())
    (expected,) = [d.record() for d in grid.differences]
    (got,) = [
        d
        for d in finished[1]["differences"]
        if (d["checkpoint"], d["baseline"], d["sampler"], d["steps"]) == ("free AT", "plain", "iddpm", 2)
    ]
    assert got["fid"] == pytest.approx(expected["fid"])
    assert got["fid_ci"] == pytest.approx(expected["fid_ci"])
    assert got["relative_ci"] == pytest.approx(expected["relative_ci"])
    own, _ = demo.run_demo(SMALL, folder)
    for key, images in grid.samples.items():
        assert own.samples[key].equal(images), "the pictures hold the images"


def test_it_is_started_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start robustdiff once"):
        demo.run_demo(SMALL, tmp_path)


def test_a_run_is_not_its_folder(tmp_path):
    claim_folder(tmp_path, "a run")
    for name in ("recipe.yaml", "result.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="holds a run, and not a study: choose another --output"):
        demo.run_demo(SMALL, tmp_path)
    (tmp_path / "recipe.yaml").unlink()  # killed, or a search
    with pytest.raises(InputError, match="holds a run, and not a study"):
        demo.run_demo(SMALL, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("*")}.keys() == {".robustdiff", "result.json"}


# -- consistency ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train the denoiser, of one update, that the distillations start from."""
    folder = tmp_path_factory.mktemp("student") / "edm"
    train(load_recipe("fashion-16-edm", ["steps=1", "batch_size=8", "precision=fp32", f"output={folder}"]))
    return str(folder)


@pytest.mark.usefixtures("in_this_process")
def test_it_distils_three_ways_and_compares_with_the_teacher(robustdiff, monkeypatch, student, tmp_path):
    whole = demo.demo_study

    def small(name, full, seed):
        study = shrunk(whole(name, full, seed), 3, 16, (1, 2), **{"model.path": student, "batch_size": 16})
        teacher = study.references["teacher"].model_copy(update={"steps": (2,)})
        return study.model_copy(update={"references": {"teacher": teacher}})

    monkeypatch.setattr(demo, "demo_study", small)
    folder = tmp_path / "demo"
    outcome = robustdiff("demo", "--consistency", "--output", folder)
    assert outcome.code == 0, outcome.err
    assert {"fid.png", "result.json", "samples-multistep.png"} < {p.name for p in folder.iterdir()}
    assert {p.name for p in (folder / "runs").iterdir()} == {"plain-s0", "AT (solver)-s0", "AT (student)-s0"}
    record = json.loads((folder / "result.json").read_text())
    training = record["training"]
    assert {t["steps"] for t in training.values()} == {t["backward_passes"] for t in training.values()} == {3}
    assert [t["batches"] for t in training.values()] == [3, 1, 1]
    recipes = {name: t["recipe"] for name, t in training.items()}
    assert {r["model"]["path"] for r in recipes.values()} == {student}
    assert {r["objective"]["teacher"] for r in recipes.values()} == {"fashion-16"}
    assert [r["objective"]["perturb"] for r in recipes.values()] == ["solver", "solver", "student"]
    assert [r["adversary"]["name"] for r in recipes.values()] == ["none", "free", "free"]
    assert training["plain"]["delta_norm"] == 0 < training["AT (solver)"]["delta_norm"]
    assert [(c["checkpoint"], c["sampler"], c["steps"]) for c in record["teacher"]] == [("teacher", "ddim", 2)]
    assert len(record["cells"]) == 3 * 2
    for cell in record["cells"]:
        assert f" {cell['fid']:.2f} " in outcome.out
    for cell in record["teacher"]:
        assert f"ddim 2: {cell['fid']:.2f} (" in outcome.out
    before = written(folder)
    assert robustdiff("demo", "--consistency", "--output", folder).code == 0
    assert written(folder) == before
    outcome = robustdiff("demo", "--consistency", "--output", folder, "--seed", 1)
    assert outcome.code == 2
    assert "seed" in outcome.err
