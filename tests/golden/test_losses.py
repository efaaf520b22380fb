"""The hybrid loss is guided-diffusion's: both schedules, rescaled and plain, clean and perturbed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdiff import DenoisingObjective, DiffusionProcess, load_adm


@pytest.mark.parametrize(
    ("schedule", "scale", "point"),
    list(itertools.product(["cosine", "linear"], ["rescaled", "plain"], ["clean", "delta"])),
)
def test_losses_of_each_sample(golden: Path, schedule: str, scale: str, point: str) -> None:
    flags = json.loads((golden / "config.json").read_text())["models"]["cifar_like"]
    unet = load_adm(golden / "adm_cifar_like.pt", **flags).eval()
    process = getattr(DiffusionProcess, schedule)(1000)
    objective = DenoisingObjective(
        process, variance="learned_range", vb_scale=len(process) / 1000 if scale == "rescaled" else None
    )
    with np.load(golden / "losses.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    key = f"{schedule}_{scale}"
    draw = objective.draw(data[f"{key}_x0"], t=data["t"], noise=data[f"{key}_noise"])
    with torch.no_grad():
        losses = objective(unet, draw, data[f"{key}_delta"] if point == "delta" else None)
    for name in ("mse", "vb", "loss"):
        expected = data[f"{key}_{point}_{name}"]
        assert (losses[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_betas(golden: Path, schedule: str) -> None:
    with np.load(golden / "betas.npz") as file:
        np.testing.assert_allclose(getattr(DiffusionProcess, schedule)(1000).betas, file[schedule], atol=1e-14)
