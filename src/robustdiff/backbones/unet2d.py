"""``UNet2DModel`` of diffusers, optionally class-conditional (DDPMPipeline, ConsistencyModelPipeline).

It works on pixels, or on the latents of a codec that is saved beside the pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMPipeline
from diffusers.models.unets.unet_2d import UNet2DModel
from pydantic import Field, model_validator
from torch import nn

from robustdiff.backbones.backbone import BACKBONES, Backbone, BackboneSection
from robustdiff.codecs.codec import Codec, Shape
from robustdiff.codecs.pixels import Pixels
from robustdiff.conditions.condition import Condition
from robustdiff.conditions.labels import Labels
from robustdiff.conditions.none import Unconditional
from robustdiff.errors import InputError
from robustdiff.loading import (
    Components,
    Place,
    check_depth,
    check_forward,
    class_parameters,
    component,
    load_network,
    shown,
)
from robustdiff.section import MOST_PARAMETERS, Fraction, Width

__all__ = ["UNet2D", "UNetSection"]

_LARGEST_SIZE = 2**14


class UNetSection(BackboneSection):
    """A new UNet."""

    name: Literal["unet"] = "unet"
    channels: tuple[Width, ...] = Field(
        (64, 128, 128), min_length=1, max_length=16, description="number of channels of each level"
    )
    layers: int = Field(2, ge=1, le=64, description="number of residual blocks in a level")
    attention: tuple[bool, ...] | None = Field(
        None, max_length=16, description="true for each level with attention; by default no level"
    )
    head_width: Width = Field(32, description="channels of an attention head")
    groups: Width = Field(32, description="groups of a group norm; must divide the channels of every level")
    dropout: Fraction = Field(0.0, description="dropout in the residual blocks")
    class_cond: bool = Field(False, description="condition on the labels of the data")

    @model_validator(mode="after")
    def _consistent(self) -> UNetSection:
        if self.condition_dropout and not self.class_cond:
            raise ValueError("model.condition_dropout needs model.class_cond: without labels there are none to drop")
        if self.attention is not None and len(self.attention) != len(self.channels):
            raise ValueError(f"model.attention needs one value for each of the {len(self.channels)} levels")
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"model.channels {width} is not a multiple of model.groups {self.groups}")
        # Two 3×3 convolutions per block on the way down and on the way up, and the time embedding.
        size = sum(2 * (2 * self.layers + 1) * 9 * width**2 for width in self.channels) + 20 * self.channels[0] ** 2
        if size > MOST_PARAMETERS:
            raise ValueError(
                f"model.channels and model.layers make a network of some {size:.0e} parameters, and at most "
                f"{MOST_PARAMETERS:.0e} are made: choose smaller ones"
            )
        return self

    def build(self, shape: Shape, num_classes: int | None, learned_variance: bool) -> UNet2D:
        """Create a new UNet for images of one shape.

        Raises:
            InputError: If the images are not square, their side is not a multiple of 2^(L − 1) for L levels, or labels
                are missing.
        """
        channels, height, width = shape
        levels = len(self.channels)
        if height != width or height % 2 ** (levels - 1):
            raise InputError(
                f"a UNet of {levels} levels cannot take images of {height}×{width}: "
                f"set data.size to a multiple of {2 ** (levels - 1)}, or fewer model.channels"
            )
        if self.class_cond and num_classes is None:
            raise InputError("model.class_cond needs labels, and this data has none: set model.class_cond=false")
        embedded = None
        if self.class_cond and num_classes is not None:
            embedded = num_classes + (self.condition_dropout > 0)  # the last is the null class
        attention = self.attention or (False,) * levels
        # A head wider than its level would give zero heads. The middle block always has attention.
        widths = [self.channels[-1], *(w for w, a in zip(self.channels, attention, strict=True) if a)]
        network = UNet2DModel(
            sample_size=height,
            in_channels=channels,
            out_channels=2 * channels if learned_variance else channels,
            layers_per_block=self.layers,
            block_out_channels=self.channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            attention_head_dim=min(self.head_width, *widths),
            norm_num_groups=self.groups,
            dropout=self.dropout,
            num_class_embeds=embedded,
        )
        return UNet2D(network)


@BACKBONES.register("unet")
class UNet2D(Backbone):
    """A ``UNet2DModel`` on pixels."""

    section: ClassVar[type[BackboneSection] | None] = UNetSection
    part = "unet"
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {("diffusers", "UNet2DModel"): UNet2DModel}

    @classmethod
    def load(
        cls, folder: Path, components: Components, size: int | None, place: Place | None = None
    ) -> tuple[UNet2D, Codec]:
        kind: Any = cls.classes[components[cls.part]]

        def prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
            config["sample_size"] = _checked_size(config.get("sample_size"), size, path)
            blocks = config.get("down_block_types")
            levels, layers = len(blocks) if isinstance(blocks, list) else 0, config.get("layers_per_block", 0)
            if isinstance(layers, int):
                total = max(levels, 1) * max(layers, 1)
                check_depth(total, tensors, f"{levels} levels of layers_per_block={shown(layers)}", path)

        network = load_network(
            component(folder, cls.part),
            kind,
            parameters={**class_parameters(UNet2DModel), **class_parameters(kind)},
            prepare=prepare,
            check=_check,
            place=place,
        )
        return cls(network), Pixels()

    def pipeline(self, network: nn.Module, scheduler: Any, codec: Codec, condition: Condition) -> Any:
        consistency = isinstance(scheduler, CMStochasticIterativeScheduler)
        return (ConsistencyModelPipeline if consistency else DDPMPipeline)(network, scheduler)

    def condition(self) -> Condition:
        embedded = self.network.config.num_class_embeds
        return Unconditional() if embedded is None else Labels(embedded, self.network.config.get("_null_class", False))

    @property
    def multiple(self) -> int:
        """The power 2ⁿ for n downsamplings of the network."""
        return _multiple(self.network)

    def note_classes(self, num_classes: int | None) -> None:
        embedded = self.network.config.num_class_embeds
        if embedded is not None and embedded == (num_classes or 0) + 1:
            self.network.register_to_config(_null_class=True)


def _multiple(network: UNet2DModel) -> int:
    return 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in network.down_blocks)


def _checked_size(own: Any, size: int | None, path: Path) -> Any:
    """Return the ``sample_size`` of a network: the requested size, or else that of its configuration."""
    if size is not None:
        own = size
    sides = own if isinstance(own, list) else [own, own]
    if own is not None and not (len(sides) == 2 and all(type(s) is int and 1 <= s <= _LARGEST_SIZE for s in sides)):
        where = f"{path}: sample_size={shown(own)}" if size is None else f"size {size}"
        raise InputError(f"{where} is no size of images: give one from 1 to {_LARGEST_SIZE} pixels")
    return tuple(own) if isinstance(own, list) else own


def _check(network: UNet2DModel, path: Path) -> None:
    """Check that a network on the meta device takes noisy pixels of its size, a time and optionally a class."""
    config = network.config
    if config.class_embed_type is not None:
        raise InputError(
            f"{path}: class_embed_type={shown(config.class_embed_type)} embeds what is not a class label, which is "
            "not supported: give an unconditional model, or one with num_class_embeds alone"
        )
    if config.in_channels < 1 or config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise InputError(
            f"{path}: {config.in_channels} channels in and {config.out_channels} out: the model takes more than noisy "
            "images (super-resolution, inpainting) or predicts other than noise or images, which is not supported"
        )
    multiple = _multiple(network)
    height, width = UNet2D(network).size or (8 * multiple, 8 * multiple)
    labels = None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.long, device="meta")
    remedy = f"the size must be a multiple of {multiple}" if height % multiple or width % multiple else "correct it"
    check_forward(
        lambda x, t: network(x, t, class_labels=labels),
        (config.in_channels, height, width),
        path,
        doubled=True,
        remedy=remedy,
    )
