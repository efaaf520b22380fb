"""`robustdiff solver-error`: its table, figure and JSON, and one clear line for bad input."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel

from robustdiff.backbones.model import Model
from robustdiff.data import load_dataset, to_unit
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.mismatch import solver_error as measured
from robustdiff.recipe import load_data_config


def test_the_command(robustdiff, digits_run, tmp_path):
    words = ["--num", 6, "--scales", "4,8", "--points", 3, "--substeps", 2, "--cpu", "--output", tmp_path / "out"]
    outcome = robustdiff("solver-error", digits_run, *words)
    assert outcome.code == 0, outcome.err
    for word in ("heun N=4", "euler N=8", "σ ≈ 0.002"):
        assert word in outcome.out
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["data"], record["num"], record["dimensions"]) == ("digits", 6, 64)
    assert len(record["errors"]) == 2 * 2 * 3
    assert all(e["rms"] > 0 for e in record["errors"])
    assert (tmp_path / "out" / "solver-error.png").stat().st_size > 1000


def test_the_images_are_a_sample_of_the_data(digits_run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        measured, "measure_solver_error", lambda denoise, images, *_, **settings: seen.append(images) or []
    )
    measured.measure_teacher(str(digits_run), load_data_config("digits"), torch.device("cpu"), [2], ["euler"], 5)
    dataset = load_dataset("digits")
    chosen = fixed_order(len(dataset))[:5].tolist()
    assert torch.equal(seen[0], to_unit(dataset.__getitems__(chosen).images))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--solver", "rk4"], ["rk4", "heun"]),
        (["--solver", "heun,heun"], ["--solver", "heun twice"]),
        (["--seed", str(2**64)], ["--seed"]),
        (["--substeps", str(10**9)], ["--substeps"]),
        (["--scales", "18,x"], ["--scales", "18,x"]),
        (["--scales", "1"], ["two levels"]),
        (["--num", "2000"], ["--num 2000", "1797"]),
        (["--data", "fashion-16"], ["8×8", "16×16"]),
    ],
)
def test_mistakes_are_one_line(robustdiff, digits_run, tmp_path, arguments, words, assert_bad_input):
    outcome = robustdiff("solver-error", digits_run, "--num", 4, "--output", tmp_path / "out", *arguments)
    assert_bad_input(outcome, *words)
    assert not (tmp_path / "out").exists()


def unet(classes=None):
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=8,
        num_class_embeds=classes,
    )  # fmt: skip


def test_a_teacher_of_fewer_classes_than_the_data_is_named(robustdiff, tmp_path):
    Model.of(unet(3), DDPMScheduler()).save(tmp_path / "three")
    outcome = robustdiff("solver-error", tmp_path / "three", "--data", "digits", "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "three knows 3 classes and the data has 10" in outcome.err


def test_a_consistency_model_has_no_trajectory(robustdiff, tmp_path):
    Model.of(unet(), CMStochasticIterativeScheduler()).save(tmp_path / "cm")
    outcome = robustdiff("solver-error", tmp_path / "cm", "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "a consistency model cannot be a teacher" in outcome.err


def test_a_number_that_is_not_finite_fails_with_1_and_writes_nothing(robustdiff, digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "fitted_order", lambda errors: float("nan"))
    words = ["--num", 2, "--scales", "4", "--points", 2, "--substeps", 2, "--cpu", "--output", tmp_path / "out"]
    outcome = robustdiff("solver-error", digits_run, *words)
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        f"robustdiff: {tmp_path / 'out' / 'result.json'} is not written: a number in it is not finite"
    ]
    assert not (tmp_path / "out").exists()
