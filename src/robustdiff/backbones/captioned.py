"""Pretrained networks on the latents of a VAE with captions as the condition, what all of them have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from robustdiff.backbones.backbone import Backbone
from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError

__all__ = ["Captioned"]


class Captioned(Backbone):
    """The base class of pretrained networks on the latents of a VAE, with captions as the condition.

    Args:
        network: The network.
        text: The condition, with the text encoders; None for a network alone, which is called with embeddings.
        factor: The downsampling factor of the codec, in pixels per latent on a side.
    """

    stores: ClassVar[frozenset[str]] = frozenset({"vae"})

    def __init__(self, network: Any, text: Condition | None = None, factor: int = 8) -> None:
        super().__init__(network)
        self.text, self.factor = text, factor

    def condition(self) -> Condition:
        if self.text is None:
            raise InputError(f"{type(self.network).__name__} alone has no text encoder: load the whole pipeline folder")
        return self.text
