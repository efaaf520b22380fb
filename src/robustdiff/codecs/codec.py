"""Codecs: the ways between images and the space in which noise is added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from robustdiff.registry import Registry
from robustdiff.section import Named

__all__ = ["CODECS", "Codec", "CodecSection", "Shape"]

Shape = tuple[int, int, int]
"""(C, H, W)."""


class Codec(ABC):
    """The way between images in [−1, 1], (B, C, H, W), and what a network is given, (B, C', H', W').

    Attributes:
        clip: What samplers clip x̂_0 to by default, [−clip, clip]; None where nothing bounds it.
        random: Whether encoding draws from a distribution.
        components: The parts that it has in a pipeline folder, by their names: instances of diffusers' classes.
    """

    clip: float | None = None
    random: bool = False

    @property
    def components(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def encoded_shape(self, images: Shape) -> Shape:
        """Return the shape of what images of a shape are encoded as.

        Raises:
            InputError: If such images cannot be encoded.
        """

    @abstractmethod
    def decoded_shape(self, latents: Shape) -> Shape:
        """Return the shape of the images that are decoded from latents of a shape."""

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images in [−1, 1], (B, C, H, W), as (B, C', H', W').

        Arguments:
            images: The images.
            noise: Standard normal noise of the shape of the result, where the codec is :attr:`random`; none: drawn.
        """

    def moments(self, images: Tensor) -> Tensor:
        """Return what encoding images draws from, which can be kept: of a random codec means and standard deviations.

        Arguments:
            images: In [−1, 1], (B, C, H, W).

        Returns:
            (B, 2C', H', W') of a random codec, the means first; (B, C', H', W') of another.
        """
        return self.encode(images)

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what :meth:`encode` returns, (B, C', H', W'), from what :meth:`moments` returned."""
        return moments

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, C', H', W') to images, nominally in [−1, 1], (B, C, H, W)."""

    def to(self, device: torch.device | str) -> Codec:
        """Move the codec's own network, if it has any, to a device, and return the codec."""
        return self

    def fingerprint(self) -> str:
        """Return what tells this codec from others that encode or decode in another way."""
        return type(self).__name__


class CodecSection(Named):
    """The section ``codec`` of a recipe. Every kind has a ``name``."""

    name: Any

    def build(self, own: Codec | None) -> Codec:
        """Make the codec.

        Arguments:
            own: The codec that the checkpoint comes with; None for a new network.

        Raises:
            InputError: If it cannot be made.
        """
        raise NotImplementedError


CODECS: Registry[type[CodecSection]] = Registry("codec", "codecs")
"""The sections by the names of the codecs."""
