"""Families of networks (x, t, condition) ↦ prediction: their creation, loading, calling convention and saving.

A network is stored in a diffusers pipeline folder. The folder's scheduler defines the process and the parameterisation
of the output (:mod:`robustdiff.backbones.kinds`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from robustdiff.backbones.frozen import Quantization
from robustdiff.backbones.lora import LoraSection
from robustdiff.codecs.codec import Codec, Shape
from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError
from robustdiff.loading import Components, Place
from robustdiff.registry import Registry
from robustdiff.section import Fraction, Named, Text, refusal

__all__ = ["BACKBONES", "SECTIONS", "Backbone", "BackboneSection", "PretrainedSection"]


class BackboneSection(Named):
    """The section ``model`` of a recipe, for a new network. Every subclass has a field ``name``."""

    name: Any
    condition_dropout: Fraction = Field(
        0.0, description="fraction of conditions replaced by the empty one, for classifier-free guidance; 0: none"
    )
    lora: LoraSection | None = Field(
        None, description="train a low-rank adapter of the pretrained model; by default all of its weights"
    )
    quantize: Quantization | None = Field(
        None,
        description="type of the frozen weights of linear layers under model.lora: int8, or nf4 of bitsandbytes; by "
        "default that of precision",
    )

    @model_validator(mode="after")
    def _adapts_what_is_there(self) -> BackboneSection:
        if self.lora is not None and self.source is None:
            raise refusal(
                "lora",
                f"a LoRA adapts a pretrained model, and model={self.name} is a new one: set model.name=pretrained and "
                "model.path, or leave model.lora out",
            )
        if self.quantize is not None and self.lora is None:
            raise refusal(
                "quantize",
                "only frozen weights are quantised, and without model.lora all are trained: set model.lora.rank, or "
                "leave model.quantize out",
            )
        return self

    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass, which takes less memory and more time"
    )

    @property
    def source(self) -> str | None:
        """The pretrained model to fine-tune; None for a new network."""
        return None

    @property
    def side(self) -> int | None:
        """The side of the images in pixels, if it differs from that of the pretrained model."""
        return None

    def build(self, shape: Shape, num_classes: int | None, learned_variance: bool) -> Backbone:
        """Create a new network.

        Args:
            shape: The shape (C, H, W) of the network's input.
            num_classes: The number of classes of the data; None if it has no labels.
            learned_variance: Whether the network has 2C output channels.

        Raises:
            InputError: If the network cannot be built for such data.
        """
        raise NotImplementedError

    def configure(self, backbone: Backbone) -> None:
        """Apply the settings of the section to a pretrained network.

        Raises:
            InputError: If the network does not have such a setting.
        """


class PretrainedSection(BackboneSection):
    """The section ``model`` of a recipe that fine-tunes a pretrained network."""

    name: Literal["pretrained"]
    path: Text = Field(description="a run, a pipeline folder, a model shipped with the package, or one of the Hub")
    size: int | None = Field(
        None, ge=1, le=2**16, description="side of the images in pixels, if it differs from the checkpoint's"
    )
    guidance: float | None = Field(
        None, ge=0, description="scale of guidance to train at, for networks that take one (Flux dev); by default 3.5"
    )

    @property
    def source(self) -> str:
        return self.path

    @property
    def side(self) -> int | None:
        return self.size

    def configure(self, backbone: Backbone) -> None:
        if self.guidance is not None:
            if backbone.guidance is None:
                raise InputError(f"the model {self.path} takes no scale of guidance: leave model.guidance out")
            backbone.take_guidance(self.guidance)

    @model_validator(mode="before")
    @classmethod
    def _has_path(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, dict) and value.get("path") is None):
            raise ValueError("a pretrained model needs model.path: a run, a pipeline folder, or the name of a model")
        return value


class Backbone(ABC):
    """A network of one family.

    Args:
        network: The network, an instance of one of :attr:`classes`.

    Attributes:
        section: The section of a recipe that creates a new network; None if the family has pretrained networks only.
        part: The name of the network in a pipeline folder.
        classes: The classes of the network by (library, class) as in ``model_index.json``.
        others: The other components that pipelines of the family may have, besides the scheduler.
        stores: The components of a codec that pipelines of the family hold. With none, a model is saved with any codec,
            beside the pipeline; otherwise with codecs of these components only.
        linear_levels: Whether pipelines of the family give a flow-matching scheduler the levels 1, (S − 1)/S, …, 1/S,
            instead of leaving the choice of S levels to it.
        guidance: The scale of guidance that the network is called with where none is given; None if it takes none.
        square: Whether the network takes square images alone.
    """

    section: ClassVar[type[BackboneSection] | None] = None
    part: ClassVar[str]
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]]
    others: ClassVar[frozenset[str]] = frozenset()
    stores: ClassVar[frozenset[str]] = frozenset()
    linear_levels: ClassVar[bool] = False
    square: ClassVar[bool] = False

    def __init__(self, network: Any) -> None:
        self.network = network
        self.guidance: float | None = None

    @classmethod
    def reads(cls, components: Components) -> bool:
        """Return whether a pipeline with these components belongs to this family."""
        return components.get(cls.part) in cls.classes and set(components) <= {cls.part, "scheduler", *cls.others}

    @classmethod
    @abstractmethod
    def load(
        cls, folder: Path, components: Components, size: int | None, place: Place | None = None
    ) -> tuple[Backbone, Codec]:
        """Load the network of a pipeline folder, on the CPU in float32, and its codec.

        Args:
            folder: The pipeline folder.
            components: The components listed in its ``model_index.json``.
            size: The side of the images in pixels, if the configuration has none or another one is wanted.
            place: The function that places the weights of the network, for other types than float32.

        Raises:
            InputError: If the folder cannot be read.
        """

    @abstractmethod
    def pipeline(self, network: nn.Module, scheduler: Any, codec: Codec, condition: Condition) -> Any:
        """Return the diffusers pipeline to save a network in; ``network`` may be a copy of this backbone's."""

    def stored(self, network: nn.Module) -> nn.Module:
        """Return a network, a copy of this backbone's, as pipelines of the family store it; by default as it is."""
        return network

    def condition(self) -> Condition:
        """Return the condition of the network."""
        raise NotImplementedError

    def bind(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """Return the network, or a wrapper of it, as a function of (x, t, **condition) for objectives and samplers."""
        return network

    def check_scheduler(self, scheduler: Any, path: str) -> None:  # noqa: B027  (most families have any scheduler)
        """Check that pipelines of the family can have a scheduler.

        Args:
            scheduler: The diffusers scheduler.
            path: The name of the model in messages.

        Raises:
            InputError: If they cannot.
        """

    def check_codec(self, codec: Codec, path: str) -> None:
        """Check that the network takes the latents of a codec, and that the two can be saved together.

        Args:
            codec: The codec.
            path: The name of the model in messages.

        Raises:
            InputError: If they do not fit, or the pipelines of the family cannot hold the codec.
        """
        kind = type(self.network).__name__
        if self.stores and set(codec.components) != self.stores:
            remedy = "set codec.name=vae, for a new network with codec.path" if "vae" in self.stores else "choose it"
            raise InputError(
                f"the model {path} is a {kind}, whose pipeline holds a {' and a '.join(sorted(self.stores))}, and its "
                f"codec is {type(codec).__name__}: {remedy}"
            )
        latents = self.channels, *(self.size or (self.multiple, self.multiple))
        if codec.encoded_shape(codec.decoded_shape(latents)) != latents:
            raise InputError(
                f"the model {path} takes {latents[0]} channels, and latents of its codec {type(codec).__name__} have "
                "another number: choose the codec that the model was trained with"
            )

    def embed_guidance(self, scale: float, like: Tensor) -> dict[str, Tensor] | None:
        """Return the arguments by which the network itself takes a scale of guidance, in training and in sampling.

        Args:
            scale: The scale.
            like: The input of the network, with shape (B, C, H, W).

        Returns:
            Tensors with B rows by argument; None if the network takes no scale, so that guidance is classifier-free.

        Raises:
            InputError: If the scale is out of range.
        """
        return None

    def take_guidance(self, scale: float) -> None:
        """Set the scale of guidance that the network is called with where none is given; it is saved with the network.

        Raises:
            InputError: If the network takes none.
        """
        raise InputError(f"{type(self.network).__name__} takes no scale of guidance: leave model.guidance out")

    @property
    def tokens(self) -> int | None:
        """The number of tokens of an input, by which schedulers shift times dynamically; None if there are none."""
        return None

    def corrected(self, scheduler: Any) -> Any:
        """Return a scheduler with the settings that the pipelines of the family use in place of its own."""
        return scheduler

    def with_guidance_embedding(self, width: int, scales: tuple[float, float] | None = None) -> Backbone:
        """Return the backbone of a network that also takes an embedding of the guidance scale, ``timestep_cond``.

        The other weights of the network are copies of this one's.

        Args:
            width: The number of channels of the embedding.
            scales: The range of scales that the network will be trained at, which is saved with it.

        Raises:
            InputError: If the family has no such networks, or this network takes embeddings of another width.
        """
        raise InputError(
            f"{type(self.network).__name__} takes no embedding of the guidance scale: train a LoRA instead"
        )

    @property
    def channels(self) -> int:
        """The number of input channels of the network."""
        return int(self.network.config.in_channels)

    @property
    def learned_variance(self) -> bool:
        """True if the network has 2C output channels, the second half of which is a learned variance."""
        return bool(self.network.config.out_channels == 2 * self.network.config.in_channels)

    @property
    def guidance_embedding(self) -> int | None:
        """The width of the embedding of the guidance strength that the network takes as ``timestep_cond``, or None."""
        return None

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The range of guidance scales that the network was trained at; None if it is not known, or it embeds none."""
        return None

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) of the network's input; None if its configuration has none."""
        size = self.network.config.sample_size
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def multiple(self) -> int:
        """The number by which the height and width of the network's input must be divisible."""
        return 1

    def take_size(self, height: int, width: int) -> None:
        """Set the size of the network's input if its configuration has none."""
        self.network.register_to_config(sample_size=height if height == width else (height, width))

    def check_shape(self, shape: Shape, codec: Codec, path: str) -> None:
        """Check that the network takes images of a shape (C, H, W) in pixels; a network without a size gets theirs.

        Raises:
            InputError: If the network does not take such images.
        """
        channels, height, width = shape
        latents = (self.channels, *(self.size or codec.encoded_shape(shape)[1:]))
        wanted = codec.decoded_shape(latents)
        if wanted[0] != channels:
            remedy = f"set data.channels={wanted[0]}" if wanted[0] in (1, 3) else "only grey and colour images are read"
            raise InputError(f"the model {path} takes {wanted[0]} channels and the data has {channels}: {remedy}")
        if self.size is None:
            if any(side % self.multiple for side in latents[1:]):
                raise InputError(
                    f"the model {path} takes sides that are multiples of {self.multiple * height // latents[1]}, the "
                    f"data has {height}×{width}: set data.size to such a number"
                )
            self.take_size(latents[1], latents[2])
        elif (height, width) != wanted[1:]:
            square = wanted[1] == wanted[2]
            remedy = f"set data.size={wanted[1]}" if square else "give images of that height and width"
            raise InputError(
                f"the model {path} takes images of {wanted[1]}×{wanted[2]}, the data has {height}×{width}: {remedy}"
            )

    def note_classes(self, num_classes: int | None) -> None:  # noqa: B027  (for class-conditional networks)
        """Store the number of classes of the data, so that the null class, which follows them, is never sampled."""


BACKBONES: Registry[type[Backbone]] = Registry("model", "backbones")
"""The families of networks by name."""


class _Sections(Mapping[str, type[BackboneSection]]):
    def _all(self) -> dict[str, type[BackboneSection]]:
        new = {name: family.section for name, family in BACKBONES.items() if family.section is not None}
        return {"pretrained": PretrainedSection, **new}

    def __getitem__(self, name: str) -> type[BackboneSection]:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


SECTIONS: Mapping[str, type[BackboneSection]] = _Sections()
"""The sections ``model`` of a recipe by name: a pretrained network, or a new network of each family."""
