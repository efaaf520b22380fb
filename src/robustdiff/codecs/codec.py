"""Codecs: mappings between images and the space in which noise is added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from robustdiff.registry import Registry
from robustdiff.section import Named

__all__ = ["CODECS", "Codec", "CodecSection", "Shape"]

Shape = tuple[int, int, int]
"""A shape (C, H, W)."""


class Codec(ABC):
    """A mapping between images (B, C, H, W) in [−1, 1] and latents (B, C', H', W'), the input of a network.

    Attributes:
        clip: The bound c of the range [−c, c] to which samplers clip x̂_0 by default; None if x̂_0 is unbounded.
        random: Whether encoding draws from a distribution.
        components: The components of the codec in a pipeline folder by name, as instances of diffusers' classes.
    """

    clip: float | None = None
    random: bool = False

    @property
    def components(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def encoded_shape(self, images: Shape) -> Shape:
        """Return the shape of the latents for images of a shape.

        Raises:
            InputError: If images of this shape cannot be encoded.
        """

    @abstractmethod
    def decoded_shape(self, latents: Shape) -> Shape:
        """Return the shape of the images for latents of a shape."""

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images (B, C, H, W) in [−1, 1] as latents (B, C', H', W').

        Args:
            noise: Standard normal noise of the shape of the result, if the codec is :attr:`random`; drawn by default.
        """

    def moments(self, images: Tensor) -> Tensor:
        """Return the deterministic part of :meth:`encode`, which can be cached.

        Returns:
            The means and then the standard deviations, (B, 2C', H', W'), if the codec is :attr:`random`; otherwise the
            latents (B, C', H', W').
        """
        return self.encode(images)

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return latents (B, C', H', W') as :meth:`encode` does, from the result of :meth:`moments`."""
        return moments

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C', H', W') to images (B, C, H, W), nominally in [−1, 1]."""

    def to(self, device: torch.device | str) -> Codec:
        """Move the network of the codec, if it has one, to a device, and return the codec."""
        return self

    def fingerprint(self) -> str:
        """Return a string that differs between codecs that encode or decode differently."""
        return type(self).__name__


class CodecSection(Named):
    """The section ``codec`` of a recipe. Every subclass has a field ``name``."""

    name: Any

    @property
    def caches(self) -> bool:
        """True if the latents of a dataset are computed once and kept on disk."""
        return False

    def build(self, own: Codec | None) -> Codec:
        """Create the codec.

        Args:
            own: The codec of the checkpoint; None for a new network.

        Raises:
            InputError: If the codec cannot be created.
        """
        raise NotImplementedError


CODECS: Registry[type[CodecSection]] = Registry("codec", "codecs")
"""The sections ``codec`` of a recipe by the names of the codecs."""
