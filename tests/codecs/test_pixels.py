"""The identity, as a codec."""

from __future__ import annotations

import pytest
import torch

from robustdiff.codecs.codec import CODECS, Codec
from robustdiff.codecs.pixels import Pixels
from robustdiff.errors import InputError


def test_pixels_are_their_own_latents():
    images, codec = torch.rand(2, 3, 4, 4), Pixels()
    assert codec.encode(images) is images
    assert codec.decode(images) is images
    assert codec.encoded_shape((3, 4, 4)) == codec.decoded_shape((3, 4, 4)) == (3, 4, 4)
    assert codec.clip == 1.0
    assert codec.to("cpu") is codec
    assert codec.components == {}
    assert codec.identity


def test_a_model_of_latents_keeps_its_codec():
    section = CODECS["pixels"](name="pixels")
    assert isinstance(section.build(None), Pixels)
    assert isinstance(section.build(Pixels()), Pixels)

    class Latents(Pixels):
        identity = False

    latents: Codec = Latents()
    with pytest.raises(InputError, match="codec=pixels does not suit"):
        section.build(latents)
