"""Captions as the condition, encoded by a frozen T5 (Raffel et al., 2020, arXiv 1910.10683).

Each distinct caption is encoded once and its token embeddings are cached in memory, up to a limit. Positions after the
last token are masked, and their embeddings are zero.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError, first_line, printable

__all__ = ["Text", "load_text"]

logger = logging.getLogger(__name__)

_BATCH = 32
_MOST_BYTES = 2**32  # size of the cache of embeddings


class Text(Condition):
    """The condition of a network that takes ``encoder_hidden_states`` and ``encoder_attention_mask``.

    Captions are lower-cased and stripped, as in diffusers' PixArt pipelines with ``clean_caption=False``.

    Arguments:
        tokenizer: A tokenizer of transformers.
        encoder: A ``T5EncoderModel`` of transformers. It is put into eval mode, and its parameters do not require
            gradients.
        length: The number of tokens, with padding; longer captions are truncated with a warning.
    """

    def __init__(self, tokenizer: Any, encoder: Any, length: int = 120) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)
        self.length = length
        self._known: dict[str, Tensor] = {}
        self._bytes = 0
        self._warned = False

    @property
    def components(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "text_encoder": self.encoder}

    def to(self, device: torch.device | str) -> Text:
        self.encoder.to(device)
        return self

    def batch(
        self,
        labels: Tensor | None,
        captions: Sequence[str] | None,
        dropped: Tensor | None,
        geometry: Tensor | None = None,
    ) -> dict[str, Any]:
        if captions is None:
            raise InputError("this model is conditioned on captions: give them")
        if dropped is not None:
            captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        return self._embed(captions)

    @property
    def takes_captions(self) -> bool:
        return True

    @property
    def droppable(self) -> bool:
        return True

    def empty(self) -> dict[str, Any]:
        return self._embed([""])

    def check(self, num_classes: int | None, captions: bool, path: str) -> None:
        if not captions:
            raise InputError(
                f"the model {path} needs captions, and this data has none: for an imagefolder write them to "
                'metadata.jsonl, {"file_name": …, "text": …} in each line'
            )

    def _embed(self, captions: Sequence[str]) -> dict[str, Any]:
        """Return the embeddings (B, length, D) in float32 and the mask (B, length), on the device of the encoder."""
        texts = [caption.lower().strip() for caption in captions]
        found = {text: self._known[text] for text in texts if text in self._known}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for start in range(0, len(missing), _BATCH):
            found.update(self._encode(missing[start : start + _BATCH]))
        device = self.encoder.device
        hidden = torch.zeros(len(texts), self.length, self.encoder.config.d_model, device=device)
        mask = torch.zeros(len(texts), self.length, dtype=torch.int64, device=device)
        for row, text in enumerate(texts):
            tokens = found[text]
            hidden[row, : len(tokens)] = tokens.to(device, torch.float32)
            mask[row, : len(tokens)] = 1
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the embeddings of texts, each (tokens, D), and cache them up to the limit."""
        given = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        if not self._warned:
            whole = self.tokenizer(texts).input_ids
            cut = next((text for text, ids in zip(texts, whole, strict=True) if len(ids) > self.length), None)
            if cut is not None:
                self._warned = True
                logger.warning("captions are cut after %d tokens, such as %r", self.length, printable(cut[:100]))
        with torch.autocast(self.encoder.device.type, enabled=False):
            hidden = self.encoder(given.input_ids, attention_mask=given.attention_mask)[0]
        encoded: dict[str, Tensor] = {}
        for text, row, tokens in zip(texts, hidden.cpu(), given.attention_mask.sum(1).tolist(), strict=True):
            encoded[text] = row[:tokens].clone()
            size = encoded[text].nbytes
            if self._bytes + size <= _MOST_BYTES:
                self._known[text] = encoded[text]
                self._bytes += size
        return encoded


def load_text(folder: Path, length: int = 120) -> Text:
    """Load the tokenizer and the T5 encoder of a pipeline folder, on the CPU, in the type of the weights.

    Only classes of transformers are instantiated, from files in the folder, and weights are read from safetensors.

    Arguments:
        folder: The pipeline folder, with ``tokenizer`` and ``text_encoder``.
        length: The number of tokens of a caption.

    Raises:
        InputError: If transformers is not installed, or the tokenizer or the encoder cannot be read.
    """
    try:
        from transformers import T5EncoderModel, T5TokenizerFast
    except ImportError:
        raise InputError(
            "a model that is conditioned on text needs transformers: pip install 'robustdiff[text]'"
        ) from None
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    for name in ("tokenizer", "text_encoder"):
        if not (folder / name).is_dir():
            raise InputError(f"{printable(folder)} has no {name}: download the model again, with all of its folders")
    path = folder / "tokenizer"
    try:
        tokenizer = T5TokenizerFast.from_pretrained(str(path), **options)
        path = folder / "text_encoder"
        encoder, info = T5EncoderModel.from_pretrained(
            str(path), use_safetensors=True, dtype="auto", output_loading_info=True, **options
        )
    except Exception as error:  # for an untrusted file, transformers may raise any error
        reason = printable(first_line(error)[:300])
        raise InputError(
            f"{printable(path)} cannot be read ({reason}): download it again; weights must be safetensors"
        ) from None
    if info["missing_keys"]:
        raise InputError(f"{printable(path)} lacks the weights of {min(info['missing_keys'])}: download it again")
    for name, value in encoder.named_parameters():
        if not value.isfinite().all():
            raise InputError(f"{printable(path)}: {name} has values that are not finite: download it again")
    return Text(tokenizer, encoder, length)
