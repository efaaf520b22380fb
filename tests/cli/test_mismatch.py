"""`robustdiff mismatch`: its tables, figures and JSON agree, and bad input is one clear line."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
from PIL import Image

from robustdiff.mismatch import robustness
from robustdiff.mismatch.measure import MEASURES
from robustdiff.notation import interval, number
from robustdiff.report import mismatch as report


def test_the_command_prints_tables_and_writes_figures_and_json(robustdiff, digits_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(digits_run / "model", other)
    arguments = ["--sampler", "ddim,iddpm", "--steps", "2", "--num", 40, "--probes", 2, "--radii", "0.5"]
    outcome = robustdiff("mismatch", digits_run, other, *arguments, "--cpu", "--output", tmp_path / "m")
    assert outcome.code == 0, outcome.err
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"mismatch.json", "mismatch.png", "robust.png"}
    record = json.loads((tmp_path / "m" / "mismatch.json").read_text())
    assert record["data"] == "digits"
    assert [(p["checkpoint"], p["sampler"], p["steps"]) for p in record["paths"]] == [
        (c, s, 2) for s in ("ddim", "iddpm") for c in ("digits", "other")
    ]
    for path in record["paths"]:
        assert len(path["path"]) == path["steps"]
        assert f"{number(path['mean']['energy']['value'], '.3g')} (" in outcome.out
    for meaning in MEASURES.values():
        assert meaning in outcome.out
    assert all(d["value"] == 0 for d in record["differences"])
    assert len(record["robustness"]) == 10
    for r in record["robustness"]:
        assert r["radii"] == [0.5]
        assert r["loss"] < r["robust"][0]
        assert interval(r["robust"][0], None, ".3g", r["robust_se"][0]) in outcome.out


def test_a_model_of_captions_is_measured_for_those_of_the_real_images(
    robustdiff, make_sd_pipeline, tmp_path, monkeypatch, assert_bad_input
):
    monkeypatch.chdir(tmp_path)
    make_sd_pipeline(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    lines = []
    for i in range(80):
        Image.new("RGB", (8, 8), (3 * i, 99, i)).save(tmp_path / "photos" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"shoe {i}"}))
    arguments = ["model", "--data", "imagefolder", "--root", "photos", "--steps", "1", "--num", "40", "--probes", "0"]
    assert_bad_input(robustdiff("mismatch", *arguments), "model: this model is conditioned on captions", "by --data")
    assert not (tmp_path / "mismatch").exists()
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    outcome = robustdiff("mismatch", *arguments, "--cpu")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "mismatch" / "mismatch.json").read_text())["paths"][0]["n"] == 40


def test_without_probes_there_is_no_robust_loss(robustdiff, digits_run, tmp_path):
    outcome = robustdiff(
        "mismatch", digits_run, "--steps", 2, "--num", 40, "--probes", 0, "--precision", "bf16", "--output", tmp_path
    )
    assert outcome.code == 0, outcome.err
    assert {p.name for p in tmp_path.iterdir()} == {"mismatch.json", "mismatch.png"}


def test_more_probes_than_images_are_refused(robustdiff, digits_run, tmp_path, monkeypatch):
    titles = {}
    monkeypatch.setattr(report, "save_figure", lambda figure, path: titles.update({path.name: figure.get_suptitle()}))
    arguments = ["--steps", 2, "--num", 40, "--radii", "0.5", "--output", tmp_path]
    outcome = robustdiff("mismatch", digits_run, *arguments, "--probes", 50)
    assert (outcome.code, "from 2 to num = 40" in outcome.err) == (2, True)
    outcome = robustdiff("mismatch", digits_run, *arguments, "--probes", 3)
    assert outcome.code == 0, outcome.err
    assert "at 3 true points" in outcome.out
    assert titles["robust.png"] == "digits, 3 images, seed 0"
    assert {r["n"] for r in json.loads((tmp_path / "mismatch.json").read_text())["robustness"]} == {3}


def test_numbers_are_written_before_figures(robustdiff, digits_run, tmp_path, monkeypatch):
    def full(figure, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report, "save_figure", full)
    outcome = robustdiff("mismatch", digits_run, "--steps", 2, "--num", 40, "--probes", 0, "--output", tmp_path)
    assert outcome.code == 1
    assert json.loads((tmp_path / "mismatch.json").read_text())["paths"]


def test_a_number_that_is_not_finite_fails_with_1_and_writes_nothing(robustdiff, digits_run, tmp_path, monkeypatch):
    robust_loss = robustness.robust_loss
    monkeypatch.setattr(robustness, "robust_loss", lambda *arguments: robust_loss(*arguments) * float("inf"))
    arguments = ["--steps", 2, "--num", 40, "--probes", 2, "--radii", "0.5", "--output", tmp_path / "m"]
    outcome = robustdiff("mismatch", digits_run, *arguments)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        f"robustdiff: {tmp_path / 'm' / 'mismatch.json'} is not written: a number in it is not finite"
    )
    assert not (tmp_path / "m").exists()


def test_help_says_what_the_precision_is_of(robustdiff):
    said = " ".join(robustdiff("mismatch", "--help").out.split())
    assert "robust loss and Lipschitz constant at true points, in fp32" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num", 5000], ["5000", "digits", "898"]),
        (["--radii", "a"], ["--radii", "0.1"]),
        (["--radii", "0"], ["radii"]),
        (["--radii", "0.1,0.10"], ["--radii", "0.1 twice"]),
        (["--steps", "x"], ["--steps"]),
        (["--steps", "2,3,2"], ["--steps", "2 twice"]),
        (["--sampler", "ddim,ddim"], ["--sampler", "ddim twice"]),
        (["--root", "a.npz"], ["digits", "root"]),
        (["--sampler", "plms"], ["plms", "ddim"]),
        (["--sampler", "ddim,euler"], ["euler"]),
        (["--data", "fashion-16"], ["8×8", "16×16"]),
        (["--data", "nothing"], ["nothing", "digits"]),
        (["--num", 60, "--probes", 1], ["probes"]),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(
    robustdiff, digits_run, tmp_path, monkeypatch, arguments, words, assert_bad_input
):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(robustdiff("mismatch", digits_run, *arguments), *words)
    assert not list(tmp_path.iterdir())
