"""Captions encoded by frozen CLIPs (Radford et al., 2021, arXiv 2103.00020) and a T5, as SD 3 and Flux take them.

Stable Diffusion 3 (Esser et al., 2024, arXiv 2403.03206, section B.3) has two CLIPs and a T5:

    encoder_hidden_states   the penultimate layers of the CLIPs, side by side and padded with zeros to the width of T5,
                            and after these tokens those of T5
    pooled_projections      the projected embeddings of the CLIPs, side by side

Without the T5, zeros stand for its tokens. Flux has one CLIP and a T5:

    encoder_hidden_states   the tokens of T5
    pooled_projections      the embedding of the last token of the CLIP

Padding is not masked. Captions are encoded as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from robustdiff.conditions.clip import TOKENIZERS, clip_length
from robustdiff.conditions.text import TextCondition, load_text_encoder, load_tokenizer
from robustdiff.errors import InputError, printable
from robustdiff.loading import Components

__all__ = ["FluxText", "StableDiffusion3Text", "load_flux_text", "load_sd3_text"]

_T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")


class StableDiffusion3Text(TextCondition):
    """The condition of a network that takes ``encoder_hidden_states`` and ``pooled_projections`` as SD 3 does.

    Args:
        tokenizers: The tokenizers of transformers by name: ``tokenizer``, ``tokenizer_2`` and ``tokenizer_3``.
        encoders: The encoders of transformers by name: ``text_encoder`` and ``text_encoder_2``, which are
            ``CLIPTextModelWithProjection``, and ``text_encoder_3``, a ``T5EncoderModel``. The last, with its tokenizer,
            may be missing.
        width: The width of ``encoder_hidden_states``, which is that of the T5.
        length: The number of tokens of the T5, with padding; longer captions are cut with a warning.
    """

    def __init__(
        self, tokenizers: Mapping[str, Any], encoders: Mapping[str, Any], width: int, length: int = 256
    ) -> None:
        super().__init__(tokenizers, encoders, width=width, length=length)
        self.width, self.length = width, length
        self.clip_length = clip_length(tokenizers["tokenizer"], encoders["text_encoder"], encoders["text_encoder_2"])

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        hidden, pooled = [], []
        for number in ("", "_2"):
            encoder = self.encoders[f"text_encoder{number}"]
            # What CLIP cuts, T5 reads.
            warn = "text_encoder_3" not in self.encoders
            given = self.tokens(f"tokenizer{number}", texts, self.clip_length, warn)
            out = encoder(given.input_ids.to(encoder.device), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        clip = torch.cat(hidden, dim=-1)
        clip = pad(clip, (0, self.width - clip.shape[-1]))
        if "text_encoder_3" in self.encoders:
            t5 = _t5_tokens(self, "_3", texts)
        else:
            t5 = clip.new_zeros(len(texts), self.length, self.width)
        return {
            "encoder_hidden_states": torch.cat([clip, t5], dim=1),
            "pooled_projections": torch.cat(pooled, dim=-1),
        }


class FluxText(TextCondition):
    """The condition of a network that takes ``encoder_hidden_states`` and ``pooled_projections`` as Flux does.

    Args:
        tokenizers: The tokenizers of transformers by name: ``tokenizer`` and ``tokenizer_2``.
        encoders: The encoders of transformers by name: ``text_encoder``, a ``CLIPTextModel``, and ``text_encoder_2``, a
            ``T5EncoderModel``.
        length: The number of tokens of the T5, with padding; longer captions are cut with a warning.
    """

    def __init__(self, tokenizers: Mapping[str, Any], encoders: Mapping[str, Any], length: int = 512) -> None:
        super().__init__(tokenizers, encoders, length=length)
        self.length = length
        self.clip_length = clip_length(tokenizers["tokenizer"], encoders["text_encoder"])

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        encoder = self.encoders["text_encoder"]
        given = self.tokens("tokenizer", texts, self.clip_length, warn=False)  # T5 reads on
        return {
            "encoder_hidden_states": _t5_tokens(self, "_2", texts),
            "pooled_projections": encoder(given.input_ids.to(encoder.device)).pooler_output,
        }


def _t5_tokens(text: Any, number: str, texts: list[str]) -> Tensor:
    """Return the embeddings (B, length, D) of a T5, of padding as well."""
    encoder = text.encoders[f"text_encoder{number}"]
    given = text.tokens(f"tokenizer{number}", texts, text.length)
    hidden: Tensor = encoder(given.input_ids.to(encoder.device))[0]
    return hidden


def load_sd3_text(folder: Path, components: Components, width: int, pooled: int) -> StableDiffusion3Text:
    """Load the tokenizers and encoders of a pipeline folder of Stable Diffusion 3, on the CPU, in their own types.

    Args:
        folder: The pipeline folder.
        components: The components of the pipeline, of which ``text_encoder_3`` and ``tokenizer_3`` may both be missing.
        width: The width of ``encoder_hidden_states`` that the network takes.
        pooled: The width of ``pooled_projections`` that the network takes.

    Raises:
        InputError: If transformers is not installed, a component is missing or cannot be read, or the network takes
            embeddings of other widths.
    """
    tokenizers = {name: load_tokenizer(folder, name, TOKENIZERS) for name in ("tokenizer", "tokenizer_2")}
    kinds = ("CLIPTextModelWithProjection",)
    encoders = {name: load_text_encoder(folder, name, kinds) for name in ("text_encoder", "text_encoder_2")}
    clips = list(encoders.values())
    _check_width(folder, "pooled embeddings", pooled, "the CLIPs make", sum(e.config.projection_dim for e in clips))
    hidden = sum(encoder.config.hidden_size for encoder in clips)
    if hidden > width:
        _check_width(folder, "embeddings", width, "the CLIPs make", hidden)
    if "tokenizer_3" in components or "text_encoder_3" in components:
        tokenizers["tokenizer_3"] = load_tokenizer(folder, "tokenizer_3", _T5_TOKENIZERS)
        t5 = encoders["text_encoder_3"] = load_text_encoder(folder, "text_encoder_3", ("T5EncoderModel",))
        _check_width(folder, "embeddings", width, "text_encoder_3 makes", t5.config.d_model)
    return StableDiffusion3Text(tokenizers, encoders, width)


def load_flux_text(folder: Path, width: int, pooled: int) -> FluxText:
    """Load the tokenizers and encoders of a pipeline folder of Flux, on the CPU, in their own types.

    Args:
        folder: The pipeline folder.
        width: The width of ``encoder_hidden_states`` that the network takes.
        pooled: The width of ``pooled_projections`` that the network takes.

    Raises:
        InputError: If transformers is not installed, a component is missing or cannot be read, or the network takes
            embeddings of other widths.
    """
    tokenizers = {
        "tokenizer": load_tokenizer(folder, "tokenizer", TOKENIZERS),
        "tokenizer_2": load_tokenizer(folder, "tokenizer_2", _T5_TOKENIZERS),
    }
    clip = load_text_encoder(folder, "text_encoder", ("CLIPTextModel",))
    t5 = load_text_encoder(folder, "text_encoder_2", ("T5EncoderModel",))
    _check_width(folder, "pooled embeddings", pooled, "text_encoder makes", clip.config.hidden_size)
    _check_width(folder, "embeddings", width, "text_encoder_2 makes", t5.config.d_model)
    return FluxText(tokenizers, {"text_encoder": clip, "text_encoder_2": t5})


def _check_width(folder: Path, what: str, taken: int, maker: str, made: int) -> None:
    if taken != made:
        raise InputError(
            f"{printable(folder / 'model_index.json')}: the transformer takes {what} of {taken} numbers and {maker} "
            f"{made}: give those that belong together"
        )
