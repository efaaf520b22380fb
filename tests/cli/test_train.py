"""`robustdiff train`: its run, fine-tuning, and recipes that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file


def test_train_writes_a_run_and_resume_finds_it_finished(robustdiff, tiny, tmp_path):
    run = tmp_path / "run"
    outcome = robustdiff("train", "digits", *tiny, "--set", f"output={run}")
    assert outcome.code == 0, outcome.err
    written = {".robustdiff", "recipe.yaml", "data.json", "metrics.jsonl", "checkpoints", "model", "result.json"}
    assert {p.name for p in run.iterdir()} == written
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["adversary"]["name"] == "free"
    assert recipe["model"]["channels"] == [8, 16]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert all(line["delta_norm"] > 0 for line in lines)
    assert json.loads((run / "result.json").read_text())["steps"] == 6
    before = (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert robustdiff("train", "digits", *tiny, "--set", f"output={run}", "--resume").code == 0
    assert (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_second_run_does_not_overwrite_the_first(robustdiff, tiny, digits_run, assert_bad_input):
    assert_bad_input(robustdiff("train", "digits", *tiny, "--set", f"output={digits_run}"), "already", "--resume")


def test_fine_tuning_from_a_run(robustdiff, tiny, digits_run, tmp_path):
    arguments = ["--set", "model.name=pretrained", "--set", f"model.path={digits_run}", "--set", "adversary=none"]
    recipe = tmp_path / "tune.yaml"
    recipe.write_text("data: digits\nsteps: 2\nbatch_size: 8\nema: 0.9\n")
    outcome = robustdiff("train", recipe, *arguments, "--set", f"output={tmp_path / 'tuned'}")
    assert outcome.code == 0, outcome.err
    old = load_file(digits_run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    new = load_file(tmp_path / "tuned" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert old.keys() == new.keys()
    assert any(not np.array_equal(old[k], new[k]) for k in old)


TUNED = ["model.name=pretrained", "steps=9", "batch_size=8", "checkpoint_every=3", "ema=0.5", "threads=1"]
TUNED += ["lr_schedule=constant", "watch.samplers=[ddim]"]
TUNED += ["watch.every=3", "watch.steps=[2]", "watch.num=40", "data=digits", "adversary.norm=l2", "log_every=3"]


@pytest.fixture
def fine_tune(robustdiff, digits_run, tmp_path):
    """fine_tune(override, …): a watched fine-tuning on the command line; returns its outcome, folder and result."""

    def run(*overrides):
        folder = tmp_path / "tuned"
        given = [*TUNED, f"model.path={digits_run}", f"output={folder}", *overrides]
        outcome = robustdiff("train", "fashion-16-at", *(word for value in given for word in ("--set", value)))
        assert outcome.code == 0, outcome.err
        return outcome, folder, json.loads((folder / "result.json").read_text())

    return run


def test_a_run_with_far_too_large_steps_hands_back_what_it_started_from(fine_tune, digits_run, caplog):
    outcome, folder, result = fine_tune("adversary.step_size=1000", "adversary.radius=500", "lr=0.1")
    assert "no checkpoint of this run was better than the one it started from: best/ holds that one" in outcome.out
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    start, best = load_file(digits_run / "model" / file), load_file(folder / "best" / file)
    assert all(np.array_equal(value, best[name]) for name, value in start.items())
    assert (result["best"]["step"], result["best"]["start"]) == (0, True)
    assert {"long-sampling", "at-radius"} <= {sign["name"] for sign in result["signs"]}
    assert "signs that fired: " in outcome.out
    assert "above the start's" in caplog.text  # on stderr, where nothing captures it


def test_a_sign_stops_a_run_and_the_last_lines_say_so(fine_tune):
    outcome, _, result = fine_tune("adversary.step_size=1000", "lr=0.1", "watch.signs.action=stop", "steps=30")
    assert result["steps"] < 30
    assert f"stopped at update {result['steps']} by the sign " in outcome.out


def test_a_run_that_improves_hands_over_what_improved(fine_tune, robustdiff):
    few = ["adversary=none", "steps=40", "batch_size=16", "lr=2e-3", "ema=0.9"]
    outcome, folder, result = fine_tune(*few, "watch.every=20", "watch.steps=[10]")
    assert not result["best"]["start"]
    assert result["best"]["difference_ci"][1] < 0
    step = result["best"]["step"]
    assert (
        f"best/ holds the model of update {step}; FID and its change vs the start, on fresh noise: ddim at 10 steps"
        in outcome.out
    )
    (cell,) = result["best"]["cells"]
    assert f"{cell['value']:.2f}, −{-100 * cell['relative']:.1f}% (−" in outcome.out
    assert "better" not in outcome.out
    outcome = robustdiff("evaluate", folder / "best", "--num", 20, "--steps", 10)
    assert "20 images a cell, against digits on the features digits.\n" in outcome.out, outcome.err
    outcome = robustdiff("sample", folder / "best", "--num", 4, "--steps", 2, "--output", folder / "images.npz")
    assert outcome.code == 0, outcome.err


def test_a_fine_tuning_without_a_watch_says_so(fine_tune, robustdiff, tiny, tmp_path):
    outcome, folder, result = fine_tune("watch=none")
    assert "was not watched" in outcome.out
    assert "best" not in result
    assert not (folder / "best").exists()


def test_a_watch_that_cannot_be_is_refused_before_anything_is_written(robustdiff, tiny, tmp_path, assert_bad_input):
    for override, words in {
        "watch.metric=fod": ("watch.metric", "fod", "kid"),
        "watch.samplers=[heun9]": ("heun9", "ddim"),
        "watch.features=resnet": ("watch.features", "resnet", "inception"),
        "watch.evry=5": ("watch.evry", "every"),
        "watch.every=0": ("watch.every", "auto"),
    }.items():
        outcome = robustdiff("train", "digits", *tiny, "--set", f"output={tmp_path / 'run'}", "--set", override)
        assert_bad_input(outcome, *words)
    assert not (tmp_path / "run").exists()


def test_an_unsafe_recipe_is_not_run(robustdiff, tmp_path, assert_bad_input):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    assert_bad_input(robustdiff("train", recipe), "r.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_fails_with_1(robustdiff, tiny, tmp_path):
    outcome = robustdiff("train", "digits", *tiny, "--set", f"output={tmp_path / 'r'}", "--set", "lr=1e20")
    assert outcome.code == 1
    assert "loss" in outcome.err
    assert "lr" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "r" / "model").exists()
