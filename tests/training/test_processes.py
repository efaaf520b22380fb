"""Two processes train to the networks of one, sample its images, and measure its numbers.

All commands run in one start of two processes, since each start imports torch and diffusers in both of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from robustdiff.recipe import Recipe
from robustdiff.training.run import train

TINY = {
    "data": "digits",
    "model": {"channels": [8, 16], "groups": 4, "layers": 1},
    "lr": 1e-3,
    "threads": 1,
    "log_every": 1,
    "adversary": "free",
}
RECIPES = {
    "diffusion": {"steps": 6, "batch_size": 16, "checkpoint_every": 3, "ema": "auto"},
    "consistency": {"steps": 3, "batch_size": 8, "checkpoint_every": 1000, "ema": 0.9},
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory, digits_run):
    """commands(processes): the arguments of the same commands, with outputs in a folder of their own."""
    folder = tmp_path_factory.mktemp("processes")
    edm = {**TINY, "adversary": "none", "objective": "edm", "steps": 3, "batch_size": 8, "ema": 0}
    train(Recipe.model_validate({**edm, "output": str(folder / "teacher")}), cpu=True)
    objective = {"name": "consistency", "metric": "l2", "decay": 0.8, "scales": 10, "teacher": str(folder / "teacher")}

    def make(processes: str) -> dict[str, list[str]]:
        output = folder / processes
        output.mkdir()
        of_run = [str(digits_run), "--cpu", "--output"]
        sizes = {
            "sample": ["--num", "11", "--steps", "2", "--batch-size", "3"],
            "evaluate": ["--num", "50", "--steps", "3", "--batch-size", "5", "--sampler", "iddpm"],
        }
        outputs = {"sample": str(output / "samples.npz"), "evaluate": str(output / "evaluation")}
        made = {name: [name, *of_run, outputs[name], *sizes[name]] for name in sizes}
        for name, fields in RECIPES.items():
            recipe = {**TINY, **fields, "output": str(output / name)}
            recipe |= {"objective": objective} if name == "consistency" else {}
            (output / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
            made[name] = ["train", str(output / f"{name}.yaml"), "--cpu"]
        model = {"name": "pretrained", "path": str(digits_run), "lora": {"rank": 2}}
        recipe = {**TINY, "model": model, "steps": 3, "batch_size": 8, "ema": 0, "output": str(output / "lora")}
        recipe |= {"lr": 0.01, "watch": {"every": 3, "steps": [2], "num": 43, "batch_size": 7}}
        (output / "lora.yaml").write_text(yaml.safe_dump(recipe))
        made["lora"] = ["train", str(output / "lora.yaml"), "--cpu"]
        return made

    return folder, make


@pytest.fixture(scope="module")
def two(commands) -> Path:
    """The folder of what two processes did."""
    folder, make = commands
    # torchrun, and not accelerate launch, which starts one process only where there is neither a GPU nor MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [str(Path(__file__).with_name("run.py")), json.dumps(list(make("two").values()))]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "two"


@pytest.fixture(scope="module")
def made_by_one(commands) -> tuple[Path, dict[str, list[str]]]:
    """The folder for what one process does, and its commands."""
    folder, make = commands
    return folder / "one", make("one")


@pytest.fixture
def one(robustdiff, made_by_one):
    """one(COMMAND): run it in this process; returns the folder of what one process did."""
    folder, arguments = made_by_one

    def run(name: str) -> Path:
        outcome = robustdiff(*arguments[name])
        assert outcome.code == 0, outcome.err
        return folder

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_to_the_same_networks_as_one(outcome, two, one, name):
    alone = one(name) / name
    assert json.loads((two / name / "result.json").read_text())["processes"] == 2
    first, second = (outcome(Recipe.model_validate({**TINY, "output": str(run)})) for run in (alone, two / name))
    assert any(parameter.startswith("target now/") for parameter in first) == (name == "consistency")
    # The softmax does not see the biases of keys: their gradients are rounding errors, which AdamW scales up to steps
    # like others.
    parts = ("model/", "target now/")
    compared = [n for n in first if n.startswith(parts) and not n.endswith("to_k.bias")]
    assert len(compared) > (100 if name == "consistency" else 50)
    for parameter in compared:
        torch.testing.assert_close(first[parameter], second[parameter], rtol=0, atol=1e-5)
    for ours, theirs in zip(lines(alone), lines(two / name), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["delta_norm"] == pytest.approx(theirs["delta_norm"], rel=1e-4)


def test_two_processes_train_to_the_same_adapter_as_one_and_watch_the_same_numbers(two, one):
    alone = one("lora")
    first, second = (load_file(run / "lora/model/pytorch_lora_weights.safetensors") for run in (alone, two))
    assert first.keys() == second.keys()
    assert any(value.any() for name, value in first.items() if "lora_B" in name)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-5)
    folders = [folder / "lora" for folder in (alone, two)]
    first, second = ([json.loads(line) for line in (f / "watch.jsonl").read_text().splitlines()] for f in folders)
    assert [line["step"] for line in first] == [line["step"] for line in second] == [0, 3]
    for ours, theirs in zip(first, second, strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], rel=1e-3)
        assert ours["best"] == theirs["best"]
    first, second = (json.loads((folder / "result.json").read_text())["best"] for folder in folders)
    assert first["step"] == second["step"]
    assert first["mean"] == pytest.approx(second["mean"], rel=1e-3)


def test_two_processes_sample_the_same_images(two, one):
    images = [np.load(f / "samples.npz", allow_pickle=False)["arr_0"].astype(int) for f in (one("sample"), two)]
    assert np.abs(images[0] - images[1]).max() <= 1  # a batch of another size may round otherwise


def test_two_processes_evaluate_to_the_same_numbers(two, one):
    first, second = (
        json.loads((f / "evaluation" / "result.json").read_text())["cells"][0] for f in (one("evaluate"), two)
    )
    for metric in ("fid", "kid", "precision", "recall"):
        assert first[metric] == pytest.approx(second[metric], rel=1e-9)
