"""Captions encoded by the text encoders of CLIP (Radford et al., 2021, arXiv 2103.00020).

Stable Diffusion 1 and 2 take the last hidden states of one encoder. Stable Diffusion XL (Podell et al., 2023, arXiv
2307.01952) takes the penultimate hidden states of two, side by side, and the projected embedding of the second for the
whole caption. It also takes the original size of an image and the position of its crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.conditions.text import TextCondition, load_text_encoder, load_tokenizer
from robustdiff.errors import InputError

__all__ = ["TOKENIZERS", "ClipText", "TwoClipTexts", "clip_length", "load_clip", "load_two_clips"]

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
"""The classes of CLIP's tokenizers."""


def clip_length(tokenizer: Any, *encoders: Any) -> int:
    """Return the number of tokens of a caption with padding, 77 for the models of OpenAI and OpenCLIP."""
    return int(min(tokenizer.model_max_length, *(encoder.config.max_position_embeddings for encoder in encoders)))


class ClipText(TextCondition):
    """The condition of a network that takes ``encoder_hidden_states`` of one CLIP text encoder.

    Args:
        tokenizer: A tokenizer of transformers.
        encoder: A ``CLIPTextModel`` of transformers.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.length = clip_length(tokenizer, encoder)
        super().__init__({"tokenizer": tokenizer}, {"text_encoder": encoder}, length=self.length)
        self.tokenizer, self.encoder = tokenizer, encoder

    @property
    def width(self) -> int:
        """The number of channels of an embedding."""
        return int(self.encoder.config.hidden_size)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        given = self.tokens("tokenizer", texts, self.length).to(self.encoder.device)
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        mask = given.attention_mask if masked else None
        return {"encoder_hidden_states": self.encoder(given.input_ids, attention_mask=mask)[0]}


class TwoClipTexts(TextCondition):
    """The condition of a network that takes ``encoder_hidden_states`` of two CLIP text encoders, and ``text_embeds``.

    The geometry of the images, if it is known, is passed on as ``geometry``.

    Args:
        tokenizers: Two tokenizers of transformers.
        encoders: A ``CLIPTextModel`` and a ``CLIPTextModelWithProjection`` of transformers.
        zeros: Whether the embeddings of the empty condition are zero, instead of those of the empty caption.

    Raises:
        InputError: If the encoders take different numbers of tokens.
    """

    def __init__(self, tokenizers: tuple[Any, Any], encoders: tuple[Any, Any], zeros: bool = True) -> None:
        self.length, other = (clip_length(*pair) for pair in zip(tokenizers, encoders, strict=True))
        if self.length != other:
            raise InputError(
                f"the first text encoder takes {self.length} tokens and the second {other}: give two that take as many"
            )
        super().__init__(
            dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True)),
            dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=True)),
            length=self.length,
            zeros=zeros,
        )
        self.zeros = zeros

    @property
    def pipeline_settings(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zeros}

    @property
    def width(self) -> int:
        """The number of channels of the embedding of a token, those of both encoders."""
        return sum(int(encoder.config.hidden_size) for encoder in self.encoders.values())

    @property
    def pooled_width(self) -> int:
        """The number of channels of the embedding of a caption."""
        return int(self.encoders["text_encoder_2"].config.projection_dim)

    def batch(
        self,
        labels: Tensor | None,
        captions: Sequence[str] | None,
        dropped: Tensor | None,
        geometry: Tensor | None = None,
    ) -> dict[str, Any]:
        given = super().batch(labels, captions, dropped)
        return given if geometry is None else {**given, "geometry": geometry}

    def empty(self) -> dict[str, Any]:
        given = super().empty()
        return {name: torch.zeros_like(value) for name, value in given.items()} if self.zeros else given

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        hidden: list[Tensor] = []
        for name, encoder in zip(self.tokenizers, self.encoders.values(), strict=True):
            given = self.tokens(name, texts, self.length).to(encoder.device)
            output = encoder(given.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return {"encoder_hidden_states": torch.cat(hidden, dim=-1), "text_embeds": output.text_embeds}


def load_clip(folder: Path) -> ClipText:
    """Load the tokenizer and the text encoder of a pipeline folder, on the CPU, in its own type.

    Raises:
        InputError: If transformers is not installed, or the tokenizer or the encoder cannot be read.
    """
    tokenizer = load_tokenizer(folder, "tokenizer", TOKENIZERS)
    return ClipText(tokenizer, load_text_encoder(folder, "text_encoder", ("CLIPTextModel",)))


def load_two_clips(folder: Path, zeros: bool) -> TwoClipTexts:
    """Load the two tokenizers and text encoders of a pipeline folder, on the CPU, in their own types.

    Args:
        folder: The pipeline folder.
        zeros: Whether the embeddings of the empty condition are zero.

    Raises:
        InputError: If transformers is not installed, or a tokenizer or an encoder cannot be read.
    """
    first, second = (load_tokenizer(folder, name, TOKENIZERS) for name in ("tokenizer", "tokenizer_2"))
    encoder = load_text_encoder(folder, "text_encoder", ("CLIPTextModel",))
    projecting = load_text_encoder(folder, "text_encoder_2", ("CLIPTextModelWithProjection",))
    return TwoClipTexts((first, second), (encoder, projecting), zeros)
