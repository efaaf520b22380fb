"""The codec of models in pixel space."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustdiff.codecs.codec import CODECS, Codec, CodecSection, Shape
from robustdiff.errors import InputError

__all__ = ["Pixels", "PixelsSection"]


class Pixels(Codec):
    """The identity: the latents are the images."""

    clip = 1.0
    identity = True

    def encoded_shape(self, images: Shape) -> Shape:
        return images

    def decoded_shape(self, latents: Shape) -> Shape:
        return latents

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def fingerprint(self) -> str:
        return type(self).__name__  # whether a recipe names it or not


@CODECS.register("pixels")
class PixelsSection(CodecSection):
    """The section ``codec`` of a recipe for pixel space."""

    name: Literal["pixels"] = "pixels"

    def build(self, own: Codec | None) -> Codec:
        if own is not None and not own.identity:
            raise InputError("codec=pixels does not suit a model of latents: leave codec out")
        return Pixels()
