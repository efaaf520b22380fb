"""An extension of `UNet2DModel` for ADM networks that it cannot represent.

- A fixed number of heads (num_head_channels = −1) in attention blocks of different widths, as in OpenAI's 128×128
  model, or a num_heads_upsample other than num_heads: `UNet2DModel` has one head width for the whole network.
- A channel_mult that does not start with 1, as in OpenAI's 512×512 model: the sinusoidal embedding of `UNet2DModel`
  has the width of the first level.
- Resampling without parameters (conv_resample = False), which guided-diffusion's classes support, but not its scripts.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

# To load a pipeline with this class, diffusers looks up the name of its base class in this module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D

__all__ = ["AdmUNet2DModel", "per_level"]


class AdmUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with configurable attention heads, time embedding and resampling.

    A pipeline with this class loads with `DDPMPipeline.from_pretrained` if robustdiff is installed.

    Args:
        model_channels: Width of the sinusoidal time embedding; None is the width of the first level.
        attention_head_dim: Width of an attention head, for all levels or for each; the middle block uses the last
            level's.
        upsample_attention_head_dim: Width of an attention head on the way up; None is `attention_head_dim`.
        conv_resample: Whether resampling by "conv" has convolutions; otherwise it is average pooling and
            nearest neighbours.
        unet: The arguments of `UNet2DModel`.
    """

    def __init__(
        self,
        *,
        model_channels: int | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        upsample_attention_head_dim: int | tuple[int, ...] | None = None,
        conv_resample: bool = True,
        **unet: Any,
    ) -> None:
        super().__init__(attention_head_dim=None, **unet)
        self.register_to_config(
            model_channels=model_channels,
            attention_head_dim=attention_head_dim,
            upsample_attention_head_dim=upsample_attention_head_dim,
            conv_resample=conv_resample,
        )
        if model_channels is not None:
            self.time_proj = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.time_embedding = TimestepEmbedding(model_channels, self.config["time_embedding_dim"])
        levels = len(self.down_blocks)
        down_dims = per_level(attention_head_dim, levels)
        up_dims = per_level(upsample_attention_head_dim or attention_head_dim, levels)
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        for block, head_dim in zip(blocks, (*down_dims, down_dims[-1], *reversed(up_dims)), strict=True):
            for attention in getattr(block, "attentions", ()):
                attention.heads = attention.sliceable_head_dim = attention.inner_dim // head_dim
                attention.scale = head_dim**-0.5
            if conv_resample:
                continue
            if downsamplers := getattr(block, "downsamplers", None):
                downsamplers[0] = Downsample2D(downsamplers[0].channels, use_conv=False, name="op")
            if upsamplers := getattr(block, "upsamplers", None):
                upsamplers[0] = Upsample2D(upsamplers[0].channels, use_conv=False)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # from_config passes only the arguments named here to __init__, and **unet has no names.
        return (UNet2DModel._get_init_keys(input_class) - {"unet"}) | UNet2DModel._get_init_keys(UNet2DModel)


def per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    """Return a head width for each level, from one width for all levels or one for each."""
    return (value,) * levels if isinstance(value, int) else tuple(value)
