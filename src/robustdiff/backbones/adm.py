"""guided-diffusion (ADM) checkpoints as diffusers UNets, and back, bit for bit.

ADM is the UNet of Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv 2105.05233.
Its checkpoints are state dicts without a description: the flags of the training command say what the network
is. :func:`load_adm` turns such a file and its flags into a `UNet2DModel` with the same outputs;
:func:`save_adm` writes the same file again.

The correspondence. With n = num_res_blocks, level l of L has n residual blocks on the way down and n + 1 on
the way up; ADM numbers the blocks of all levels in one row, its downsampling among them:

    ADM                                  UNet2DModel
    time_embed.0, .2                     time_embedding.linear_1, .linear_2  (cosines first, freq_shift 0)
    label_emb                            class_embedding  (added to the time embedding)
    input_blocks.0.0                     conv_in
    input_blocks.{l(n+1)+j+1}.0, .1      down_blocks.{l}.resnets.{j}, .attentions.{j}
    input_blocks.{(l+1)(n+1)}.0          down_blocks.{l}.downsamplers.0  (a residual block, or a conv: .op)
    middle_block.0, .1, .2               mid_block.resnets.0, .attentions.0, .resnets.1
    output_blocks.{i(n+1)+j}.0, .1       up_blocks.{i}.resnets.{j}, .attentions.{j}  (i = L − 1 − l)
    output_blocks.{i(n+1)+n}.{1 or 2}    up_blocks.{i}.upsamplers.0  (a residual block, or a conv: .conv)
    out.0, out.2                         conv_norm_out, conv_out

and in a residual block and an attention block:

    in_layers.0, in_layers.2             norm1, conv1
    emb_layers.1                         time_emb_proj
    out_layers.0, out_layers.3           norm2, conv2
    skip_connection                      conv_shortcut
    norm, qkv, proj_out                  group_norm, (to_q, to_k, to_v), to_out.0

The rows of qkv are (q|k|v, head, channel) in ADM's new attention order and (head, q|k|v, channel) in the
legacy one. They are permuted at conversion, so no attention code is patched. In the file, qkv and proj_out
are one-dimensional convolutions (two-dimensional in OpenAI's consistency models), in diffusers linear layers.

What `UNet2DModel` cannot express, and :class:`AdmUNet2DModel` adds:

- Heads by number (num_head_channels = −1) when the attention blocks differ in width, as in OpenAI's 128×128
  model: `UNet2DModel` has one head width for the whole network. For the same reason, num_heads_upsample that
  is not num_heads.
- channel_mult that does not start with 1, as in OpenAI's 512×512 model: `UNet2DModel` ties the width of the
  sinusoidal embedding to that of the first level.
- Resampling without parameters (conv_resample = False), which guided-diffusion's classes know and its scripts
  do not.

Every other checkpoint becomes a plain `UNet2DModel`. Three things that the way back needs and no field of its
config holds are kept in the config under `_adm`, which `save_pretrained` writes and `from_pretrained`
restores: the attention order, the dimension of the qkv convolutions, and the types of tensors that are not
float32. A file in half precision is loaded in float32 and written in half precision again.

Super-resolution UNets (`SuperResModel`) and classifiers (`EncoderUNetModel`) are other networks and refused.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

# Not used here: to load a pipeline with a class of ours, diffusers looks for its base by name in our module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from robustdiff.backbones.backbone import BACKBONES
from robustdiff.backbones.unet2d import UNet2D
from robustdiff.errors import InputError
from robustdiff.files import atomic_write
from robustdiff.weights import FLOATS, read_weights

__all__ = [
    "PRESETS",
    "AdmFlags",
    "AdmUNet2DModel",
    "build_adm",
    "load_adm",
    "parse_flags",
    "save_adm",
]

# guided-diffusion's channel_mult by image size; that of 32 is improved-diffusion's, kept by ADM-IP.
_CHANNEL_MULT = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
    32: "1,2,2,2",
}
_GROUPS = 32
_NUM_CLASSES = 1000

_Number = TypeVar("_Number", int, float)

_TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}


@dataclass(frozen=True)
class AdmFlags:
    """The flags that decide an ADM network, with guided-diffusion's names and defaults.

    Args:
        image_size: Side of the images. It decides the empty `channel_mult` and the meaning of
            `attention_resolutions`; the network itself is convolutional.
        num_channels: Base width; level l is channel_mult[l] · num_channels wide.
        num_res_blocks: Residual blocks per level.
        channel_mult: Comma-separated widths of the levels in units of `num_channels`; "" stands for
            guided-diffusion's choice for `image_size` (512, 256, 128, 64 or 32).
        attention_resolutions: Comma-separated sides of the feature maps that get attention; the middle block
            always has it.
        num_heads: Number of attention heads, unless `num_head_channels` is given.
        num_head_channels: Width of one head; −1 leaves it to `num_heads`.
        num_heads_upsample: Number of heads on the way up; −1 is `num_heads`.
        use_scale_shift_norm: The time embedding scales and shifts what is normalised; otherwise it is added.
        resblock_updown: Residual blocks change the resolution; otherwise convolutions do.
        use_new_attention_order: Rows of qkv are ordered (q|k|v, head) instead of (head, q|k|v).
        learn_sigma: The output has twice the channels: prediction and variance values.
        class_cond: The network takes class labels.
        num_classes: How many; None is the file's number, and guided-diffusion's 1000 when there is no file.
        dropout: Rate of the dropout in every residual block.
        conv_resample: Without `resblock_updown`, whether resampling has convolutions; otherwise it is average
            pooling and nearest neighbours. Not a flag of guided-diffusion's scripts, where it is True.

    Raises:
        InputError: A value has the wrong type or no such network exists.
    """

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: str = ""
    attention_resolutions: str = "16,8"
    num_heads: int = 4
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    class_cond: bool = False
    num_classes: int | None = None
    dropout: float = 0.0
    conv_resample: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = getattr(self, field.name), _TYPES[str(field.type)]
            # bool is an int to Python, but num_heads=True is a mistake.
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise InputError(f"{field.name} must be of type {field.type}, got {value!r}")
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_head_channels", "num_heads_upsample"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise InputError(f"{name} must be at least 1, or -1 for none, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.num_classes is not None and not self.class_cond:
            raise InputError(f"num_classes={self.num_classes} needs class_cond=True")
        if self.num_classes is not None and self.num_classes < 1:
            raise InputError(f"num_classes must be at least 1, got {self.num_classes}")
        for width in self.widths:
            if width < _GROUPS or width % _GROUPS:
                raise InputError(
                    f"num_channels={self.num_channels} and channel_mult={self.channel_mult!r} make a level"
                    f" {width} wide, which is no multiple of {_GROUPS}, the groups of ADM's normalisation"
                )
        # The middle block always has attention, at the last width.
        for width, attends in zip(self.widths, (*self.attention[:-1], True), strict=True):
            divisors = {"num_heads": self.num_heads, "num_heads_upsample": self.heads_upsample}
            if self.num_head_channels != -1:
                divisors = {"num_head_channels": self.num_head_channels}
            for name, divisor in divisors.items() if attends else ():
                if width % divisor:
                    raise InputError(f"{name}={divisor} does not divide the width {width} of an attention block")

    @property
    def multipliers(self) -> tuple[float, ...]:
        """`channel_mult` as numbers, its default resolved."""
        text = self.channel_mult or _CHANNEL_MULT.get(self.image_size, "")
        if not text:
            raise InputError(f"channel_mult must be given for image_size={self.image_size}, which has no default")
        multipliers = tuple(_numbers("channel_mult", text, float))
        if not all(0 < multiplier < math.inf for multiplier in multipliers):
            raise InputError(f"channel_mult must be positive, got {text!r}")
        return multipliers

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest resolution first."""
        return tuple(int(multiplier * self.num_channels) for multiplier in self.multipliers)

    @property
    def attention(self) -> tuple[bool, ...]:
        """Whether each level has attention."""
        text = self.attention_resolutions
        sides = _numbers("attention_resolutions", text, int) if text else []
        if any(side < 1 for side in sides):
            raise InputError(f"attention_resolutions must be positive, got {text!r}")
        factors = {self.image_size // side for side in sides}
        return tuple(2**level in factors for level in range(len(self.multipliers)))

    @property
    def heads_upsample(self) -> int:
        """`num_heads_upsample`, its default resolved."""
        return self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample


def _numbers(name: str, text: str, kind: type[_Number]) -> list[_Number]:
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"{name} must be numbers separated by commas, got {text!r}") from None


