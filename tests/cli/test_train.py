"""`robustdiff train`: its run, fine-tuning, and recipes that are refused."""

from __future__ import annotations

import json

import numpy as np
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
