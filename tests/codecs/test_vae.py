"""The VAE codec against diffusers' own, and folders of VAEs as others save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from robustdiff.codecs.codec import CODECS
from robustdiff.codecs.pixels import Pixels
from robustdiff.codecs.vae import VAE, VAESection, load_vae
from robustdiff.data import load_dataset, to_uint8, to_unit
from robustdiff.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def small(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "sample_size": 8,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**{**arguments, **changes})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("shift", [None, 0.25])
def test_latents_are_the_shifted_and_scaled_posterior(images, shift):
    network = small(shift_factor=shift)
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
    codec = VAE(network, "mean")
    latents = codec.encode(images)
    torch.testing.assert_close(latents, (posterior.mean - (shift or 0)) * 0.5)
    assert codec.encoded_shape((1, 8, 8)) == tuple(latents.shape[1:]) == (4, 4, 4)
    assert codec.shifted == (shift is not None)
    with torch.no_grad():
        decoded = network.decode(latents / 0.5 + (shift or 0)).sample
    torch.testing.assert_close(codec.decode(latents), decoded)
    assert codec.decoded_shape((4, 4, 4)) == tuple(decoded.shape[1:])
    assert codec.clip is None
    assert codec.components == {"vae": network}


def test_means_and_deviations_of_each_channel_are_taken_where_the_configuration_has_them(images):
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    network = small(latents_mean=mean, latents_std=std)
    codec = VAE(network, "mean")
    with torch.no_grad():
        z = network.encode(images).latent_dist.mean
    wanted = (z - torch.tensor(mean)[:, None, None]) * 0.5 / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(codec.encode(images), wanted)
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(wanted), network.decode(z).sample)
    assert codec.shifted


def test_samples_have_the_moments_of_the_posterior(images):
    codec = VAE(small(), "sample")
    assert codec.random
    assert not VAE(small(), "mean").random
    with torch.no_grad():
        posterior = codec.network.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape)
    torch.testing.assert_close(codec.encode(images, noise), (posterior.mean + posterior.std * noise) * 0.5)
    assert not torch.equal(codec.encode(images), codec.encode(images))


def test_large_batches_are_encoded_and_decoded_in_parts(images, monkeypatch):
    codec = VAE(small(), "mean")
    latents, decoded = codec.encode(images), codec.decode(codec.encode(images))
    monkeypatch.setattr("robustdiff.codecs.vae._PIXELS_AT_ONCE", 2 * 64)
    torch.testing.assert_close(codec.encode(images), latents)
    torch.testing.assert_close(codec.decode(latents), decoded)


def test_it_computes_in_float32_under_autocast_and_keeps_no_graph(images):
    codec = VAE(small().half(), "mean")
    latents = codec.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(codec.encode(images.bfloat16().float()), codec.encode(images.bfloat16()))
        assert torch.equal(codec.encode(images), latents)
        assert codec.decode(latents.bfloat16()).dtype == torch.float32
    assert not codec.encode(images.clone().requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in codec.network.parameters())


@pytest.mark.parametrize(
    ("shape", "words"), [((3, 8, 8), "data.channels=1"), ((1, 8, 7), "multiples of 2"), ((1, 9, 8), "data.size")]
)
def test_images_that_do_not_fit_are_refused(shape, words):
    with pytest.raises(InputError, match=words):
        VAE(small()).encoded_shape(shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling_factor": 0.0},
        {"scaling_factor": -1},
        {"scaling_factor": None},
        {"scaling_factor": [1.0]},
        {"shift_factor": float("inf")},
        {"shift_factor": "0"},
        {"latents_mean": [0.0]},
        {"latents_std": [1.0, 0.0, 1.0, 1.0]},
    ],
)
def test_factors_that_are_no_numbers_are_refused(changes):
    network = small()
    network.register_to_config(**changes)
    with pytest.raises(InputError, match=next(iter(changes))):
        VAE(network)


def test_the_fingerprint_tells_weights_settings_and_posterior_apart():
    prints = [VAE(small(), "mean").fingerprint(), VAE(small(), "sample").fingerprint()]
    prints.append(VAE(small(scaling_factor=0.6), "mean").fingerprint())
    other = small()
    with torch.no_grad():
        other.encoder.conv_in.bias[0] += 1
    prints.append(VAE(other, "mean").fingerprint())
    assert len(set(prints)) == 4
    assert VAE(small(), "mean").fingerprint() == prints[0]


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "vae", "model/vae"])
def test_a_vae_is_found_in_its_folder_in_a_pipeline_and_in_a_run(tmp_path, where):
    small().half().save_pretrained(tmp_path / where)
    loaded = load_vae(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), small().half().float().state_dict())
    assert not loaded.training


def test_old_names_of_attention_are_read(tmp_path):
    network = small(mid_block_add_attention=True)
    network.save_pretrained(tmp_path)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(tmp_path / WEIGHTS).items():
        for today, before in new.items():
            name = name.replace(f".{today}.", f".{before}.")
        state[name] = value
    save_file(state, tmp_path / WEIGHTS)
    torch.testing.assert_close(load_vae(tmp_path).state_dict(), network.state_dict())


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"_class_name": "os.system"}, "describes"),
        ({"_class_name": "VQModel"}, "VQModel"),
        ({"block_out_channels": [8, 16]}, "not of the network"),
        ({"layers_per_block": 100000}, "do not fit"),
        ({"latent_channels": 10**9}, "beyond"),
        ({"latent_channels": 8}, "not of the network"),
        ({"act_fn": "exec"}, "does not describe"),
        ({"down_block_types": ["A", "B"]}, "does not describe"),
        ({"sample_size": "x"}, "sample_size"),
        ({"colour": 3}, "has no colour"),
        ({"scaling_factor": "1"}, "scaling_factor"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_in_one_line(tmp_path, fields, words):
    small().save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(InputError, match=words) as error:
        VAE(load_vae(tmp_path))
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_damaged_or_not_finite_are_refused(tmp_path):
    small().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({**state, "decoder.conv_in.bias": torch.full((8,), torch.nan)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="not finite"):
        load_vae(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="damaged"):
        load_vae(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no weights"):
        load_vae(tmp_path)
    with pytest.raises(InputError, match=r"no VAE at .*fashion-16-vae"):
        load_vae(tmp_path / "nothing")


# -- the section ---------------------------------------------------------------------------------------------


def test_the_section_takes_the_checkpoints_own_vae_or_the_one_that_it_names(tmp_path):
    assert CODECS["vae"] is VAESection
    own = VAE(small(), "sample")
    built = VAESection(posterior="mean").build(own)
    assert built.network is own.network
    assert built.posterior == "mean"
    small(scaling_factor=0.25).save_pretrained(tmp_path)
    assert VAESection(path=str(tmp_path)).build(own).network.config.scaling_factor == 0.25
    with pytest.raises(InputError, match="pixels"):
        VAESection().build(Pixels())
    with pytest.raises(InputError, match=r"codec\.path.*fashion-16-vae"):
        VAESection().build(None)
    with pytest.raises(InputError, match="leave codec out"):
        CODECS["pixels"]().build(own)


def test_the_shipped_vae_reconstructs_fashion_16_and_has_latents_of_unit_variance():
    codec = VAESection(path="fashion-16-vae").build(None)
    pixels, _ = load_dataset("fashion-16", split="test").__getitems__(range(256))[:2]
    latents = codec.encode(to_unit(pixels))
    assert latents.shape == (256, 4, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    decoded = to_uint8(codec.decode(latents))
    assert (decoded.float() - pixels.float()).square().mean().sqrt() < 8
