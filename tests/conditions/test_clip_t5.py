"""Captions for Stable Diffusion 3 and Flux, against the encoding of diffusers' pipelines."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("transformers")
from pipelines import tiny_clip, tiny_t5

from robustdiff.conditions.clip_t5 import FluxText, StableDiffusion3Text

CAPTIONS = ["A red shoe ", "a blue shirt, red", ""]


def named(part, pairs):
    numbers = ("", "_2", "_3")
    return {f"{part}{number}": thing for number, thing in zip(numbers, pairs, strict=False)}


@pytest.mark.parametrize("t5", [True, False])
def test_embeddings_of_sd3_are_those_of_diffusers(t5):
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    torch.manual_seed(1)
    pairs = [tiny_clip(8, 6), tiny_clip(12, 8), *([tiny_t5(24)] if t5 else [])]
    tokenizers = named("tokenizer", [tokenizer for tokenizer, _ in pairs])
    encoders = named("text_encoder", [encoder for _, encoder in pairs])
    text = StableDiffusion3Text(tokenizers, encoders, width=24)
    assert text.components == {**tokenizers, **encoders}
    network = SD3Transformer2DModel(joint_attention_dim=24, num_layers=1, num_attention_heads=1)
    missing = {} if t5 else {"tokenizer_3": None, "text_encoder_3": None}
    pipeline = StableDiffusion3Pipeline(network, None, None, **text.components, **missing)
    wanted, negative, pooled, negative_pooled = pipeline.encode_prompt(CAPTIONS, None, None, device="cpu")
    given = text.batch(None, CAPTIONS, None)
    assert given["encoder_hidden_states"].shape == (3, 12 + 256, 24)
    assert torch.equal(given["encoder_hidden_states"], wanted)
    assert torch.equal(given["pooled_projections"], pooled)
    empty = text.empty()
    torch.testing.assert_close(empty["encoder_hidden_states"], negative[:1])
    torch.testing.assert_close(empty["pooled_projections"], negative_pooled[:1])
    dropped = text.batch(None, CAPTIONS, torch.tensor([False, True, False]))
    torch.testing.assert_close(dropped["pooled_projections"][[0, 1]], torch.stack([pooled[0], negative_pooled[0]]))


def test_embeddings_of_flux_are_those_of_diffusers():
    from diffusers import FluxPipeline

    torch.manual_seed(1)
    pairs = [tiny_clip(8), tiny_t5(24)]
    tokenizers = named("tokenizer", [tokenizer for tokenizer, _ in pairs])
    encoders = named("text_encoder", [encoder for _, encoder in pairs])
    text = FluxText(tokenizers, encoders)
    pipeline = FluxPipeline(None, None, transformer=None, **text.components)
    wanted, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu")
    given = text.batch(None, CAPTIONS, None)
    assert given["encoder_hidden_states"].shape == (3, 512, 24)
    assert torch.equal(given["encoder_hidden_states"], wanted)
    assert torch.equal(given["pooled_projections"], pooled)


def test_long_captions_are_cut_with_a_warning(caplog):
    torch.manual_seed(1)
    (clip_tokenizer, clip), (t5_tokenizer, t5) = tiny_clip(8), tiny_t5(24)
    text = FluxText(
        {"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer}, {"text_encoder": clip, "text_encoder_2": t5}, 20
    )
    with caplog.at_level(logging.WARNING):
        text.batch(None, ["red " * 11], None)
    assert "cut after 12 tokens" in caplog.text


def test_the_fingerprint_depends_on_every_encoder_and_the_lengths():
    torch.manual_seed(1)
    (clip_tokenizer, clip), (t5_tokenizer, t5) = tiny_clip(8), tiny_t5(24)
    tokenizers = {"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer}
    prints = {FluxText(tokenizers, {"text_encoder": clip, "text_encoder_2": t5}, n).fingerprint() for n in (512, 256)}
    torch.nn.init.normal_(next(t5.parameters()))
    prints.add(FluxText(tokenizers, {"text_encoder": clip, "text_encoder_2": t5}).fingerprint())
    assert len(prints) == 3
