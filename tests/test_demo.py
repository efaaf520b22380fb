"""The demonstration, at a size of seconds: equal updates, equal batches, everything that it promises on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustdiff import demo
from robustdiff.errors import InputError
from robustdiff.recipe import load_recipe
from robustdiff.training.trainer import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """The folder, the record and the parts of a small demonstration."""
    folder = tmp_path_factory.mktemp("demo")
    parts: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", (1, 2))
        result = demo.run_demo(folder, SMALL, on_part=lambda part, total: parts.append(part))
        assert result is not None
        yield folder, result[1], parts


SMALL = demo.DemoSize(updates=6, images=20)


def test_it_fine_tunes_three_ways_and_compares(finished):
    folder, record, parts = finished
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(record))
    assert len(record["cells"]) == 3 * 3 * 2
    assert {p.name for p in folder.iterdir()} == {
        "fid.png", "result.json", "runs", "samples-ddim.png", "samples-dpmpp.png", "samples-iddpm.png",
    }  # fmt: skip
    training = record["training"]
    assert {t["steps"] for t in training.values()} == {6}
    assert {t["backward_passes"] for t in training.values()} == {6}
    assert [t["batches"] for t in training.values()] == [6, 2, 2]
    recipes = [dict(t["recipe"], adversary=None, output=None) for t in training.values()]
    assert recipes[0] == recipes[1] == recipes[2], "they differ in nothing but the adversary"
    assert len(parts) == 5


def test_the_control_has_the_size_of_adversarial_training(finished):
    sizes = {name: t["delta_norm"] for name, t in finished[1]["training"].items()}
    assert sizes["plain"] == 0
    assert sizes["random"] == pytest.approx(sizes["free AT"], rel=0.05)


def test_the_command_prints_the_table_and_does_not_train_again(robustdiff, finished, monkeypatch):
    folder, record, _ = finished
    monkeypatch.setattr(demo, "QUICK", SMALL)
    weights = folder / "runs" / "plain" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    outcome = robustdiff("demo", "--output", folder)
    assert outcome.code == 0, outcome.err
    assert weights.stat().st_mtime_ns == written
    for word in ("plain", "random", "free AT", "ddim", "iddpm", "dpm++"):
        assert word in outcome.out
    for cell in record["cells"]:
        assert f"{cell['fid']:.2f} ±" in outcome.out


def test_another_size_in_the_same_folder_is_an_error(finished):
    folder, *_ = finished
    with pytest.raises(InputError, match="seed"):
        demo.run_demo(folder, SMALL, seed=1)


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
    assert {p.name for p in folder.iterdir()} == {"fid.png", "result.json", "runs", "samples-multistep.png"}
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
    written = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/model/unet/*.safetensors")}
    assert robustdiff("demo", "--consistency", "--output", folder).code == 0
    assert written == {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/model/unet/*.safetensors")}
    outcome = robustdiff("demo", "--consistency", "--output", folder, "--seed", 1)
    assert outcome.code == 2
    assert "seed" in outcome.err
