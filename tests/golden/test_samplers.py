"""The samplers are the originals': guided-diffusion's, epsilon scaling, and the authors' DPM-Solver++."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdiff import DiffusionProcess, load_adm, sample
from robustdiff.samplers.spacing import evenly_spaced, strided

CASES = ["iddpm5", "iddpm8", "iddpm10", "ddim5", "ddim8", "ddim10", "iddpm5_es1.017", "iddpm10_es1.017"]
CASES += ["dpmpp5", "dpmpp8", "dpmpp10", "dpmpp20"]


def steps_of(case: str) -> int:
    found = re.match(r"[a-z]+(\d+)", case)
    assert found
    return int(found.group(1))


def test_no_golden_sample_is_left_out(golden: Path) -> None:
    with np.load(golden / "samplers.npz") as file:
        assert {name.rpartition("_")[0] for name in file.files} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_samples(golden: Path, case: str) -> None:
    flags = json.loads((golden / "config.json").read_text())["models"]["cifar_like"]
    unet = load_adm(golden / "adm_cifar_like.pt", **flags).eval()
    with np.load(golden / "samplers.npz") as file:
        data = {name.removeprefix(f"{case}_"): torch.from_numpy(file[name]) for name in file.files}
    name = "dpm++" if case.startswith("dpmpp") else "es" if "es" in case else re.match(r"[a-z]+", case)[0]  # type: ignore[index]
    out = sample(
        unet,
        DiffusionProcess.cosine(1000),
        sampler=name,
        steps=steps_of(case),
        latents=data["xT"],
        step_noise=data.get("noise"),
        **({"eps_scale": 1.017} if name == "es" else {}),
    )
    assert (out - data["out"]).abs().max() <= 1e-4 * data["out"].abs().max()


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dpmpp")])
def test_timesteps(golden: Path, case: str) -> None:
    spacing = strided if case.startswith("ddim") else evenly_spaced
    with np.load(golden / "samplers.npz") as file:
        assert spacing(steps_of(case), 1000).tolist() == file[f"{case}_timesteps"].tolist()
