"""Stable Diffusion 3 and Flux: adversarial fine-tuning on captioned images from the command line, and its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.backbones.flux import pack
from robustdiff.backbones.model import load_model
from robustdiff.evaluation.noise import ImageNoise
from robustdiff.objectives.objective import predict

pytest.importorskip("transformers")
CAPTIONS = {"0.png": "a red shoe", "1.png": "a blue shirt", "2.png": "red", "3.png": "blue"}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, make_sd3_pipeline: Any, make_flux_pipeline: Any) -> Any:
    folder = tmp_path_factory.mktemp("pipelines")
    return {"sd3": make_sd3_pipeline(folder / "sd3"), "flux": make_flux_pipeline(folder / "flux")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(CAPTIONS):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(photos: Path, model: Path, output: Path, **fields: Any) -> list[str]:
    values = {
        "data.name": "imagefolder",
        "data.root": photos,
        "data.size": 8,
        "data.channels": 3,
        "model.path": model,
        "output": output,
        "steps": 2,
        "batch_size": 2,
        "ema": 0,
        "threads": 1,
        "precision": "fp32",
        "sampler": {},
        "watch": "none",
        **fields,
    }
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_fine_tuning_is_sampled_as_diffusers_samples_it(
    robustdiff: Any, pipelines: dict[str, Path], photos: Path, tmp_path: Path, kind: str
) -> None:
    run = tmp_path / "run"
    fields = {"model.condition_dropout": 0.5, "objective.timesteps": "logit-normal", "lr": 0.01}
    outcome = robustdiff("train", "fashion-16-at", *settings(photos, pipelines[kind], run, **fields))
    assert outcome.code == 0, outcome.err
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in metrics)
    before, after = load_model(pipelines[kind]), load_model(run)
    assert before.fingerprint() != after.fingerprint()
    assert after.image_shape == (3, 8, 8)

    words = ["--prompt", "a red shoe", "--num", 2, "--steps", 3, "--guidance", 2, "--cpu"]
    outcome = robustdiff("sample", run, *words, "--output", tmp_path / "x.npz")
    assert outcome.code == 0, outcome.err
    pipeline = diffusers.DiffusionPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    latents = ImageNoise(0, range(2), after.shape, torch.device("cpu")).draw()
    images = pipeline(
        ["a red shoe"] * 2,
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=pack(latents) if kind == "flux" else latents,
        height=8,
        width=8,
        output_type="np",
    ).images
    with np.load(tmp_path / "x.npz") as file:
        assert np.abs(file["arr_0"] - 255 * images).max() <= 0.5 + 255e-5


def test_a_lora_has_the_size_that_it_was_trained_at(
    robustdiff: Any, pipelines: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    fields = {"model.lora.rank": 2, "data.size": 16, "steps": 1, "adversary.name": "none"}
    for kind in ("sd3", "flux"):
        run = tmp_path / kind
        outcome = robustdiff("train", "fashion-16-at", *settings(photos, pipelines[kind], run, **fields))
        assert outcome.code == 0, outcome.err
        assert load_model(run).image_shape == (3, 16, 16)
        assert load_model(run, 8).image_shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_gradients_are_the_same_with_gradient_checkpointing(pipelines: dict[str, Path], kind: str) -> None:
    gradients = []
    model = load_model(pipelines[kind], 8)
    condition = model.condition.batch(None, ["a red shoe"], None)
    point = torch.randn(1, *model.shape)
    for checkpointing in (False, True):
        model.network.zero_grad()
        if checkpointing:
            model.network.enable_gradient_checkpointing()
        x = point.clone().requires_grad_()
        out = predict(model.backbone.bind(model.network.train()), x, torch.tensor([500.0]), condition)
        out.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.network.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_network_that_takes_the_scale_of_guidance_has_no_negative_caption(
    robustdiff: Any, pipelines: dict[str, Path], make_sd_pipeline: Any, tmp_path: Path
) -> None:
    words = ["--prompt", "red", "--num", 1, "--steps", 1, "--size", 8, "--guidance", 2, "--negative", "blue", "--cpu"]
    assert robustdiff("sample", pipelines["sd3"], *words, "--output", tmp_path / "x.npz").code == 0
    for model in (pipelines["flux"], make_sd_pipeline(tmp_path / "lcm", "lcm")):
        outcome = robustdiff("sample", model, *words, "--output", tmp_path / "y.npz")
        assert outcome.code == 2
        assert "takes the scale of guidance itself" in outcome.err


def test_the_scale_of_guidance_is_a_setting_of_training(
    robustdiff: Any, pipelines: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    losses = []
    for scale in (None, 3.5, 1.0):
        run = tmp_path / f"run-{scale}"
        fields = {"steps": 1, "adversary.name": "none", "log_every": 1}
        fields |= {} if scale is None else {"model.guidance": scale}
        outcome = robustdiff("train", "fashion-16-at", *settings(photos, pipelines["flux"], run, **fields))
        assert outcome.code == 0, outcome.err
        losses.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert [load_model(tmp_path / f"run-{scale}").backbone.guidance for scale in (None, 1.0)] == [3.5, 1.0]
    run = tmp_path / "sd3"
    outcome = robustdiff("train", "fashion-16-at", *settings(photos, pipelines["sd3"], run, **{"model.guidance": 3.5}))
    assert outcome.code == 2
    assert "takes no scale of guidance: leave model.guidance out" in outcome.err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data.size": 10}, "multiples of 4 pixels, not 10×10"),
        ({"process": "cosine", "objective": "{prediction: epsilon}"}, "is a flow-matching model"),
        ({"objective.prediction": "epsilon"}, "is not for its process"),
        ({"objective.name": "edm"}, "is a flow-matching model"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    robustdiff: Any, pipelines: dict[str, Path], photos: Path, tmp_path: Path, fields: Any, words: str
) -> None:
    outcome = robustdiff("train", "fashion-16-at", *settings(photos, pipelines["sd3"], tmp_path / "run", **fields))
    assert outcome.code == 2, outcome.err
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
