"""The recipes of the paper's experiments run: two updates each, and their baselines, from a tiny ADM checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdiff.backbones.adm import PRESETS, build_adm, save_adm
from robustdiff.backbones.adm.convert import convert
from robustdiff.objectives.denoising import DenoisingObjective

BASELINES = {
    "at": [],
    "plain": ["adversary=none"],
    "ip": ["adversary=none", "objective.input_perturbation=0.1"],
    "pgd": ["adversary=pgd"],
}


@pytest.fixture(scope="module", params=["cifar10-adm", "imagenet64-adm"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A recipe, its network at a tiny width as a pipeline folder, and images with labels for it."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = replace(
        PRESETS[request.param], image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2",
        attention_resolutions="8", num_head_channels=32, num_classes=4 if PRESETS[request.param].class_cond else None,
    )  # fmt: skip
    unet = build_adm(flags)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)  # it starts at zero, where no gradient reaches δ
    save_adm(unet, folder / "model.pt")
    convert(folder / "model.pt", folder / "model", flags, "cosine")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(16) % 4)
    return request.param, folder / "model", folder / "images.npz"


@pytest.mark.parametrize("method", BASELINES)
def test_two_updates(robustdiff, prepared, tmp_path, method, monkeypatch):
    recipe, model, images = prepared
    strengths, draw = set(), DenoisingObjective.draw

    def watched(self, *arguments, **more):
        strengths.add(self.input_perturbation)
        return draw(self, *arguments, **more)

    monkeypatch.setattr(DenoisingObjective, "draw", watched)
    overrides = [
        f"model.path={model}", "data.name=npz", f"data.root={images}", "data.size=16", "data.workers=0",
        "precision=fp32", "steps=2", "batch_size=4", f"output={tmp_path / 'run'}", *BASELINES[method],
    ]  # fmt: skip
    outcome = robustdiff("train", recipe, *(word for value in overrides for word in ("--set", value)))
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2
    assert (result["delta_norm"] > 0) == (method in ("at", "pgd"))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"mse", "vb", "loss"} <= set(line)
    assert strengths == {0.1 if method == "ip" else 0.0}