_GUIDED = AdmFlags(
    num_channels=256,
    image_size=256,
    attention_resolutions="32,16,8",
    num_head_channels=64,
    resblock_updown=True,
    learn_sigma=True,
)
_CONSISTENCY = AdmFlags(
    image_size=64,
    num_channels=192,
    num_res_blocks=3,
    attention_resolutions="32,16,8",
    num_head_channels=64,
    resblock_updown=True,
    use_new_attention_order=True,
    class_cond=True,
)

PRESETS: Mapping[str, AdmFlags] = {
    "cifar10-adm": AdmFlags(
        image_size=32,
        num_res_blocks=3,
        attention_resolutions="16,8",
        num_head_channels=32,
        resblock_updown=True,
        use_new_attention_order=True,
        learn_sigma=True,
        dropout=0.3,
    ),
    "imagenet64-adm": replace(_CONSISTENCY, learn_sigma=True, dropout=0.1),
    "imagenet128-adm": replace(_GUIDED, image_size=128, num_heads=4, num_head_channels=-1, class_cond=True),
    "imagenet256-adm": replace(_GUIDED, class_cond=True),
    "imagenet256-adm-uncond": _GUIDED,
    "imagenet512-adm": replace(_GUIDED, image_size=512, class_cond=True),
    "lsun256-adm": replace(_GUIDED, dropout=0.1),
    "imagenet64-edm": _CONSISTENCY,
    "imagenet64-cm": _CONSISTENCY,
    "lsun256-cm": replace(
        _GUIDED, use_new_attention_order=True, use_scale_shift_norm=False, learn_sigma=False, dropout=0.0
    ),
}
"""The published networks by name.

`cifar10-adm` is the network of the CIFAR-10 checkpoints of ADM-IP (Ning et al. 2023), the other `*-adm` are
guided-diffusion's releases, and `*-edm` and `*-cm` are the EDM and consistency models of Song et al. 2023. These ignore
use_new_attention_order: their flash attention splits q, k and v first, which is the new order. `imagenet64-edm` was
trained with a dropout of 0.1, and has none here: distillation begins with it, and none is what that was published with.
"""

