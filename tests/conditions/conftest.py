"""A T5 and its tokenizer, of a few words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁blue", "▁shoe", "▁shirt", "s", "h", "o", "e"]


@pytest.fixture(scope="session")
def make_t5() -> Callable[..., tuple[Any, Any]]:
    """make_t5(seed=0, words=WORDS, **config): a tokenizer, and a T5 of width 12."""
    transformers = pytest.importorskip("transformers")

    def make(seed: int = 0, words: list[str] = WORDS, **changes: Any) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        config = {
            "vocab_size": len(words),
            "d_model": 12,
            "d_kv": 6,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
        }
        tokenizer = transformers.T5Tokenizer(vocab=[(word, -float(i > 2)) for i, word in enumerate(words)], extra_ids=0)
        return tokenizer, transformers.T5EncoderModel(transformers.T5Config(**{**config, **changes}))

    return make
