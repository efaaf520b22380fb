"""Captions encoded by a T5, against the encoding of diffusers' PixArt pipeline."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from robustdiff.conditions.t5 import T5Text, load_t5
from robustdiff.errors import InputError


@pytest.fixture
def text(make_t5):
    return T5Text(*make_t5(), length=8)


@pytest.fixture
def folder(tmp_path, make_t5):
    tokenizer, encoder = make_t5()
    index = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
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


def test_long_captions_are_cut_with_a_warning(text, caplog):
    with caplog.at_level(logging.WARNING):
        given = text.batch(None, ["red " * 20], None)
    assert given["encoder_attention_mask"].sum() == 8
    assert "cut after 8 tokens" in caplog.text


def test_a_folder_is_loaded_as_it_was_saved(folder, text):
    loaded = load_t5(folder, 8)
    for name, value in loaded.batch(None, ["a red shoe"], None).items():
        torch.testing.assert_close(value, text.batch(None, ["a red shoe"], None)[name])
    assert set(loaded.components) == {"tokenizer", "text_encoder"}
    assert not any(p.requires_grad for p in loaded.encoder.parameters())


def test_what_cannot_be_read_is_refused_in_one_line(folder, monkeypatch):
    path = folder / "text_encoder" / "model.safetensors"
    whole = path.read_bytes()
    index = folder / "model_index.json"
    components = json.loads(index.read_text())

    def refused(*words):
        with pytest.raises(InputError) as error:
            load_t5(folder)
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
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    index.write_text(json.dumps({**components, "text_encoder": ["os", "system"]}))
    refused("text_encoder is system of os", "only T5EncoderModel")
    del components["tokenizer"]
    index.write_text(json.dumps(components))
    refused("has no tokenizer")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("install the extra text (pip install '.[text]'")


def test_weights_of_a_variant_are_read_where_there_are_no_others(folder, text):
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    torch.testing.assert_close(load_t5(folder, 8).encoder.state_dict(), text.encoder.state_dict())
