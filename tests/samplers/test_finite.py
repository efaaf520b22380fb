"""A sample that is not finite stops what asked for it, with exit code 1 and the step at which it arose."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from robustdiff.errors import RunError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers import SAMPLERS, sample

LINEAR = DiffusionProcess.linear(1000)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "es", "time-shift", "dpm++"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_step_is_named(sampler, value, prediction):
    """Clipping would make a number of an infinity."""
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output = 0.1 * x
        if calls == 3:
            output[1, 0, 2, 2] = value
        return output

    with pytest.raises(RunError, match=f"{sampler.replace('+', '.')}.*step 3 of 5") as error:
        sample(model, LINEAR, sampler, 5, shape=(2, 1, 4, 4), prediction=prediction)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("sampler", "process"), [("euler", DiffusionProcess.flow(100)), ("multistep", None)])
def test_flows_and_consistency_models_too(sampler, process):
    from robustdiff.objectives.preconditioning import karras_process, karras_sigmas

    assert sampler in SAMPLERS
    process = process or karras_process(karras_sigmas(10))
    prediction = "flow" if sampler == "euler" else "sample"
    with pytest.raises(RunError, match="step 1 of 2"):
        sample(lambda x, t: x / 0, process, sampler, 2, shape=(2, 1, 4, 4), prediction=prediction)


@pytest.fixture(scope="module")
def overflowing(make_unet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose weights are finite and whose outputs are not."""
    unet = make_unet()
    with torch.no_grad():
        unet.conv_out.weight.fill_(3e38)
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


STUDY = """
title: overflow
recipe: digits
set: {{steps: 2, batch_size: 4, threads: 1}}
baseline: plain
methods: {{plain: {{set: {{adversary: none}}}}}}
references: {{given: {{path: {path}, samplers: [ddim], steps: [3]}}}}
measure: {{samplers: [ddim], steps: [2], num: 40, features: digits}}
"""


@pytest.mark.parametrize("command", ["sample", "pngs", "evaluate", "mismatch"])
def test_commands_stop_and_write_nothing(command, overflowing, tmp_path, robustdiff):
    output = tmp_path / ("out.npz" if command == "sample" else "out")
    arguments = {
        "sample": ["sample", overflowing, "--num", 4, "--steps", 3],
        "pngs": ["sample", overflowing, "--num", 4, "--steps", 3],
        "evaluate": ["evaluate", overflowing, "--data", "digits", "--features", "digits", "--num", 8, "--steps", 3],
        "mismatch": ["mismatch", overflowing, "--data", "digits", "--num", 40, "--steps", 3, "--probes", 0],
    }[command]
    outcome = robustdiff(*arguments, "--output", output, "--cpu")
    assert outcome.code == 1
    assert "step 1 of 3" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("[!.]*.png")) + list(tmp_path.rglob("*.npz")) + list(tmp_path.rglob("[!.]*.json"))


def test_a_study_stops_too(overflowing, tmp_path, robustdiff):
    (tmp_path / "study.yaml").write_text(STUDY.format(path=overflowing))
    outcome = robustdiff("study", tmp_path / "study.yaml", "--output", tmp_path / "study")
    assert outcome.code == 1
    assert "step 1 of 3" in outcome.err
    assert not list((tmp_path / "study" / "cells").glob("given*"))
