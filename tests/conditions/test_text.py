"""Captions as the condition, against the encoding of diffusers' PixArt pipeline."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from robustdiff.conditions.text import Text, load_text
from robustdiff.errors import InputError

transformers = pytest.importorskip("transformers")
WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁blue", "▁shoe", "▁shirt", "s", "h", "o", "e"]


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=12,
        d_kv=6,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    tokenizer = transformers.T5Tokenizer(vocab=[(word, -float(i > 2)) for i, word in enumerate(WORDS)], extra_ids=0)
    return tokenizer, transformers.T5EncoderModel(config)


@pytest.fixture
def text():
    return Text(*tiny_t5(), length=8)


@pytest.fixture
def folder(tmp_path):
    tokenizer, encoder = tiny_t5()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "text_encoder")
    return tmp_path


def test_embeddings_of_tokens_are_those_of_diffusers_and_padding_is_masked(text):
    from diffusers import PixArtAlphaPipeline

    pipeline = PixArtAlphaPipeline(text.tokenizer, text.encoder, None, None, None)
    captions = ["A red shoe ", "a blue shirt", ""]
    wanted, mask, _, _ = pipeline.encode_prompt(captions, False, device="cpu", max_sequence_length=8)
    given = text.batch(None, captions, None)
    assert torch.equal(given["encoder_attention_mask"], mask)
    assert mask.sum(1).tolist()[2] == 1
    torch.testing.assert_close(given["encoder_hidden_states"], wanted * mask[..., None])


def test_what_is_dropped_is_the_empty_caption(text):
    given = text.batch(None, ["a red shoe", "a blue shirt"], torch.tensor([False, True]))
    empty = text.empty()
    for name, value in given.items():
        assert torch.equal(value[1:], empty[name])
        assert not torch.equal(value[:1], empty[name])


def test_a_caption_is_encoded_once_while_there_is_room(text, monkeypatch):
    calls = []
    forward = text.encoder.forward

    def counted(ids, **options):
        calls.append(len(ids))
        return forward(ids, **options)

    monkeypatch.setattr(text.encoder, "forward", counted)
    once = text.batch(None, ["a red shoe"] * 3 + ["A red shoe", "a shirt"], None)
    assert sum(calls) == 2
    again = text.batch(None, ["a shirt", "a red shoe"], None)
    assert sum(calls) == 2
    assert torch.equal(again["encoder_hidden_states"], once["encoder_hidden_states"][[4, 0]])
    monkeypatch.setattr("robustdiff.conditions.text._MOST_BYTES", 0)
    text.batch(None, ["blue"], None)
    text.batch(None, ["blue"], None)
    assert sum(calls) == 4


def test_long_captions_are_cut_with_a_warning(text, caplog):
    with caplog.at_level(logging.WARNING):
        given = text.batch(None, ["red " * 20], None)
    assert given["encoder_attention_mask"].sum() == 8
    assert "cut after 8 tokens" in caplog.text


def test_data_without_captions_is_refused(text):
    text.check(None, True, "m")
    with pytest.raises(InputError, match=r"m needs captions.*metadata\.jsonl"):
        text.check(3, False, "m")


def test_a_folder_is_loaded_as_it_was_saved(folder):
    loaded, wanted = load_text(folder, 8), Text(*tiny_t5(), length=8)
    for name, value in loaded.batch(None, ["a red shoe"], None).items():
        torch.testing.assert_close(value, wanted.batch(None, ["a red shoe"], None)[name])
    assert set(loaded.components) == {"tokenizer", "text_encoder"}
    assert not any(p.requires_grad for p in loaded.encoder.parameters())


def test_what_cannot_be_read_is_refused_in_one_line(folder, monkeypatch):
    path = folder / "text_encoder" / "model.safetensors"
    whole = path.read_bytes()

    def refused(*words):
        with pytest.raises(InputError) as error:
            load_text(folder)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), str(error.value)

    path.write_bytes(whole[:100])
    refused("text_encoder", "download it again")
    path.unlink()
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")
    refused("text_encoder", "safetensors")
    path.write_bytes(whole)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    refused("lacks the weights")
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}, "d_ff": 32})
    )
    refused("text_encoder")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("robustdiff[text]")
