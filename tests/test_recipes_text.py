"""The recipes of networks of captions run, one after the other, as their comments say: at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustdiff.backbones.model import load_model
from robustdiff.evaluation.generate import Generator

pytest.importorskip("transformers")
QUICK = ["precision=fp32", "steps=2", "batch_size=2", "accumulate=1", "threads=1", "log_every=1", "warmup=0"]
QUICK += ["data.size=8", "data.workers=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng, lines = np.random.default_rng(0), []
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "A red shoe"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("recipe", "kind", "own"),
    [
        ("lcm-sd15", "sd", []),
        ("lcm-sdxl-lora", "xl", ["model.lora.rank=2"]),
    ],
)
def test_latent_consistency(robustdiff, make_sd_pipeline, images, tmp_path, recipe, kind, own):
    base, run = make_sd_pipeline(tmp_path / "base", kind), tmp_path / "run"
    overrides = [*QUICK, f"model.path={base}", f"data.root={images}", f"output={run}", *own]
    outcome = robustdiff("train", recipe, *(word for value in overrides for word in ("--set", value)))
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "result.json").read_text())["delta_norm"] > 0
    model = load_model(run)
    assert model.samplers[0] == "lcm"
    assert model.backbone.guidance_embedding == (256 if kind == "sd" else None)
    outcome = robustdiff("sample", run, "--num", 1, "--prompt", "blue", "--output", tmp_path / "images.npz")
    assert outcome.code == 0, outcome.err
    with np.load(tmp_path / "images.npz") as file:
        assert file["arr_0"].shape == (1, 8, 8, 3)


@pytest.mark.parametrize(("recipe", "sampler"), [("sd15-at-lora", "iddpm"), ("flux-at-lora", "euler")])
def test_adversarial_loras(robustdiff, make_sd_pipeline, make_flux_pipeline, images, tmp_path, recipe, sampler):
    pytest.importorskip("peft")
    make, run = make_sd_pipeline if recipe.startswith("sd") else make_flux_pipeline, tmp_path / "run"
    overrides = [*QUICK, f"model.path={make(tmp_path / 'base')}", f"data.root={images}", f"output={run}"]
    outcome = robustdiff("train", recipe, *(word for value in overrides for word in ("--set", value)))
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "result.json").read_text())["delta_norm"] > 0
    assert (run / "model/pytorch_lora_weights.safetensors").is_file()
    generator = Generator.load(run, size=8, prompts=("blue",))
    assert (generator.sampler, generator.steps) == (sampler, 10)
