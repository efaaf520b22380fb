"""Training of text-to-image models end to end: captions, caches, free adversarial training, and the saved pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image

from robustdiff.backbones.model import load_model
from robustdiff.conditions.clip import ClipText
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.noise import ImageNoise
from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.progress import SILENT
from robustdiff.training.run import _embed_captions

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with captions, of which one is wide."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    texts: list[Any] = ["a red shoe", ["blue", "a blue shoe"], "shoe", ""]
    with (folder / "metadata.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            shape = (12, 24 if number == 0 else 12, 3)
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "text": text}) + "\n")
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, make_sd_pipeline: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: make_sd_pipeline(folder / kind, kind) for kind in ("sd", "xl")}


def settings_of(model: Path, images: Path, output: Path, **more: Any) -> list[str]:
    values = {
        "model.name": "pretrained",
        "model.path": model,
        "model.condition_dropout": 0.5,
        "data.name": "imagefolder",
        "data.root": images,
        "data.channels": 3,
        "data.size": 8,
        "data.flip": "false",
        "codec.name": "vae",
        "codec.cache": "true",
        "adversary.name": "free",
        "adversary.steps": 2,
        "objective.name": "denoising",
        "steps": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "ema": 0,
        "threads": 1,
        "output": output,
        **more,
    }
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: digits\n")
    return path


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_fine_tuned_pipeline_is_sampled_as_diffusers_does(
    robustdiff: Any, tmp_path: Path, recipe: Path, pipelines: dict[str, Path], images: Path, kind: str
) -> None:
    run = tmp_path / "run"
    outcome = robustdiff("train", recipe, *settings_of(pipelines[kind], images, run), "--cpu")
    assert outcome.code == 0, outcome.err
    assert load_model(run).fingerprint() != load_model(pipelines[kind]).fingerprint()
    words = ["--prompt", "a red shoe", "--prompt", "ünï\nblue", "--negative", "a", "--guidance", 4, "--steps", 3]
    outcome = robustdiff("sample", run, *words, "--num", 2, "--cpu", "--output", tmp_path / "samples")
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "samples" / "000001.png") as picture:
        texts = dict(picture.text)
        pixels = np.asarray(picture)
    assert texts == {
        "prompt": "ünï\nblue",
        "negative_prompt": "a",
        "guidance": "4.0",
        "sampler": "ddim",
        "steps": "3",
        "seed": "0",
        "noise": "philox",
        "number": "1",
        "model": load_model(run).fingerprint(),
    }

    prompts = ["a red shoe", "ünï\nblue"]
    generator = Generator.load(run, prompts=tuple(prompts), guidance=4.0, negative="a", steps=3, sampler="ddim")
    latents = generator.sample(range(2), None)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    noise = ImageNoise(0, range(2), generator.model.shape, torch.device("cpu")).draw()
    theirs = pipeline(
        prompts, negative_prompt=["a", "a"], guidance_scale=4.0, num_inference_steps=3, latents=noise, output_type="np"
    ).images
    ours = (generator.model.codec.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-5)
    assert np.abs(pixels - 255 * theirs[1]).max() < 1


def test_on_a_cpu_captions_are_encoded_as_they_come_and_activations_may_be_computed_again(
    robustdiff: Any,
    tmp_path: Path,
    recipe: Path,
    pipelines: dict[str, Path],
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / "cache"))
    called: list[str] = []
    encode, park, draw = ClipText.encode, ClipText.park, DenoisingObjective.draw
    monkeypatch.setattr(ClipText, "encode", lambda self, texts: called.extend(sorted(texts)) or encode(self, texts))
    monkeypatch.setattr(ClipText, "park", lambda self: called.append("parked") or park(self))
    monkeypatch.setattr(DenoisingObjective, "draw", lambda *a, **b: called.append("drawn") or draw(*a, **b))
    runs = [tmp_path / "plain", tmp_path / "again"]
    for run, value in zip(runs, ("false", "true"), strict=True):
        changes = {"model.gradient_checkpointing": value, "model.condition_dropout": 0.5}
        outcome = robustdiff("train", recipe, *settings_of(pipelines["sd"], images, run, **changes), "--cpu")
        assert outcome.code == 0, outcome.err
    assert "parked" not in called
    assert called.count("drawn") == 2
    encoded = [text for text in called if text != "drawn"]
    assert len(encoded) == len(set(encoded)), "kept on disk for the second run"
    plain, again = (load_model(run).network.state_dict() for run in runs)
    torch.testing.assert_close(plain, again, rtol=0, atol=1e-6)


def test_captions_are_encoded_in_advance_and_the_encoders_leave_the_device(
    tmp_path: Path, pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / "cache"))
    called: list[str] = []
    encode, park = ClipText.encode, ClipText.park
    monkeypatch.setattr(ClipText, "encode", lambda self, texts: called.extend(sorted(texts)) or encode(self, texts))
    monkeypatch.setattr(ClipText, "park", lambda self: called.append("parked") or park(self))
    for _ in range(2):
        built = SimpleNamespace(model=load_model(pipelines["sd"]))
        _embed_captions([("shoe", "blue"), ("shoe",)], built, Accelerator(cpu=True), SILENT)
    assert called == ["", "blue", "shoe", "parked", "parked"]


def test_a_network_that_cannot_compute_activations_again_is_refused(
    robustdiff: Any,
    tmp_path: Path,
    recipe: Path,
    pipelines: dict[str, Path],
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(pipelines["sd"], images, tmp_path / "run", **{"model.gradient_checkpointing": "true"})
    monkeypatch.setattr(UNet2DConditionModel, "_supports_gradient_checkpointing", False)
    outcome = robustdiff("train", recipe, *settings, "--cpu")
    assert outcome.code == 2
    assert "model.gradient_checkpointing is not for UNet2DConditionModel" in outcome.err


def test_images_of_another_size_need_model_size(
    robustdiff: Any, tmp_path: Path, recipe: Path, pipelines: dict[str, Path], images: Path
) -> None:
    changes: dict[str, Any] = {"data.size": 12, "adversary.name": "none", "codec.cache": "false", "precision": "bf16"}
    words = ["train", recipe, *settings_of(pipelines["xl"], images, tmp_path / "run", **changes), "--cpu"]
    outcome = robustdiff(*words)
    assert outcome.code == 2
    assert "takes images of 8×8, the data has 12×12" in outcome.err
    assert robustdiff(*words, "--set", "model.size=12").code == 0
    assert load_model(tmp_path / "run").image_shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--negative", "blue"], "give --guidance above 1 as well"),
        (["--negative", "blue", "--guidance", 1], "give --guidance above 1 as well"),
        (["--prompt", "a \udcff"], "is not UTF-8"),
        (["--class", 1], "no classes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    robustdiff: Any, tmp_path: Path, pipelines: dict[str, Path], words: list[Any], message: str
) -> None:
    outcome = robustdiff("sample", pipelines["sd"], "--prompt", "red", *words, "--cpu", "--output", tmp_path / "x")
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.strip().count("\n") == 0


def test_a_model_without_captions_takes_no_negative_one(robustdiff: Any, tmp_path: Path) -> None:
    outcome = robustdiff("sample", "fashion-16", "--negative", "x", "--cpu", "--output", tmp_path / "x")
    assert outcome.code == 2
    assert "leave --negative out" in outcome.err
