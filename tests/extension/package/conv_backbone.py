"""A backbone: two convolutions with a condition of their own, saved in a DDPMPipeline."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import DDPMPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from pydantic import Field
from tint_condition import Tint
from torch import nn

from robustdiff.backbones.backbone import BACKBONES, Backbone, BackboneSection
from robustdiff.codecs.pixels import Pixels
from robustdiff.errors import InputError
from robustdiff.loading import check_forward, component, load_network


class ConvNet(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self, in_channels: int = 1, out_channels: int = 1, sample_size: int = 8, width: int = 8, classes: int = 1
    ):
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.tint = nn.Linear(classes, width, bias=False)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, t, tint):
        h = self.first(x) + self.tint(tint)[:, :, None, None] + (t / 1000)[:, None, None, None]
        return self.last(torch.tanh(h))


class ConvSection(BackboneSection):
    name: Literal["conv"] = "conv"
    width: int = Field(8, ge=1, le=64)

    def build(self, shape, num_classes, learned_variance):
        if num_classes is None:
            raise InputError("model=conv needs labels, and this data has none: choose data that has them")
        channels, side, _ = shape
        # By name: diffusers' from_config takes arguments that were given by position for defaults.
        network = ConvNet(
            in_channels=channels,
            out_channels=(1 + learned_variance) * channels,
            sample_size=side,
            width=self.width,
            classes=num_classes,
        )
        return Conv(network)


@BACKBONES.register("conv")
class Conv(Backbone):
    section = ConvSection
    part = "unet"
    classes = {("conv_backbone", "ConvNet"): ConvNet}  # noqa: RUF012

    @classmethod
    def load(cls, folder, components, size, place=None):
        def check(network, path):
            config = network.config
            tint = torch.zeros(1, config.classes, device="meta")
            shape = config.in_channels, config.sample_size, config.sample_size
            check_forward(lambda x, t: _Output(network(x, t, tint)), shape, path, doubled=True)

        return cls(load_network(component(folder, cls.part), ConvNet, check=check, place=place)), Pixels()

    def pipeline(self, network, scheduler, codec, condition):
        return DDPMPipeline(network, scheduler)

    def condition(self):
        return Tint(self.network.config.classes)


class _Output:
    def __init__(self, sample):
        self.sample = sample
