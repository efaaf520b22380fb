"""Codecs that are saved beside the pipeline of a network: with any network that does not hold its codec itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from robustdiff.backbones.model import Model, load_model
from robustdiff.codecs.codec import CODECS, Codec, CodecSection, Shape, build_codec, load_codec, save_codec
from robustdiff.codecs.pixels import Pixels
from robustdiff.codecs.vae import VAE, load_vae
from robustdiff.data import load_dataset
from robustdiff.errors import InputError
from robustdiff.mismatch.measure import _Truth
from robustdiff.recipe import load_recipe
from robustdiff.training.build import build_model

UNET = {"name": "unet", "channels": [8], "layers": 1, "groups": 4}


class Blocks(Codec):
    """Each block of n×n pixels as n² channels, times a factor."""

    def __init__(self, side: int, factor: float) -> None:
        self.side, self.factor = side, factor

    def encoded_shape(self, images: Shape) -> Shape:
        return images[0] * self.side**2, images[1] // self.side, images[2] // self.side

    def decoded_shape(self, latents: Shape) -> Shape:
        return latents[0] // self.side**2, latents[1] * self.side, latents[2] * self.side

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(images, self.side) * self.factor

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(latents / self.factor, self.side)


class BlocksSection(CodecSection):
    name: Literal["blocks"] = "blocks"
    side: int = 2
    factor: float = 1.0

    def build(self, own: Codec | None) -> Blocks:
        return Blocks(self.side, self.factor)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CODECS, "_entries", {**CODECS._load(), "blocks": BlocksSection})


def recipe(tmp_path: Path, **changes: Any) -> Any:
    values = {"data": {"name": "fashion-16", "split": "test"}, "model": UNET, "steps": 2, "threads": 1, **changes}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(values))
    return load_recipe(str(path), ["batch_size=4", "warmup=0", "ema=0", "precision=fp32"])


def built(tmp_path: Path, **changes: Any) -> Model:
    loaded = recipe(tmp_path, **changes)
    return build_model(loaded, loaded.data.load()).model


def test_a_unet_on_the_latents_of_a_vae_is_saved_with_it(robustdiff: Any, tmp_path: Path) -> None:
    recipe(tmp_path, codec={"name": "vae", "path": "fashion-16-vae", "posterior": "mean"}, output=str(tmp_path / "run"))
    run = tmp_path / "run"
    assert robustdiff("train", tmp_path / "r.yaml").code == 0
    model = load_model(run)
    vae = load_vae("fashion-16-vae")
    assert model.codec.fingerprint() == VAE(vae, "mean").fingerprint()
    assert (model.shape, model.image_shape) == ((4, 8, 8), (1, 16, 16))
    assert model.sampling["clip"] is False  # latents are not in [−1, 1]
    assert load_model(run, size=32).shape == (4, 16, 16)
    with pytest.raises(InputError, match="multiples of 2"):
        load_model(run, size=17)
    torch.testing.assert_close(load_vae(run).state_dict(), vae.state_dict(), rtol=0, atol=0)

    words = ["--num", 3, "--steps", 2, "--cpu", "--output"]
    assert robustdiff("sample", run, *words, tmp_path / "before.npz").code == 0
    assert np.load(tmp_path / "before.npz")["arr_0"].shape == (3, 16, 16, 1)
    # diffusers reads the network and its scheduler.
    network = DDPMPipeline.from_pretrained(run / "model").unet
    torch.testing.assert_close(network.state_dict(), model.network.state_dict(), rtol=0, atol=0)

    more = ["steps=2", "batch_size=4", "warmup=0", "ema=0", "data=fashion-16", "data.split=test", "threads=1"]
    more += ["model.name=pretrained", f"model.path={run}", "precision=fp32", "watch.num=8"]
    more += [f"output={tmp_path / 'tuned'}"]
    outcome = robustdiff("train", "fashion-16-at", *(word for value in more for word in ("--set", value)))
    assert outcome.code == 0, outcome.err
    assert load_model(tmp_path / "tuned").codec.fingerprint() == model.codec.fingerprint()
    with pytest.raises(InputError, match="codec=pixels does not suit"):
        built(tmp_path, model={"name": "pretrained", "path": str(run)}, codec="pixels")


def test_a_codec_without_weights_is_its_section(tmp_path: Path) -> None:
    model = built(tmp_path, codec={"name": "blocks", "side": 4, "factor": 0.5})
    assert model.shape == (16, 4, 4)
    model.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "codec" / "codec.json").read_text())
    assert saved == {"codec": {"name": "blocks", "side": 4, "factor": 0.5}}
    loaded = load_model(tmp_path / "saved")
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(loaded.codec.encode(images), Blocks(4, 0.5).encode(images), rtol=0, atol=0)
    assert loaded.codec.fingerprint() == model.codec.fingerprint()
    assert loaded.codec.fingerprint() != build_codec(BlocksSection(side=4), None).fingerprint()
    assert loaded.image_shape == (1, 16, 16)


def test_pixels_are_saved_without_a_codec(tmp_path: Path) -> None:
    for codec in ({"codec": "pixels"}, {}):
        model = built(tmp_path, **codec)
        model.save(tmp_path / f"saved{len(codec)}")
        assert not (tmp_path / f"saved{len(codec)}" / "codec").exists()
        assert model.codec.fingerprint() == Pixels().fingerprint()
        assert model.scheduler.config.clip_sample


def test_the_mismatch_is_measured_in_the_latents_of_any_codec(tmp_path: Path) -> None:
    model = built(tmp_path, codec={"name": "blocks", "factor": 0.5})
    truth = _Truth(load_dataset("fashion-16", split="test"), 4, 4, 0, model)
    assert truth.batch(range(4))[0].shape == (4, 4, 8, 8)


# -- what cannot be saved is refused before it is trained ----------------------------------------------------------


def tiny_vae(**changes: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    size: dict[str, Any] = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    return AutoencoderKL(**{**blocks, **size, **changes})


@pytest.mark.parametrize("codec", [None, "pixels", {"name": "blocks"}])
def test_a_network_whose_pipeline_holds_a_vae_is_trained_with_one(tmp_path: Path, codec: Any) -> None:
    given = {} if codec is None else {"codec": codec}
    with pytest.raises(InputError, match=r"DiTTransformer2DModel, whose pipeline holds a vae.*set codec\.name=vae"):
        built(tmp_path, model={"name": "dit", "layers": 1, "heads": 1, "head_width": 8}, **given)


def test_a_vae_that_the_pipeline_would_decode_otherwise_is_refused(tmp_path: Path) -> None:
    tiny_vae(shift_factor=0.5).save_pretrained(tmp_path / "vae")
    codec = {"name": "vae", "path": str(tmp_path / "vae")}
    with pytest.raises(InputError, match="its VAE has a shift"):
        built(tmp_path, model={"name": "dit", "layers": 1, "heads": 1, "head_width": 8}, codec=codec)
    model = built(tmp_path, codec=codec)  # which is saved with the codec itself
    model.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved").codec.fingerprint() == model.codec.fingerprint()


def test_a_codec_of_other_channels_and_one_under_a_lora_are_refused(make_unet: Any, tmp_path: Path) -> None:
    built(tmp_path, codec="blocks").save(tmp_path / "saved")
    pretrained = {"name": "pretrained", "path": str(tmp_path / "saved")}
    with pytest.raises(InputError, match="takes 4 channels, and latents of its codec Blocks have another number"):
        built(tmp_path, model=pretrained, codec={"name": "blocks", "side": 4})
    pytest.importorskip("peft")
    lora = {**pretrained, "lora": {"rank": 2, "targets": ["to_q"]}}
    with pytest.raises(InputError, match="a LoRA is saved without a codec"):
        built(tmp_path, model=lora, codec={"name": "blocks", "factor": 0.5})
    assert built(tmp_path, model=lora, codec="blocks").adapter is not None


def test_a_codec_without_a_section_is_not_saved(make_unet: Any, tmp_path: Path) -> None:
    model = Model.of(
        make_unet((4,), in_channels=4, out_channels=4, norm_num_groups=2, attention_head_dim=4), DDIMScheduler()
    )
    model.codec = Blocks(2, 1.0)
    with pytest.raises(InputError, match="Blocks has no section to be saved with: set its attribute section"):
        model.save(tmp_path / "saved")
    model.codec.section = BlocksSection()
    model.save(tmp_path / "saved")
    assert isinstance(load_model(tmp_path / "saved").codec, Blocks)


# -- files that are read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "codec: Field required; save"),
        ('{"codec": {"name": "wavelets"}}', "unknown codec 'wavelets'.*install the package of its codec"),
        ('{"codec": {"name": "blocks", "factor": "x"}}', "factor.*save the model again"),
        ('{"codec": {"name": "blocks", "colour": 3}}', "unknown field"),
        ('{"codec": {"name": "vae"}}', r"config\.json is missing"),
        ('{"codec": "blocks"}', None),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path: Path, text: str, words: str | None) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "codec.json").write_text(text)
    if words is None:
        assert isinstance(load_codec(tmp_path), Blocks)
        return
    with pytest.raises(InputError, match=words) as error:
        load_codec(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_with_the_codec_of_another_network_is_refused(make_unet: Any, tmp_path: Path) -> None:
    Model.of(
        make_unet((4,), in_channels=3, out_channels=3, norm_num_groups=2, attention_head_dim=4), DDPMScheduler()
    ).save(tmp_path)
    save_codec(build_codec(BlocksSection(), None), tmp_path)
    with pytest.raises(InputError, match="takes 3 channels"):
        load_model(tmp_path)


def test_a_codec_is_read_from_links_as_the_hub_keeps_files(tmp_path: Path) -> None:
    built(tmp_path, codec="blocks").save(tmp_path / "saved")
    shutil.move(tmp_path / "saved" / "codec" / "codec.json", tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "saved" / "codec" / "codec.json")
    assert isinstance(load_model(tmp_path / "saved").codec, Blocks)