# Flags of guided-diffusion, consistency_models, ADM-IP and ADM-ES that say nothing of the network.
_OTHER_FLAGS = frozenset(
    word
    for words in (
        "diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart sigma_small",
        "rescale_timesteps rescale_learned_sigmas use_checkpoint use_fp16 fp16_scale_growth",
        "data_dir schedule_sampler lr weight_decay lr_anneal_steps batch_size microbatch global_batch_size",
        "ema_rate log_interval save_interval resume_checkpoint",
        "clip_denoised num_samples use_ddim model_path",
        "classifier_path classifier_scale classifier_use_fp16 classifier_width classifier_depth",
        "classifier_attention_resolutions classifier_use_scale_shift_norm classifier_resblock_updown",
        "classifier_pool input_pertub eps_scaler",
        "training_mode weight_schedule sigma_min sigma_max teacher_model_path teacher_dropout",
        "target_ema_mode scale_mode total_training_steps start_ema start_scales end_scales",
        "distill_steps_per_iter loss_norm generator sampler s_churn s_tmin s_tmax s_noise steps seed ts",
        "begin end ref_batch",
    )
    for word in words.split()
)
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def parse_flags(text: str) -> AdmFlags:
    """Read guided-diffusion's flags as one pastes them, a whole command line included.

    Flags of diffusion, training and sampling are skipped. What is not given keeps guided-diffusion's default,
    except that a command of OpenAI's consistency models, recognised by its own flags, means the new attention
    order (see :data:`PRESETS`).

    Args:
        text: For example `MODEL_FLAGS="--image_size 64 --class_cond True"`.

    Raises:
        InputError: A flag is unknown, lacks its value, or has one of the wrong type.
    """
    start = text.find("--")
    if start < 0:
        raise InputError(f"no flags in {text!r}: expected something like --image_size 64 --class_cond True")
    # A command is pasted with its line continuations, and MODEL_FLAGS="…" with the quote that closes it.
    command = text[start:].replace("\\\n", " ").strip().rstrip("\"'`")
    try:
        words = [
            part for word in shlex.split(command) for part in (word.split("=", 1) if word.startswith("--") else [word])
        ]
    except ValueError as error:
        raise InputError(f"cannot read the flags: {error}") from None
    kinds = {field.name: str(field.type) for field in fields(AdmFlags)}
    values: dict[str, Any] = {}
    for flag, value in zip_longest(words[::2], words[1::2]):
        name = flag.removeprefix("--")
        if name == flag:
            raise InputError(f"expected a flag, got {flag!r}")
        if name not in kinds and name not in _OTHER_FLAGS:
            raise InputError(f"unknown flag {flag}")
        if value is None or value.startswith("--"):
            raise InputError(f"{flag} has no value")
        if name in kinds:
            values[name] = _parse(name, value, kinds[name])
    if {"--training_mode", "--weight_schedule"} & set(words):
        values["use_new_attention_order"] = True
    return AdmFlags(**values)


