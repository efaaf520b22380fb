"""Captions for Stable Diffusion 3 and Flux, against the encoding of diffusers' pipelines."""

from __future__ import annotations

import logging

import pytest
import torch

from robustdiff.conditions.clip_t5 import FluxText, StableDiffusion3Text

CAPTIONS = ["A red shoe ", "a blue shirt, red", ""]


def named(pairs):
    """Return the tokenizers and the encoders by name."""
    numbers = ("", "_2", "_3")[: len(pairs)]
    return tuple(
        {f"{part}{number}": pair[i] for number, pair in zip(numbers, pairs, strict=True)}
        for i, part in enumerate(("tokenizer", "text_encoder"))
    )


@pytest.mark.parametrize("t5", [True, False])
def test_embeddings_of_sd3_are_those_of_diffusers(make_clip, make_t5, t5):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    pairs = [make_clip(10, 6), make_clip(12, 8), *([make_t5(1, d_model=24)] if t5 else [])]
    text = StableDiffusion3Text(*named(pairs), width=24)
    network = SD3Transformer2DModel(joint_attention_dim=24, num_layers=1, num_attention_heads=1)
    missing = {} if t5 else {"tokenizer_3": None, "text_encoder_3": None}
    pipeline = StableDiffusion3Pipeline(network, None, None, **text.components, **missing)
    wanted, negative, pooled, negative_pooled = pipeline.encode_prompt(CAPTIONS, None, None, device="cpu")
    given = text.batch(None, CAPTIONS, None)
    assert given["encoder_hidden_states"].shape == (3, 16 + 256, 24)
    assert torch.equal(given["encoder_hidden_states"], wanted)
    assert torch.equal(given["pooled_projections"], pooled)
    empty = text.empty()
    torch.testing.assert_close(empty["encoder_hidden_states"], negative[:1])
    torch.testing.assert_close(empty["pooled_projections"], negative_pooled[:1])
    dropped = text.batch(None, CAPTIONS, torch.tensor([False, True, False]))
    torch.testing.assert_close(dropped["pooled_projections"][[0, 1]], torch.stack([pooled[0], negative_pooled[0]]))


def test_embeddings_of_flux_are_those_of_diffusers(make_clip, make_t5):
    from diffusers import FluxPipeline

    text = FluxText(*named([make_clip(10), make_t5(1, d_model=24)]))
    pipeline = FluxPipeline(None, None, transformer=None, **text.components)
    wanted, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu")
    given = text.batch(None, CAPTIONS, None)
    assert given["encoder_hidden_states"].shape == (3, 512, 24)
    assert torch.equal(given["encoder_hidden_states"], wanted)
    assert torch.equal(given["pooled_projections"], pooled)


def test_captions_that_t5_cuts_are_warned_of_and_those_that_only_clip_cuts_are_not(make_clip, make_t5, caplog):
    text = FluxText(*named([make_clip(10), make_t5(1, d_model=24)]), length=32)
    with caplog.at_level(logging.WARNING):
        text.encode(["red " * 15])  # more than the 16 tokens of the CLIP
        assert not caplog.text
        text.encode(["red " * 40])
    assert "cut after 32 tokens by text_encoder_2" in caplog.text


def test_each_encoder_that_cuts_captions_is_warned_of_once(make_clip, caplog):
    text = StableDiffusion3Text(*named([make_clip(8, 8), make_clip(8, 8)]), width=24)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            text.encode(["red " * 15])
    for name in ("text_encoder,", "text_encoder_2,"):
        assert caplog.text.count(f"cut after 16 tokens by {name}") == 1


def test_the_fingerprint_depends_on_every_encoder_and_the_length(make_clip, make_t5):
    tokenizers, encoders = named([make_clip(10), make_t5(1, d_model=24)])
    prints = {FluxText(tokenizers, encoders, length).fingerprint() for length in (512, 256)}
    torch.nn.init.normal_(next(encoders["text_encoder_2"].parameters()))
    prints.add(FluxText(tokenizers, encoders).fingerprint())
    torch.nn.init.normal_(next(encoders["text_encoder"].parameters()))
    prints.add(FluxText(tokenizers, encoders).fingerprint())
    assert len(prints) == 4
