"""A codec: blocks of pixels as channels, which needs no weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from robustdiff.codecs.codec import CODECS, Codec, CodecSection


class Blocks(Codec):
    clip = 1.0

    def __init__(self, side):
        self.side = side

    def encoded_shape(self, images):
        return images[0] * self.side**2, images[1] // self.side, images[2] // self.side

    def decoded_shape(self, latents):
        return latents[0] // self.side**2, latents[1] * self.side, latents[2] * self.side

    def encode(self, images, noise=None):
        return pixel_unshuffle(images, self.side)

    def decode(self, latents):
        return pixel_shuffle(latents, self.side)


@CODECS.register("blocks")
class BlocksSection(CodecSection):
    name: Literal["blocks"] = "blocks"
    side: int = Field(2, ge=1)

    def build(self, own):
        return Blocks(self.side)
