"""LoRAs of each family: two updates of adversarial training, and their files as diffusers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from PIL import Image

from robustdiff.backbones.export import export
from robustdiff.backbones.model import Model, load_model
from robustdiff.recipe import Recipe
from robustdiff.training.run import train

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of two classes with captions."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i in range(8):
        name = f"{'ab'[i % 2]}/{i}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": "a red shoe" if i % 2 else "blue"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=8,
    )


@pytest.fixture
def make(make_sd_pipeline: Any, make_sd3_pipeline: Any, make_flux_pipeline: Any, make_t5: Any) -> Any:
    """make(kind, folder): a pipeline of each family."""

    def dit(folder: Path) -> Path:
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            2, 8, in_channels=4, out_channels=8, num_layers=1, sample_size=4, num_embeds_ada_norm=2
        )
        diffusers.DiTPipeline(network, small_vae(), diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(folder)
        return folder

    def pixart(folder: Path) -> Path:
        torch.manual_seed(0)
        network = PixArtTransformer2DModel(
            2, 12, num_layers=1, cross_attention_dim=24, sample_size=4, caption_channels=12,
            use_additional_conditions=False,
        )  # fmt: skip
        tokenizer, encoder = make_t5()
        diffusers.PixArtAlphaPipeline(
            tokenizer, encoder, small_vae(), network, diffusers.DDIMScheduler(clip_sample=False)
        ).save_pretrained(folder)
        return folder

    def pipeline(kind: str, folder: Path) -> Path:
        makers = {"sd3": make_sd3_pipeline, "flux": make_flux_pipeline, "dit": dit, "pixart": pixart}
        return Path(makers[kind](folder) if kind in makers else make_sd_pipeline(folder, kind))

    return pipeline


def outputs(model: Model, network: Any) -> torch.Tensor:
    """The outputs of a network of diffusers, called as the model calls its own."""
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    labels = None if model.condition.classes is None else torch.tensor([0, 1])
    condition = model.condition.batch(labels, ["a red shoe", "blue"] if model.condition.takes_captions else None, None)
    with torch.no_grad():
        result = model.backbone.bind(network.eval())(x, torch.tensor([0.25, 0.5]) * len(model.process), **condition)
    return result if isinstance(result, torch.Tensor) else result.sample


@pytest.mark.parametrize("kind", ["sd", "xl", "sd3", "flux", "dit", "pixart"])
def test_two_updates_are_what_diffusers_reads(make: Any, photos: Path, tmp_path: Path, kind: str) -> None:
    base, run = make(kind, tmp_path / "base"), tmp_path / "run"
    values = {
        "data": {"name": "imagefolder", "root": str(photos), "size": 8, "channels": 3},
        "model": {"name": "pretrained", "path": str(base), "lora": {"rank": 2, "alpha": 8}},
        "adversary": {"name": "free", "step_size": 0.5},
        "output": str(run),
        "steps": 3,
        "batch_size": 4,
        "lr": 0.05,
        "threads": 1,
    }
    train(Recipe.model_validate(values), cpu=True)
    model, plain = load_model(run), load_model(base, 8)
    ours, before = outputs(model, model.network), outputs(plain, plain.network)
    assert (ours - before).abs().max() > 1e-3 * before.abs().max()
    with model.base():
        assert torch.equal(outputs(model, model.network), before)

    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    part = model.backbone.part
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(run / "model")
        assert torch.equal(outputs(model, getattr(pipe, part)), ours)
    else:
        assert kind in ("dit", "pixart")
    if part == "unet":
        export(run, tmp_path / "kohya.safetensors", "kohya")
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(tmp_path / "kohya.safetensors")
        assert torch.equal(outputs(model, pipe.unet), ours)
    export(run, tmp_path / "merged", "pipeline")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(model, getattr(pipe, part)), ours, rtol=1e-5, atol=1e-5)
