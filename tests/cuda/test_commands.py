"""The commands compute on the device: train, sample, evaluate, mismatch, solver-error, demo."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robustdiff import demo


@pytest.fixture
def run(device, recipe, robustdiff):
    """run(command, …): the command on the device; run("train") has made the run of digits."""
    trained = recipe("digits", "run")
    cpu = ["--cpu"] if device == "cpu" else []

    def command(name, *arguments):
        done = robustdiff(name, *arguments, *cpu)
        assert done.code == 0, done.err
        return done.out

    path = trained.output + ".yaml"
    with open(path, "w", encoding="utf-8") as file:
        file.write(trained.to_yaml())
    command("train", path)
    return lambda name, *arguments: command(name, trained.output, *arguments)


def test_images_are_sampled_and_evaluated(device, run, tmp_path):
    for precision in ("fp32", "bf16", "fp16"):
        path = tmp_path / f"{precision}.npz"
        # The last batch is smaller.
        run("sample", "--num", 10, "--batch-size", 4, "--steps", 2, "--precision", precision, "--output", path)
        assert np.load(path)["arr_0"].shape == (10, 8, 8, 1)
    run("evaluate", "--num", 40, "--steps", 2, "--batch-size", 16, "--output", tmp_path / "evaluated")
    record = json.loads((tmp_path / "evaluated/result.json").read_text())
    assert [cell["n"] for cell in record["cells"]] == [40]
    assert (record["seed"], record["noise"]) == (0, "philox")


def test_the_mismatch_is_measured(device, run, tmp_path):
    run("mismatch", "--num", 40, "--steps", 2, "--probes", 2, "--radii", "0.1", "--output", tmp_path / "mismatch")
    record = json.loads((tmp_path / "mismatch/mismatch.json").read_text())
    assert len(record["paths"][0]["path"]) == 2
    assert len(record["robustness"]) == 5


def test_the_error_of_a_solver_is_measured(device, run, tmp_path):
    arguments = ("--scales", 4, "--num", 4, "--points", 2, "--substeps", 2)
    run("solver-error", *arguments, "--output", tmp_path / "solver-error")
    assert (tmp_path / "solver-error/result.json").is_file()


@pytest.mark.parametrize("consistency", [False, True])
def test_the_demonstration(gpu, tmp_path, consistency):
    study = demo.demo_study("demo-consistency" if consistency else "demo")
    measure = study.measure.model_copy(update={"num": 64})
    small = study.model_copy(update={"set": {**study.set, "steps": 3}, "measure": measure})
    _, record = demo.run_demo(small, tmp_path)
    assert record["obtained_on"]["device"] == gpu
    assert {training["device"] for training in record["training"].values()} == {gpu}
