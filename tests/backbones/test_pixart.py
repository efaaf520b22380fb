"""PixArt: pipelines of diffusers are read, called and sampled as diffusers does, and saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError
from robustdiff.samplers import sample

transformers = pytest.importorskip("transformers")
WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁blue", "▁shoe", "▁shirt", "s", "h", "o", "e"]


def tiny(**changes: Any) -> PixArtTransformer2DModel:
    arguments: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": 4,
        "caption_channels": 12,
        "use_additional_conditions": False,
    }
    return PixArtTransformer2DModel(**{**arguments, **changes})


def save(folder: Path, kind: Any = PixArtAlphaPipeline, scheduler: Any = None, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=8,
    )
    kind(
        tokenizer=transformers.T5Tokenizer(vocab=[(word, -float(i > 2)) for i, word in enumerate(WORDS)], extra_ids=0),
        text_encoder=transformers.T5EncoderModel(config),
        vae=vae,
        transformer=tiny(**changes),
        scheduler=scheduler or DDIMScheduler(clip_sample=False),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pixart") / "pipeline")


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "p")
    return tmp_path / "p"


def images_of(model: Model, prompts: list[str], latents: torch.Tensor, guidance: float) -> torch.Tensor:
    ours = sample(
        model,
        model.process,
        "ddim",
        4,
        latents=latents,
        guidance=guidance,
        condition=model.condition.batch(None, prompts, None),
        unconditional=model.condition.empty(),
        **model.sampling,
    )
    return (model.codec.decode(ours) / 2 + 0.5).clamp(0, 1)


def of_diffusers(kind: Any, folder: Path, prompts: list[str], latents: torch.Tensor, guidance: float) -> torch.Tensor:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=latents,
        output_type="np",
        clean_caption=False,
        use_resolution_binning=False,
    )
    return torch.from_numpy(result.images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_images_are_those_of_diffusers_with_and_without_guidance(tmp_path: Path, kind: Any) -> None:
    folder = save(tmp_path / "first", kind)
    model = load_model(folder)
    model.save(tmp_path / "again")
    again = load_model(tmp_path / "again")
    prompts = ["A red shoe", "a blue shirt"]
    latents = torch.randn(2, *model.shape)
    assert model.image_shape == (3, 8, 8)
    for guidance in (1.0, 3.0):
        ours = images_of(again, prompts, latents, guidance)
        for path in (folder, tmp_path / "again"):
            torch.testing.assert_close(ours, of_diffusers(kind, path, prompts, latents, guidance), rtol=0, atol=1e-4)
    assert not torch.equal(ours, images_of(again, prompts[::-1], latents, 3.0))


def test_a_network_with_micro_conditions_is_called_with_the_size_of_the_images(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "p", use_additional_conditions=True))
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 7])
    condition = model.condition.batch(None, ["a red shoe", "a shirt"], None)
    added = {"resolution": torch.full((2, 2), 8.0), "aspect_ratio": torch.ones(2, 1)}
    with torch.no_grad():
        wanted = model.network(x, timestep=t, added_cond_kwargs=added, **condition).sample
        torch.testing.assert_close(model(x, t, **condition).sample, wanted)
        added = {**added, "resolution": added["resolution"] + 64}
        assert not torch.equal(model.network(x, timestep=t, added_cond_kwargs=added, **condition).sample, wanted)


def test_a_learned_variance_is_saved_with_a_scheduler_that_the_pipeline_can_use(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "p", scheduler=DDPMScheduler(variance_type="learned_range")))
    assert model.backbone.learned_variance
    model.save(tmp_path / "again")
    assert isinstance(PixArtAlphaPipeline.from_pretrained(tmp_path / "again").scheduler, DDIMScheduler)
    latents = torch.randn(1, *model.shape)
    ours = images_of(load_model(tmp_path / "again"), ["a shoe"], latents, 1.0)
    theirs = of_diffusers(PixArtAlphaPipeline, tmp_path / "again", ["a shoe"], latents, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_first_releases_are_read(pipeline: Path, saved: Path) -> None:
    edit(pipeline / "transformer" / "config.json", _class_name="Transformer2DModel", use_linear_projection=False)
    edit(pipeline / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    torch.testing.assert_close(load_model(pipeline).network.state_dict(), load_model(saved).network.state_dict())


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "PixArtAlphaPipeline"),
        ("model_index.json", {"text_encoder": ["os", "system"]}, "text_encoder is system of os"),
        ("model_index.json", {"tokenizer": ["transformers", "CLIPTokenizer"]}, "only T5Tokenizer"),
        ("transformer/config.json", {"caption_channels": 10}, "not of the network"),
        ("transformer/config.json", {"cross_attention_dim": None}, "captions|not of the network"),
        ("transformer/config.json", {"use_additional_conditions": True}, "lacks|called"),
        ("transformer/config.json", {"sample_size": 3}, "whole patches"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipeline: Path, part: str, fields: Any, words: str) -> None:
    edit(pipeline / part, **fields)
    with pytest.raises(InputError, match=words) as error:
        load_model(pipeline)
    assert "\n" not in str(error.value)


def test_a_text_encoder_of_another_width_is_refused(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "transformer")
    tiny(caption_channels=16).save_pretrained(pipeline / "transformer")
    with pytest.raises(InputError, match="embeddings of 16 numbers and the text encoder makes 12"):
        load_model(pipeline)


def test_data_without_captions_is_refused(robustdiff: Any, saved: Path, tmp_path: Path) -> None:
    values = [f"model.path={saved}", f"output={tmp_path / 'run'}", "data.name=digits", "data.channels=3", "data.size=8"]
    outcome = robustdiff("train", "fashion-16-at", *(word for value in values for word in ("--set", value)))
    assert outcome.code == 2
    assert "needs captions" in outcome.err


def test_captions_take_turns(robustdiff: Any, saved: Path, tmp_path: Path) -> None:
    words = ["--num", 3, "--steps", 2, "--cpu", "--guidance", 2, "--output", tmp_path / "two.npz"]
    outcome = robustdiff("sample", saved, "--prompt", "a red shoe", "--prompt", "a blue shirt", *words)
    assert outcome.code == 0, outcome.err
    one = tmp_path / "one.npz"
    assert robustdiff("sample", saved, "--prompt", "a red shoe", *words[:-1], one).code == 0
    with np.load(tmp_path / "two.npz") as two, np.load(one) as alone:
        same = [np.array_equal(a, b) for a, b in zip(two["arr_0"], alone["arr_0"], strict=True)]
    assert same == [True, False, True]


def test_captions_are_for_models_of_captions(robustdiff: Any, saved: Path, tmp_path: Path) -> None:
    for model, words, message in (
        (saved, [], "give one or more by --prompt"),
        ("fashion-16", ["--prompt", "a shoe"], "leave --prompt out"),
    ):
        outcome = robustdiff("sample", model, *words, "--cpu", "--output", tmp_path / "x.npz")
        assert outcome.code == 2
        assert message in outcome.err
