"""Codecs: mappings between images and the space in which noise is added.

The pipelines of some families of networks hold their codec. With the other networks, a codec is saved in the folder
``codec`` of the model: ``codec.json`` has the section of a recipe that describes it, and beside it are the files that
the codec writes, such as weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from robustdiff.errors import InputError, first_mistake
from robustdiff.files import write_json
from robustdiff.loading import read_config
from robustdiff.registry import Registry
from robustdiff.section import Named, Section, choice

__all__ = ["CODECS", "Codec", "CodecSection", "Shape", "build_codec", "load_codec", "save_codec"]

Shape = tuple[int, int, int]
"""A shape (C, H, W)."""


class Codec(ABC):
    """A mapping between images (B, C, H, W) in [−1, 1] and latents (B, C', H', W'), the input of a network.

    Attributes:
        clip: The bound c of the range [−c, c] to which samplers clip x̂_0 by default; None if x̂_0 is unbounded.
        random: Whether encoding draws from a distribution.
        identity: Whether the latents are the images themselves, so that a model needs no codec.
        section: The section of a recipe that describes the codec, with which it is saved; None if it is not known.
        components: The components of a diffusers pipeline by name that alone define the codec; empty if it has none.
    """

    clip: float | None = None
    random: bool = False
    identity: bool = False
    section: CodecSection | None = None

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

    def save(self, folder: Path) -> None:  # noqa: B027  (most codecs are defined by their section)
        """Write the files that :meth:`CodecSection.load` needs, such as weights, into a folder.

        Args:
            folder: The folder, which exists. ``codec.json`` is written there by :func:`save_codec`.
        """

    def fingerprint(self) -> str:
        """Return a string that differs between codecs that encode or decode differently.

        By default it is made of the section.
        """
        return (
            type(self).__name__ if self.section is None else f"{type(self).__name__} {self.section.model_dump_json()}"
        )


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

    def load(self, folder: Path) -> Codec:
        """Create the codec of a saved model.

        Args:
            folder: The folder with the files that :meth:`Codec.save` wrote.

        Raises:
            InputError: If a file is missing or malformed.
        """
        return self.build(None)


CODECS: Registry[type[CodecSection]] = Registry("codec", "codecs")
"""The sections ``codec`` of a recipe by the names of the codecs."""

if TYPE_CHECKING:
    _Any = CodecSection
else:
    _Any = choice("codec", CODECS, default="pixels", merged=False)


class _Record(Section):
    codec: _Any


def build_codec(section: CodecSection, own: Codec | None) -> Codec:
    """Create the codec of a recipe, which is saved with the section.

    Args:
        section: The section.
        own: The codec of the checkpoint; None for a new network.

    Raises:
        InputError: If the codec cannot be created.
    """
    codec = section.build(own)
    if codec.section is None:
        codec.section = section
    return codec


def save_codec(codec: Codec, folder: Path) -> None:
    """Write a codec into the folder of a model.

    Raises:
        InputError: If the codec has no section.
    """
    if codec.section is None:
        raise InputError(f"the codec {type(codec).__name__} has no section to be saved with: set its attribute section")
    folder = folder / "codec"
    write_json(folder / "codec.json", _Record(codec=codec.section).model_dump(mode="json"))
    codec.save(folder)


def load_codec(folder: Path) -> Codec | None:
    """Return the codec that :func:`save_codec` wrote into the folder of a model, or None if there is none.

    Raises:
        InputError: If its files are malformed, or no installed package has such a codec.
    """
    path = folder / "codec" / "codec.json"
    if not path.is_file():
        return None
    try:
        section = _Record.model_validate(read_config(path)).codec
    except ValidationError as error:
        mistake = first_mistake(error)
        raise InputError(f"{path}: {mistake}; save the model again, or install the package of its codec") from None
    codec = section.load(path.parent)
    codec.section = codec.section or section
    return codec
