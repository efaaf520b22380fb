"""The greedy search finds the minimum of what it assumes, unimodal functions, and the command finds times."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st

from robustdiff.backbones.model import Model
from robustdiff.errors import InputError
from robustdiff.samplers.time_search import search_times


@given(st.integers(3, 200), st.integers(0, 200), st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_the_minimum_of_a_unimodal_function_is_found(N, centre, left, right):
    def objective(numbers):
        if len(numbers) == 1:
            return 0.0
        away = numbers[1] - centre
        return away * right if away > 0 else -away * left

    found = search_times(objective, 2, N)
    everything = {t: objective((0, t)) for t in range(1, N - 1)}
    assert found.value == min(everything.values())
    assert len(found.evaluated) <= 4 + 2 * np.log(N) / np.log(1.5)


def test_one_time_after_the_other():
    calls = []

    def objective(numbers):
        calls.append(numbers)
        wanted = (0, 7, 21, 30)
        return float(sum(abs(a - b) for a, b in zip(numbers, wanted, strict=False)) + 10 * (4 - len(numbers)))

    found = search_times(objective, 4, 40)
    assert found.numbers == (0, 7, 21, 30)
    assert found.value == 0
    assert len(calls) == len(set(calls)) == len(found.evaluated), "nothing is computed twice"
    assert [len(c) for c in calls] == sorted(len(c) for c in calls), "earlier times are not touched again"


def test_there_is_room_for_the_times_to_come():
    found = search_times(lambda numbers: -sum(numbers), 4, 6)
    assert found.numbers == (0, 2, 3, 4)
    assert search_times(lambda numbers: sum(numbers), 5, 6).numbers == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("steps", [0, 6, 7])
def test_steps_that_there_are_not(steps):
    with pytest.raises(InputError, match="between 1 and 5"):
        search_times(lambda numbers: 0.0, steps, 6)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    Model.of(unet, CMStochasticIterativeScheduler(num_train_timesteps=9)).save(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_names_the_times_and_the_sampler_takes_them(robustdiff, model, tmp_path):
    words = ["--data", "digits", "--num", 16, "--cpu"]
    outcome = robustdiff("search-times", model, "--steps", 3, *words, "--output", tmp_path / "found.json")
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["steps"].split(",")[0] == "0"
    assert len(record["steps"].split(",")) == 3
    assert record["steps"] in outcome.out
    tried = {entry["steps"]: entry["fid"] for entry in record["evaluated"]}
    assert tried[record["steps"]] == record["fid"]
    last = [fid for steps, fid in tried.items() if steps.count(",") == 2]
    assert record["fid"] == min(last)
    outcome = robustdiff("sample", model, "--steps", record["steps"], "--num", 2, "--output", tmp_path / "x.npz")
    assert outcome.code == 0, outcome.err
    # One step is the FID that evaluate gives.
    outcome = robustdiff("evaluate", model, "--steps", 1, *words, "--output", tmp_path / "grid")
    (cell,) = json.loads((tmp_path / "grid" / "result.json").read_text())["cells"]
    assert tried["0"] == pytest.approx(cell["fid"], rel=1e-6)


def test_one_step_leaves_nothing_to_search(robustdiff, model):
    """Its only time, 0, is no number of steps that robustdiff sample would take."""
    outcome = robustdiff("search-times", model, "--data", "digits", "--steps", 1, "--num", 16, "--cpu")
    assert outcome.code == 2
    assert "--steps" in outcome.err


def test_a_diffusion_model_has_no_such_times(robustdiff):
    outcome = robustdiff("search-times", "fashion-16", "--num", 8)
    assert outcome.code == 2
    assert "multistep does not suit this process" in outcome.err
