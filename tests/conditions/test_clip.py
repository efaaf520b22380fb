"""Captions encoded by CLIP, beyond what the pipelines of diffusers are compared with in tests/backbones."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from robustdiff.conditions.clip import ClipText, TwoClipTexts
from robustdiff.errors import InputError


def test_a_mask_of_padding_is_passed_on_if_the_encoder_says_so(make_clip: Any) -> None:
    tokenizer, encoder = make_clip()
    given = tokenizer(["red"], padding="max_length", max_length=16, return_tensors="pt")
    found = []
    for masked in (False, True):
        encoder.config.use_attention_mask = masked
        mask = given.attention_mask if masked else None
        with torch.no_grad():
            wanted = encoder(given.input_ids, attention_mask=mask)[0]
            found.append(ClipText(tokenizer, encoder).encode(["red"])["encoder_hidden_states"])
        torch.testing.assert_close(found[-1], wanted)
    assert not torch.equal(*found)
    encoder.config.use_attention_mask = False
    before = ClipText(tokenizer, encoder).fingerprint()
    encoder.config.use_attention_mask = True
    assert ClipText(tokenizer, encoder).fingerprint() != before


def test_a_tokenizer_without_a_length_has_the_encoders(make_clip: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, encoder = make_clip()
    tokenizer.model_max_length = 10**30
    with caplog.at_level(logging.WARNING):
        assert ClipText(tokenizer, encoder).batch(None, ["red " * 20], None)["encoder_hidden_states"].shape == (
            1,
            16,
            12,
        )
    assert "captions are cut after 16 tokens" in caplog.text


def test_parts_that_do_not_belong_together_are_refused(make_clip: Any) -> None:
    tokenizer, encoder = make_clip()
    other, projecting = make_clip(8, 10)
    tokenizer.add_tokens(["more"])
    with pytest.raises(InputError, match="tokenizer has 63 tokens and its text encoder embeds 62"):
        ClipText(tokenizer, encoder)
    other.model_max_length = 12
    with pytest.raises(InputError, match="takes 16 tokens and the second 12"):
        TwoClipTexts((make_clip()[0], other), (encoder, projecting))


def test_two_encoders_have_the_embeddings_of_both(make_clip: Any) -> None:
    (tokenizer, encoder), (other, projecting) = make_clip(), make_clip(8, 10)
    text = TwoClipTexts((tokenizer, other), (encoder, projecting))
    assert (text.width, text.pooled_width) == (20, 10)
    given = text.batch(None, ["red", ""], None)
    assert given["encoder_hidden_states"].shape == (2, 16, 20)
    assert given["text_embeds"].shape == (2, 10)
    assert not any(value.any() for value in text.empty().values())
    assert given["text_embeds"][1].any()  # an empty caption is not the empty condition
    assert text == TwoClipTexts((tokenizer, other), (encoder, projecting))
    assert text != TwoClipTexts((tokenizer, other), (encoder, projecting), zeros=False)
    assert text != ClipText(tokenizer, encoder)