def _parse(name: str, value: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return (*_TRUE, *_FALSE).index(value.lower()) < len(_TRUE)
        return {"str": str, "float": float}.get(kind, int)(value)
    except ValueError:
        raise InputError(f"--{name} must be of type {kind}, got {value!r}") from None


class AdmUNet2DModel(UNet2DModel):
    """`UNet2DModel` with what the rarer ADM networks need on top; the head of this module says which and why.

    A pipeline that holds one loads with `DDPMPipeline.from_pretrained` wherever robustdiff is installed.

    Args:
        model_channels: Width of the sinusoidal time embedding; None is that of the first level.
        attention_head_dim: Width of one attention head, of all levels or of each; the middle is as the last.
        upsample_attention_head_dim: The same on the way up; None is `attention_head_dim`.
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
        _register(
            self,
            model_channels=model_channels,
            attention_head_dim=attention_head_dim,
            upsample_attention_head_dim=upsample_attention_head_dim,
            conv_resample=conv_resample,
        )
        if model_channels is not None:
            time_proj = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.add_module("time_proj", time_proj)
            time_embedding = TimestepEmbedding(model_channels, self.config["time_embedding_dim"])
            self.add_module("time_embedding", time_embedding)
        levels = len(self.down_blocks)
        down_dims = _per_level(attention_head_dim, levels)
        up_dims = _per_level(upsample_attention_head_dim or attention_head_dim, levels)
        blocks: list[Any] = [*self.down_blocks, self.mid_block, *self.up_blocks]
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
        # from_config passes to __init__ what this names, and **unet has no names of its own.
        own: set[str] = UNet2DModel._get_init_keys(input_class)
        inherited: set[str] = UNet2DModel._get_init_keys(UNet2DModel)
        return (own - {"unet"}) | inherited


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _register(unet: Any, **values: Any) -> None:
    unet.register_to_config(**values)  # by way of Any, because diffusers does not type it


# Arguments of UNet2DModel that ADM fixes.
_FIXED: Mapping[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": _GROUPS,
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
_NO_COUNTERPART = "ADM has no counterpart of this UNet"

# What changes the resolution: the block types without attention, and UNet2DModel's word in those with it.
_DOWN_BLOCKS = {"resblock": "ResnetDownsampleBlock2D", "conv": "DownBlock2D", "none": "DownBlock2D"}
_UP_BLOCKS = {"resblock": "ResnetUpsampleBlock2D", "conv": "UpBlock2D", "none": "UpBlock2D"}
_RESAMPLE_TYPES = {"resblock": "resnet", "conv": "conv", "none": "conv"}


class _Tensor(NamedTuple):
    """One tensor of an ADM file and what it is in the UNet."""

    adm: str
    unet: tuple[str, ...]  # one name, or those of q, k and v
    shape: tuple[int, ...]  # in the ADM file
    heads: int = 0  # of q, k and v


@dataclass(frozen=True)
class _Layout:
    """A network's structure, where flags, the config of a UNet and the tensors of a file meet."""

    in_channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    head_dims: tuple[int, ...]  # per level on the way down; the middle is as the last level
    up_head_dims: tuple[int, ...]
    scale_shift: bool
    resample: Literal["resblock", "conv", "none"]
    num_classes: int | None

    @classmethod
    def from_flags(cls, flags: AdmFlags, in_channels: int, num_classes: int | None) -> _Layout:
        widths = flags.widths
        if flags.num_head_channels != -1:
            head_dims = up_head_dims = (flags.num_head_channels,) * len(widths)
        else:
            head_dims = tuple(width // flags.num_heads for width in widths)
            up_head_dims = tuple(width // flags.heads_upsample for width in widths)
        return cls(
            in_channels=in_channels,
            out_channels=in_channels * (2 if flags.learn_sigma else 1),
            model_channels=flags.num_channels,
            widths=widths,
            num_res_blocks=flags.num_res_blocks,
            attention=flags.attention,
            head_dims=head_dims,
            up_head_dims=up_head_dims,
            scale_shift=flags.use_scale_shift_norm,
            resample="resblock" if flags.resblock_updown else "conv" if flags.conv_resample else "none",
            num_classes=(flags.num_classes or num_classes) if flags.class_cond else None,
        )

    @classmethod
    def from_unet(cls, unet: UNet2DModel) -> _Layout:
        config = unet.config
        for name, value in _FIXED.items():
            if config[name] != value and not (name == "act_fn" and config[name] == "swish"):
                raise InputError(f"{_NO_COUNTERPART}: {name} is {config[name]!r}, it would have to be {value!r}")
        widths = tuple(config["block_out_channels"])
        blocks = [*config["down_block_types"][:-1], *config["up_block_types"][:-1]]
        resamples: set[Literal["resblock", "conv", "none"]] = set()
        for block in blocks:
            if block.startswith("Attn"):
                kind = config["downsample_type" if "Down" in block else "upsample_type"]
                resamples.add("resblock" if kind == "resnet" else "conv")
            else:
                resamples.add("resblock" if block.startswith("Resnet") else "conv")
        if len(resamples) > 1:
            raise InputError(f"{_NO_COUNTERPART}: it changes the resolution in several ways, {blocks}")
        resample = resamples.pop() if resamples else "resblock"
        if resample == "conv" and not config.get("conv_resample", True):
            resample = "none"
        head_dim = config["attention_head_dim"]
        head_dims = widths if head_dim is None else _per_level(head_dim, len(widths))
        up_head_dim = config.get("upsample_attention_head_dim")
        return cls(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            model_channels=config.get("model_channels") or widths[0],
            widths=widths,
            num_res_blocks=config["layers_per_block"],
            attention=tuple(block.startswith("Attn") for block in config["down_block_types"]),
            head_dims=head_dims,
            up_head_dims=head_dims if up_head_dim is None else _per_level(up_head_dim, len(widths)),
            scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
            resample=resample,
            num_classes=config["num_class_embeds"],
        )

    def unet(self, sample_size: int, dropout: float) -> UNet2DModel:
        """An untrained UNet of this structure, a plain `UNet2DModel` if that can be."""
        down, up = _DOWN_BLOCKS[self.resample], _UP_BLOCKS[self.resample]
        arguments: dict[str, Any] = {
            **_FIXED,
            "sample_size": sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.num_res_blocks,
            "down_block_types": tuple("AttnDownBlock2D" if attends else down for attends in self.attention),
            "up_block_types": tuple("AttnUpBlock2D" if attends else up for attends in self.attention[::-1]),
            "downsample_type": _RESAMPLE_TYPES[self.resample],
            "upsample_type": _RESAMPLE_TYPES[self.resample],
            "dropout": dropout,
            # UNet2DModel leaves the normalisation out of the middle's attention unless told so.
            "attn_norm_num_groups": _GROUPS,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "num_class_embeds": self.num_classes,
        }
        used = {self.head_dims[-1]}
        for attends, *dims in zip(self.attention, self.head_dims, self.up_head_dims, strict=True):
            used.update(dims if attends else ())
        own_time = self.model_channels != self.widths[0]
        if len(used) == 1 and not own_time and self.resample != "none":
            plain: UNet2DModel = UNet2DModel(attention_head_dim=used.pop(), **arguments)
            return plain
        return AdmUNet2DModel(
            model_channels=self.model_channels if own_time else None,
            time_embedding_dim=4 * self.model_channels if own_time else None,
            attention_head_dim=self.head_dims,
            upsample_attention_head_dim=self.up_head_dims,
            conv_resample=self.resample != "none",
            **arguments,
        )

    def tensors(self, qkv_dims: int = 1) -> Iterator[_Tensor]:
        """The tensors of the ADM file in its order; `qkv_dims` is the dimension of its qkv convolutions."""
        embedding = 4 * self.model_channels
        kernel = (1,) * qkv_dims

        def layer(adm: str, unet: str, *shape: int) -> Iterator[_Tensor]:
            yield _Tensor(f"{adm}.weight", (f"{unet}.weight",), shape)
            yield _Tensor(f"{adm}.bias", (f"{unet}.bias",), shape[:1])

        def resblock(adm: str, unet: str, inputs: int, outputs: int) -> Iterator[_Tensor]:
            yield from layer(f"{adm}.in_layers.0", f"{unet}.norm1", inputs)
            yield from layer(f"{adm}.in_layers.2", f"{unet}.conv1", outputs, inputs, 3, 3)
            modulation = 2 * outputs if self.scale_shift else outputs
            yield from layer(f"{adm}.emb_layers.1", f"{unet}.time_emb_proj", modulation, embedding)
            yield from layer(f"{adm}.out_layers.0", f"{unet}.norm2", outputs)
            yield from layer(f"{adm}.out_layers.3", f"{unet}.conv2", outputs, outputs, 3, 3)
            if inputs != outputs:
                yield from layer(f"{adm}.skip_connection", f"{unet}.conv_shortcut", outputs, inputs, 1, 1)

        def attention(adm: str, unet: str, width: int, head_dim: int) -> Iterator[_Tensor]:
            yield from layer(f"{adm}.norm", f"{unet}.group_norm", width)
            for kind, shape in (("weight", (3 * width, width, *kernel)), ("bias", (3 * width,))):
                names = tuple(f"{unet}.to_{part}.{kind}" for part in "qkv")
                yield _Tensor(f"{adm}.qkv.{kind}", names, shape, heads=width // head_dim)
            yield from layer(f"{adm}.proj_out", f"{unet}.to_out.0", width, width, *kernel)

        def resample(adm: str, convolution: str, unet: str, width: int) -> Iterator[_Tensor]:
            if self.resample == "resblock":
                yield from resblock(adm, unet, width, width)
            elif self.resample == "conv":
                yield from layer(f"{adm}.{convolution}", f"{unet}.conv", width, width, 3, 3)

        yield from layer("time_embed.0", "time_embedding.linear_1", embedding, self.model_channels)
        yield from layer("time_embed.2", "time_embedding.linear_2", embedding, embedding)
        if self.num_classes is not None:
            yield _Tensor("label_emb.weight", ("class_embedding.weight",), (self.num_classes, embedding))

        width = self.widths[0]
        yield from layer("input_blocks.0.0", "conv_in", width, self.in_channels, 3, 3)
        skips, block = [width], 0
        last = len(self.widths) - 1
        for level, outputs in enumerate(self.widths):
            unet = f"down_blocks.{level}"
            for j in range(self.num_res_blocks):
                block += 1
                yield from resblock(f"input_blocks.{block}.0", f"{unet}.resnets.{j}", width, outputs)
                width = outputs
                if self.attention[level]:
                    head_dim = self.head_dims[level]
                    yield from attention(f"input_blocks.{block}.1", f"{unet}.attentions.{j}", width, head_dim)
                skips.append(width)
            if level < last:
                block += 1
                yield from resample(f"input_blocks.{block}.0", "op", f"{unet}.downsamplers.0", width)
                skips.append(width)

        yield from resblock("middle_block.0", "mid_block.resnets.0", width, width)
        yield from attention("middle_block.1", "mid_block.attentions.0", width, self.head_dims[-1])
        yield from resblock("middle_block.2", "mid_block.resnets.1", width, width)

        block = 0
        for i, level in enumerate(reversed(range(last + 1))):
            unet = f"up_blocks.{i}"
            for j in range(self.num_res_blocks + 1):
                adm, outputs = f"output_blocks.{block}", self.widths[level]
                yield from resblock(f"{adm}.0", f"{unet}.resnets.{j}", width + skips.pop(), outputs)
                width = outputs
                if self.attention[level]:
                    head_dim = self.up_head_dims[level]
                    yield from attention(f"{adm}.1", f"{unet}.attentions.{j}", width, head_dim)
                if level > 0 and j == self.num_res_blocks:
                    place = 2 if self.attention[level] else 1
                    yield from resample(f"{adm}.{place}", "conv", f"{unet}.upsamplers.0", width)
                block += 1

        yield from layer("out.0", "conv_norm_out", width)
        yield from layer("out.2", "conv_out", self.out_channels, width, 3, 3)


def _split_qkv(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """(3·heads·channels, *) in the file's order → (3, heads·channels, *), heads within each of q, k and v."""
    if new_order:
        return qkv.reshape(3, -1, *qkv.shape[1:])
    rows = qkv.reshape(heads, 3, -1, *qkv.shape[1:])
    return rows.transpose(0, 1).reshape(3, -1, *qkv.shape[1:])


def _join_qkv(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """The inverse of :func:`_split_qkv`."""
    if not new_order:
        qkv = qkv.reshape(3, heads, -1, *qkv.shape[2:]).transpose(0, 1)
        return qkv.reshape(-1, *qkv.shape[3:])
    return qkv.reshape(-1, *qkv.shape[2:])


def build_adm(flags: AdmFlags, in_channels: int = 3) -> UNet2DModel:
    """An untrained ADM network, initialised as guided-diffusion does.

    That is PyTorch's initialisation everywhere, except that the last layer of every residual block, of every
    attention block and of the network is zero: at first the blocks only pass on and the output is 0.

    Args:
        flags: The network (:data:`PRESETS` has the published ones).
        in_channels: Channels of the images; the output has as many, or twice with `learn_sigma`.

    Returns:
        The UNet in train mode.
    """
    layout = _Layout.from_flags(flags, in_channels, num_classes=_NUM_CLASSES)
    unet = layout.unet(flags.image_size, flags.dropout)
    for name, parameter in unet.named_parameters():
        if name.rsplit(".", 1)[0].endswith((".conv2", ".to_out.0", "conv_out")):
            nn.init.zeros_(parameter)
    _register(unet, _adm=_way_back(flags.use_new_attention_order))
    return unet


def _way_back(new_order: bool, qkv_dims: int = 1, dtypes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `save_adm` needs and the config of a `UNet2DModel` does not say; kept in it as `_adm`."""
    return {"use_new_attention_order": new_order, "qkv_dims": qkv_dims, "dtypes": dict(dtypes or {})}


def _recorded(unet: UNet2DModel) -> tuple[dict[str, Any], dict[str, torch.dtype]]:
    """Return the way back and the types in the config of a `UNet2DModel`, possibly from a file of unknown origin."""
    recorded = unet.config.get("_adm", {})
    way_back = {**_way_back(new_order=True), **(recorded if isinstance(recorded, Mapping) else {})}
    types = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    dtypes = way_back["dtypes"]
    if not (
        isinstance(recorded, Mapping)
        and isinstance(way_back["use_new_attention_order"], bool)
        and way_back["qkv_dims"] in (1, 2)
        and isinstance(dtypes, Mapping)
        and all(isinstance(name, str) and name in types for name in dtypes.values())
    ):
        raise InputError("the UNet's config has an _adm that save_adm does not write: remove it, or convert again")
    return way_back, {name: types[dtype] for name, dtype in dtypes.items()}


def _working_type(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type to compute in: float32, unless there is something wider."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def load_adm(
    path: str | os.PathLike[str],
    image_size: int = 32,
    num_channels: int = 128,
    num_res_blocks: int = 3,
    channel_mult: str = "",
    attention_resolutions: str = "16,8",
    num_heads: int = 4,
    num_head_channels: int = 32,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = True,
    use_new_attention_order: bool = True,
    learn_sigma: bool = True,
    class_cond: bool = False,
    num_classes: int | None = None,
    dropout: float = 0.3,
    num_heads_upsample: int = -1,
    conv_resample: bool = True,
) -> UNet2DModel:
    """Read a guided-diffusion checkpoint (Dhariwal & Nichol 2021) as a diffusers UNet with the same outputs.

    The flags are those of :class:`AdmFlags`; here they default to `PRESETS["cifar10-adm"]`. With others in
    hand, write `load_adm(path, **dataclasses.asdict(flags))`.

    The shapes of the tensors confirm the flags, except those that leave no trace in them: the attention
    order, the number of heads, and the rate of dropout. With a wrong attention order or number of heads the
    network runs and its outputs are wrong; only the training command can tell.

    The number of image channels is the file's, and so is the number of classes unless it is given.

    Args:
        path: The `.pt` or `.safetensors` file: a state dict (an EMA file is one too), or a training script's dict that
            holds one, of which the moving average is read. Prefixes of wrappers are stripped.

    Returns:
        The UNet in eval mode, in float32; call it as `unet(x, t, class_labels=y).sample`. It is a plain
        `UNet2DModel`, or for rare networks its subclass :class:`AdmUNet2DModel`.

    Raises:
        InputError: There is no such file, it is not a guided-diffusion UNet, or the flags do not fit it. The
            message then names the first tensor that differs and the flag that most likely explains it.
    """
    flags = AdmFlags(
        image_size=image_size,
        num_channels=num_channels,
        num_res_blocks=num_res_blocks,
        channel_mult=channel_mult,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        num_classes=num_classes,
        dropout=dropout,
        conv_resample=conv_resample,
    )
    file = _File.read(path)
    if (mismatch := file.mismatch(flags)) is not None:
        raise InputError(_explanation(file, flags, mismatch))
    layout = file.layout(flags)
    working = _working_type(tensor.dtype for tensor in file.state.values())
    weights: dict[str, Tensor] = {}
    for tensor in layout.tensors(file.qkv_dims):
        value = file.state[tensor.adm].to(working, copy=True)  # the file's may be mapped from it
        if tensor.heads:
            parts = _split_qkv(value, tensor.heads, use_new_attention_order)
            # Each on memory of its own, as the parameters of a UNet are.
            weights |= {name: part.clone() for name, part in zip(tensor.unet, parts, strict=True)}
        else:
            weights[tensor.unet[0]] = value
    with torch.device("meta"):
        unet = layout.unet(flags.image_size, flags.dropout)
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters()}
    # A convolution of width 1 in the file is a linear layer in the UNet.
    unet.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()}, assign=True)
    _register(unet, _adm=_way_back(use_new_attention_order, file.qkv_dims, file.dtypes))
    return unet.eval()


def save_adm(unet: UNet2DModel, path: str | os.PathLike[str]) -> None:
    """Write a UNet as a guided-diffusion checkpoint; the inverse of :func:`load_adm`.

    A UNet that `load_adm` made, whether or not it was trained or went through `save_pretrained` and
    `from_pretrained`, is written in the attention order and the tensor types of the file it came from, and in
    guided-diffusion's order of tensors. Any other `UNet2DModel` of ADM's structure is written in the new
    attention order and its own tensor types.

    Args:
        unet: The network. Parameters that were cast, for example by `unet.half()`, are written as they are.
        path: The file to create or replace; it appears whole or not at all.

    Raises:
        InputError: ADM has no counterpart of this UNet, or the folder of `path` does not exist.
    """
    if not isinstance(unet, UNet2DModel):
        raise InputError(f"save_adm needs a diffusers UNet2DModel, got a {type(unet).__name__}")
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {Path(path).parent} does not exist")
    layout = _Layout.from_unet(unet)
    way_back, dtypes = _recorded(unet)
    working = _working_type(dtypes.values())
    weights = {name: value.detach().cpu() for name, value in unet.state_dict().items()}
    state: dict[str, Tensor] = {}
    for tensor in layout.tensors(way_back["qkv_dims"]):
        try:
            parts = [weights.pop(name) for name in tensor.unet]
        except KeyError as error:
            raise InputError(f"{_NO_COUNTERPART}: it lacks {error}, {tensor.adm} in ADM") from None
        if tensor.heads:
            value = _join_qkv(torch.stack(parts), tensor.heads, way_back["use_new_attention_order"])
        else:
            value = parts[0]
        if value.numel() != torch.Size(tensor.shape).numel():
            raise InputError(
                f"{_NO_COUNTERPART}: {tensor.unet[0]} is {tuple(parts[0].shape)}, and {tensor.adm} {tensor.shape}"
            )
        # Only what loading widened is narrowed again.
        dtype = dtypes.get(tensor.adm, dtypes.get("*", working)) if value.dtype == working else value.dtype
        state[tensor.adm] = value.reshape(tensor.shape).to(dtype).contiguous()
    if weights:
        raise InputError(f"{_NO_COUNTERPART}: it has a tensor {next(iter(weights))}")
    with atomic_write(path) as file:
        torch.save(state, file)


# Tensors that every ADM UNet has.
_TIME, _INPUT, _OUTPUT = "time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"
_QKV = "middle_block.1.qkv.weight"


class _Mismatch(NamedTuple):
    """The first place where a file and its flags part. The shape is None where the tensor is not."""

    place: int  # how many tensors agree before it
    tensor: str
    found: tuple[int, ...] | None
    expected: tuple[int, ...] | None


@dataclass(frozen=True)
class _File:
    """A checkpoint as it was read."""

    path: str
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> _File:
        name = os.fspath(path)
        state = read_weights(name)
        for tensor, ndims in ((_TIME, (2,)), (_INPUT, (4,)), (_OUTPUT, (4,)), (_QKV, (3, 4))):
            if tensor not in state or state[tensor].ndim not in ndims:
                raise InputError(f"{name} is not a guided-diffusion UNet checkpoint: no image UNet's {tensor}")
        # Three channels of the image, three of its low resolution.
        if state[_INPUT].shape[1] == 6 and state[_OUTPUT].shape[0] in (3, 6):
            raise InputError(f"{name} is a super-resolution checkpoint, which is another network")
        return cls(name, state)

    @property
    def qkv_dims(self) -> int:
        return self.state[_QKV].ndim - 2

    @property
    def dtypes(self) -> dict[str, str]:
        """The types if not all are float32: the most common one under "*", the others by tensor."""
        names = {name: str(value.dtype).removeprefix("torch.") for name, value in self.state.items()}
        [(common, _)] = Counter(names.values()).most_common(1)
        rare = {name: dtype for name, dtype in names.items() if dtype != common}
        return rare if common == "float32" else {"*": common, **rare}

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.state[name].shape) if name in self.state else None

    def layout(self, flags: AdmFlags) -> _Layout:
        labels = self.shape("label_emb.weight") or (_NUM_CLASSES,)
        return _Layout.from_flags(flags, self.state[_INPUT].shape[1], labels[0])

    def mismatch(self, flags: AdmFlags) -> _Mismatch | None:
        """The first tensor, in the order of a checkpoint, that the flags and the file do not agree about."""
        expected = {tensor.adm: tensor.shape for tensor in self.layout(flags).tensors(self.qkv_dims)}
        for place, (wanted, found) in enumerate(zip_longest(expected, self.state)):
            # When both sides have both names, the file is merely in another order.
            if found is not None and found not in expected and (wanted is None or wanted in self.state):
                return _Mismatch(place, found, self.shape(found), None)
            if wanted is not None and self.shape(wanted) != expected[wanted]:
                return _Mismatch(place, wanted, self.shape(wanted), expected[wanted])
        return None


def _explanation(file: _File, flags: AdmFlags, mismatch: _Mismatch) -> str:
    found = "missing" if mismatch.found is None else str(mismatch.found)
    wanted = "no such tensor" if mismatch.expected is None else str(mismatch.expected)
    text = f"{file.path} does not fit its flags: {mismatch.tensor} is {found} in the file, expected {wanted}"
    contradicted = _contradicted(file, flags)
    for image_size in _CHANNEL_MULT:
        # One wrong image size shows as two or more wrong flags: those that are relative to it.
        resized = _changed(flags, {"image_size": image_size})
        remaining = None if resized is None else _contradicted(file, resized)
        if remaining is not None and len(remaining) < len(contradicted) - 1:
            contradicted = {"image_size": image_size, **remaining}
    if not contradicted:
        return f"{text}; no flag explains it, the file may be of another network"

    def progress(name: str) -> int:
        changed = _changed(flags, {name: contradicted[name]})
        if changed is None:
            return 0
        rest = file.mismatch(changed)
        return len(file.state) if rest is None else rest.place

    # The flag that explains this tensor is the one whose correction moves the first mismatch furthest.
    likely = max(contradicted, key=progress)
    names = [likely, *(name for name in contradicted if name != likely)]
    says = ", ".join(f"{name}={contradicted[name]!r}" for name in names)
    return f"{text}; most likely the flag {likely} is wrong: the file's shapes say {says}"


def _changed(flags: AdmFlags, values: Mapping[str, Any]) -> AdmFlags | None:
    changes = dict(values)
    if changes.get("class_cond") is False:
        changes["num_classes"] = None
    try:
        return replace(flags, **changes)
    except InputError:
        return None


def _contradicted(file: _File, flags: AdmFlags) -> dict[str, Any]:
    """The flags that the file's names and shapes contradict, with the values that they suggest."""
    state = file.state
    values: dict[str, Any] = {}
    values["num_channels"] = channels = state[_TIME].shape[1]
    values["class_cond"] = labelled = "label_emb.weight" in state
    if labelled and flags.num_classes is not None:
        values["num_classes"] = state["label_emb.weight"].shape[0]
    values["learn_sigma"] = state[_OUTPUT].shape[0] == 2 * state[_INPUT].shape[1]
    if (modulation := file.shape("middle_block.0.emb_layers.1.weight")) is not None:
        # The middle attention is as wide as the residual block before it.
        values["use_scale_shift_norm"] = modulation[0] == 2 * state[_QKV].shape[1]

    # The way up shows where a level ends: its last block has an upsampling, numbered after the attention.
    levels: list[tuple[int, int, bool]] = []  # width, residual blocks, attention
    block = first = 0
    while (weight := file.shape(f"output_blocks.{block}.0.out_layers.3.weight")) is not None:
        attends = f"output_blocks.{block}.1.qkv.weight" in state
        upsampling = f"output_blocks.{block}.{2 if attends else 1}"
        residual = f"{upsampling}.in_layers.0.weight" in state
        ends = residual or f"{upsampling}.conv.weight" in state
        if ends:
            values["resblock_updown"] = residual
        block += 1
        if ends or f"output_blocks.{block}.0.out_layers.3.weight" not in state:
            levels.insert(0, (weight[0], block - first - 1, attends))
            first = block
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("input_blocks.")}
    if "resblock_updown" not in values and len(numbers) <= max(numbers):
        # Downsampling without parameters leaves gaps in the numbering, and nothing marks the levels' ends.
        values |= {"resblock_updown": False, "conv_resample": False}
    elif levels:
        values["num_res_blocks"] = levels[0][1]
        multipliers = tuple(width / channels for width, _, _ in levels)
        if multipliers != flags.multipliers:
            values["channel_mult"] = ",".join(f"{multiplier:g}" for multiplier in multipliers)
        attention = tuple(attends for _, _, attends in levels)
        if attention != (flags.attention + (False,) * len(attention))[: len(attention)]:
            sides = [str(flags.image_size >> level) for level, attends in enumerate(attention) if attends]
            values["attention_resolutions"] = ",".join(sides)
    return {name: value for name, value in values.items() if value != getattr(flags, name)}


@BACKBONES.register("adm")
class Adm(UNet2D):
    """An ``AdmUNet2DModel`` on pixels."""

    section = None
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {
        (library, "AdmUNet2DModel"): AdmUNet2DModel
        for library in (AdmUNet2DModel.__module__, "robustdiff.models.adm")  # where it was before
    }
