"""Captions encoded by a frozen T5 (Raffel et al., 2020, arXiv 1910.10683), as PixArt takes them.

Positions after the last token are masked, and their embeddings are zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from robustdiff.conditions.text import TextCondition, load_text_encoder, load_tokenizer

__all__ = ["T5Text", "load_t5"]


class T5Text(TextCondition):
    """The condition of a network that takes ``encoder_hidden_states`` and ``encoder_attention_mask``.

    Captions are lower-cased and stripped, as in diffusers' PixArt pipelines with ``clean_caption=False``.

    Args:
        tokenizer: A tokenizer of transformers.
        encoder: A ``T5EncoderModel`` of transformers.
        length: The number of tokens, with padding; longer captions are truncated with a warning.
    """

    def __init__(self, tokenizer: Any, encoder: Any, length: int = 120) -> None:
        super().__init__({"tokenizer": tokenizer}, {"text_encoder": encoder}, length=length)
        self.tokenizer, self.encoder, self.length = tokenizer, encoder, length

    def normalise(self, text: str) -> str:
        return text.lower().strip()

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        given = self.tokens("tokenizer", texts, self.length).to(self.encoder.device)
        hidden = self.encoder(given.input_ids, attention_mask=given.attention_mask)[0]
        hidden = hidden.masked_fill(given.attention_mask[..., None] == 0, 0)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": given.attention_mask}


def load_t5(folder: Path, length: int = 120) -> T5Text:
    """Load the tokenizer and the T5 encoder of a pipeline folder, on the CPU, in its own type.

    Args:
        folder: The pipeline folder, with ``tokenizer`` and ``text_encoder``.
        length: The number of tokens of a caption.

    Raises:
        InputError: If transformers is not installed, or the tokenizer or the encoder cannot be read.
    """
    tokenizer = load_tokenizer(folder, "tokenizer", ("T5Tokenizer", "T5TokenizerFast"))
    return T5Text(tokenizer, load_text_encoder(folder, "text_encoder", ("T5EncoderModel",)), length)
