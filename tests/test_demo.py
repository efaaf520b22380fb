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
from robustdiff.metrics.features import load_extractor
from robustdiff.metrics.metric import MetricCollection
from robustdiff.metrics.reference import reference_statistics
from robustdiff.recipe import load_recipe
from robustdiff.training.trainer import train
from robustdiff.workers import Stopped


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], list[float]]]:
    """The folder, the record and the percentages of a small demonstration."""
    folder = tmp_path_factory.mktemp("demo")
    percentages: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(demo, "STEPS", (1, 2))
        result = demo.run_demo(
            folder, SMALL, processes=2, on_progress=lambda percent, note: percentages.append(percent)
        )
        assert result is not None
        yield folder, result[1], percentages


def cells_of(folder: Path) -> dict[str, Any]:
    """All that the files of the cells hold, but for the seconds."""
    cells = {path.name: json.loads(path.read_text()) for path in (folder / "cells").iterdir()}
    for cell in cells.values():
        cell["cell"].pop("seconds")
    return cells


def written(folder: Path) -> dict[Path, int]:
    """When each file of a training or a cell was written."""
    return {p: p.stat().st_mtime_ns for p in [*folder.glob("cells/*"), *folder.glob("runs/*/model/unet/*.safetensors")]}


SMALL = demo.DemoSize(updates=6, images=20)
TINY = ["model.channels=[8]", "model.groups=4", "steps=12", "batch_size=8", "log_every=1", "threads=1"]


def test_it_fine_tunes_three_ways_and_compares(finished):
    folder, record, percentages = finished
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(record))
    assert len(record["cells"]) == 3 * 3 * 2
    assert {p.name for p in folder.iterdir()} == {
        "cells", "fid.png", "result.json", "runs", "samples-ddim.png", "samples-dpmpp.png", "samples-iddpm.png",
    }  # fmt: skip
    training = record["training"]
    assert {t["steps"] for t in training.values()} == {6}
    assert {t["backward_passes"] for t in training.values()} == {6}
    assert [t["batches"] for t in training.values()] == [6, 2, 2]
    recipes = [dict(t["recipe"], adversary=None, output=None) for t in training.values()]
    assert recipes[0] == recipes[1] == recipes[2], "they differ in nothing but the adversary"
    assert percentages == sorted(percentages)
    assert percentages[-1] == 100
    assert record["obtained_on"]["threads"] == 2


def test_the_control_has_the_size_of_adversarial_training(finished):
    sizes = {name: t["delta_norm"] for name, t in finished[1]["training"].items()}
    assert sizes["plain"] == 0
    assert sizes["random"] == pytest.approx(sizes["free AT"], rel=0.05)


def test_the_command_prints_the_table_and_does_not_train_again(robustdiff, finished, monkeypatch):
    folder, record, _ = finished
    monkeypatch.setattr(demo, "QUICK", SMALL)
    before = written(folder)
    outcome = robustdiff("demo", "--output", folder)
    assert outcome.code == 0, outcome.err
    assert written(folder) == before
    for word in ("plain", "random", "free AT", "ddim", "iddpm", "dpm++"):
        assert word in outcome.out
    for cell in record["cells"]:
        assert f"{cell['fid']:.2f} ±" in outcome.out


def test_another_size_in_the_same_folder_is_an_error(finished):
    folder, *_ = finished
    with pytest.raises(InputError, match="another seed: choose another --output"):
        demo.run_demo(folder, SMALL, seed=1)
    with pytest.raises(InputError, match="another steps"):
        demo.run_demo(folder, demo.DemoSize(updates=3, images=20))


def test_interrupted_it_goes_on_with_what_is_missing_in_any_number_of_processes(finished, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(finished[0], folder)
    expected = cells_of(folder)
    for path in [*folder.glob("cells/*-2.json"), folder / "result.json"]:
        path.unlink()
    (folder / "cells" / "plain-ddim-1.json").write_text("{")  # not whole
    cell = json.loads((folder / "cells" / "random-ddim-1.json").read_text())
    cell["made_of"]["weights"] = "others"
    (folder / "cells" / "random-ddim-1.json").write_text(json.dumps(cell))
    kept = set(folder.glob("cells/*-1.json")) - set(folder.glob("cells/*-ddim-1.json"))
    before = written(folder)

    sent: list[float] = []

    def stop_amid_the_cells(percent: float, note: str) -> None:
        if percent > 50 and not sent:
            sent.append(percent)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CELL_WEIGHT", 1)
        assert demo.run_demo(folder, SMALL, processes=1, on_progress=stop_amid_the_cells) is None
    assert not (folder / "result.json").exists()
    assert len(list(folder.glob("cells/*-2.json"))) in range(1, 9)
    result = demo.run_demo(folder, SMALL, processes=1)
    assert result is not None
    assert cells_of(folder) == expected
    assert {path: written(folder)[path] for path in kept} == {path: before[path] for path in kept}
    record = finished[1]
    assert result[1]["differences"] == record["differences"]


def test_a_training_that_has_to_stop_saves_and_goes_on(tmp_path):
    recipe = load_recipe("digits", [*TINY, f"output={tmp_path / 'run'}"])

    def run_until(end: float) -> None:
        demo._fine_tune(recipe, lambda done: done > end)

    with pytest.raises(Stopped):
        run_until(0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]
    run_until(1)  # goes on
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12


def test_the_differences_are_those_of_the_grid(finished):
    """Paired over the same images, as evaluate_grid has them."""
    folder = finished[0]
    names = {"plain": "plain", "free AT": "free-at"}
    generators = {
        name: Generator.load(folder / "runs" / slug, precision=load_recipe("fashion-16-at").precision, batch_size=64)
        for name, slug in names.items()
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


def test_it_is_started_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it once"):
        demo.run_demo(tmp_path, SMALL)


# -- consistency ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the distillations start from: a denoiser of one update."""
    folder = tmp_path_factory.mktemp("student") / "edm"
    train(load_recipe("fashion-16-edm", ["steps=1", "batch_size=8", "precision=fp32", f"output={folder}"]))
    return str(folder)


@pytest.fixture
def distilled(monkeypatch: pytest.MonkeyPatch, student: str) -> None:
    monkeypatch.setattr(demo, "STUDENT", student)
    monkeypatch.setattr(demo, "DISTILLED_STEPS", (1, 2))
    monkeypatch.setattr(demo, "TEACHER_STEPS", (2,))
    monkeypatch.setattr(demo, "QUICK_CONSISTENCY", demo.DemoSize(updates=3, images=16))


def test_it_distils_three_ways_and_compares_with_the_teacher(robustdiff, distilled, student, tmp_path):
    folder = tmp_path / "demo"
    outcome = robustdiff("demo", "--consistency", "--output", folder)
    assert outcome.code == 0, outcome.err
    assert {p.name for p in folder.iterdir()} == {
        "cells", "fid.png", "result.json", "runs", "samples-multistep.png",
    }  # fmt: skip
    assert {p.name for p in (folder / "runs").iterdir()} == {"plain", "at-solver", "at-student"}
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
    for cell in [*record["cells"], *record["teacher"]]:
        assert f"{cell['fid']:.2f} ±" in outcome.out
    before = written(folder)
    assert robustdiff("demo", "--consistency", "--output", folder).code == 0
    assert written(folder) == before
    outcome = robustdiff("demo", "--consistency", "--output", folder, "--seed", 1)
    assert outcome.code == 2
    assert "seed" in outcome.err
