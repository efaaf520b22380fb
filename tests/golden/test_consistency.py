"""Consistency models are OpenAI's: networks, distillation, training without a teacher, samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from robustdiff import ConsistencyObjective, load_adm, sample
from robustdiff.objectives.preconditioning import Preconditioned, karras_process, karras_sigmas

SAMPLES = {"multistep_0-39": "0,39", "multistep_0-22-39": "0,22,39", "onestep": 1}


@pytest.fixture(scope="module")
def networks(golden: Path):
    flags = json.loads((golden / "config.json").read_text())["cm"]["model"]
    return {name: load_adm(golden / f"cm_{name}.pt", **flags).eval() for name in ("student", "target", "teacher")}


@pytest.fixture(scope="module")
def data(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "cm.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def test_the_network(networks, data):
    with torch.no_grad():
        out = networks["student"](data["forward_x"], data["forward_t"]).sample
    assert close(out, data["forward_out"])


@pytest.mark.parametrize("kind", ["cd", "ct"])
@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("scales", [18, 40])
@pytest.mark.parametrize("perturb", ["solver", "student"])
def test_losses_of_each_sample(networks, data, scales, metric, kind, perturb):
    teacher = Preconditioned(networks["teacher"]) if kind == "cd" else None
    objective = ConsistencyObjective(networks["target"], teacher, scales, metric=metric, perturb=perturb)
    key = f"N{scales}_{metric}"
    # The original counts the levels from the largest, and the pair (n + 1, n) by the first of them.
    n = scales - 2 - data[f"{key}_indices"]
    draw = objective.draw(data[f"{key}_x0"], t=n, noise=data[f"{key}_noise"])
    with torch.no_grad():
        losses = objective(networks["student"], draw)
    expected = data[f"{key}_{kind}_loss"]
    assert close(losses["loss"], expected)
    # Of each, and not only of the largest: those at small σ are smaller by orders of magnitude.
    torch.testing.assert_close(losses["loss"], expected, rtol=2e-3, atol=0)


def test_no_golden_number_is_left_out(data):
    losses = {f"N{n}_{d}" for n in (18, 40) for d in ("l1", "l2")}
    assert {name.rpartition("_")[0] for name in data} == {"forward", *losses, *SAMPLES} | {
        f"{k}_{c}" for k in losses for c in ("cd", "ct")
    }


@pytest.mark.parametrize("case", SAMPLES)
def test_samples(networks, data, case):
    sigmas = karras_sigmas(40)
    noise = data[f"{case}_noise"]
    out = sample(
        Preconditioned(networks["student"], sigma_min=0.002),
        karras_process(sigmas),
        sampler="multistep",
        steps=SAMPLES[case],
        latents=noise[0] if noise.ndim == 5 else noise,
        step_noise=noise[1:] if noise.ndim == 5 else None,
        prediction="sample",
    )
    assert close(out, data[f"{case}_out"])
