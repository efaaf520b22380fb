"""The correspondence of tensors between an ADM file and a `UNet2DModel`.

With n = num_res_blocks, level l of L has n residual blocks on the way down and n + 1 on the way up; ADM numbers the
blocks of all levels consecutively, and counts downsampling as a block:

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

The rows of qkv are (q|k|v, head, channel) in ADM's new attention order and (head, q|k|v, channel) in the legacy order.
The conversion permutes them. In the file, qkv and proj_out are one-dimensional convolutions (two-dimensional in
OpenAI's consistency models), in diffusers linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from diffusers.models.unets.unet_2d import UNet2DModel

from robustdiff.backbones.adm.flags import GROUPS, AdmFlags
from robustdiff.backbones.adm.network import AdmUNet2DModel, per_level
from robustdiff.errors import InputError

__all__ = ["INPUT", "NO_COUNTERPART", "OUTPUT", "QKV", "TIME", "Layout", "Shapes", "TensorLayout"]

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of the tensors in a file by name, in the order of the file."""

NO_COUNTERPART = "ADM has no counterpart of this UNet"

# Tensors that every ADM UNet has.
TIME, INPUT, OUTPUT = "time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"
QKV = "middle_block.1.qkv.weight"

_Resample = Literal["resblock", "conv", "none"]

# Arguments of UNet2DModel that are the same for all ADM networks.
_FIXED: Mapping[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": GROUPS,
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}


class TensorLayout(NamedTuple):
    """A tensor of an ADM file and its place in the UNet."""

    adm: str
    unet: tuple[str, ...]  # one name, or the names of q, k and v
    shape: tuple[int, ...]  # in the ADM file
    heads: int = 0  # number of heads if the tensor is qkv


@dataclass(frozen=True)
class Layout:
    """The structure of a network, which determines the UNet and the tensors of a file."""

    in_channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    head_dims: tuple[int, ...]  # per level on the way down; the middle block uses the last level's
    up_head_dims: tuple[int, ...]
    scale_shift: bool
    resample: _Resample
    num_classes: int | None
    qkv_dims: int = 1  # the dimension of the file's qkv convolutions

    @classmethod
    def from_flags(cls, flags: AdmFlags, in_channels: int = 3, num_classes: int = 1000, qkv_dims: int = 1) -> Layout:
        """Return the structure of a network with these flags; `num_classes` is the default for theirs."""
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
            qkv_dims=qkv_dims,
        )

    @classmethod
    def from_shapes(cls, flags: AdmFlags, shapes: Shapes) -> Layout:
        """Return the structure of a network with these flags, with the channels and classes of a file."""
        classes = shapes.get("label_emb.weight", (1000,))[0]
        return cls.from_flags(flags, shapes[INPUT][1], classes, len(shapes[QKV]) - 2)

    @classmethod
    def from_unet(cls, unet: UNet2DModel, qkv_dims: int = 1) -> Layout:
        """Return the structure of a UNet.

        Raises:
            InputError: ADM has no such network.
        """
        config = unet.config
        for name, value in _FIXED.items():
            if config[name] != value and not (name == "act_fn" and config[name] == "swish"):
                raise InputError(f"{NO_COUNTERPART}: {name} is {config[name]!r}, it would have to be {value!r}")
        widths = tuple(config["block_out_channels"])
        blocks = [*config["down_block_types"][:-1], *config["up_block_types"][:-1]]
        residual = {
            config["downsample_type" if "Down" in block else "upsample_type"] == "resnet"
            if block.startswith("Attn")
            else block.startswith("Resnet")
            for block in blocks
        }
        if len(residual) > 1:
            raise InputError(f"{NO_COUNTERPART}: it changes the resolution in several ways, {blocks}")
        convolutional: _Resample = "conv" if config.get("conv_resample", True) else "none"
        head_dim = config["attention_head_dim"]
        head_dims = widths if head_dim is None else per_level(head_dim, len(widths))
        up_head_dim = config.get("upsample_attention_head_dim")
        return cls(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            model_channels=config.get("model_channels") or widths[0],
            widths=widths,
            num_res_blocks=config["layers_per_block"],
            attention=tuple(block.startswith("Attn") for block in config["down_block_types"]),
            head_dims=head_dims,
            up_head_dims=head_dims if up_head_dim is None else per_level(up_head_dim, len(widths)),
            scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
            resample=convolutional if residual == {False} else "resblock",
            num_classes=config["num_class_embeds"],
            qkv_dims=qkv_dims,
        )

    def unet(self, sample_size: int, dropout: float) -> UNet2DModel:
        """Return an untrained UNet of this structure, of class `UNet2DModel` if possible."""
        residual = self.resample == "resblock"
        down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
        arguments: dict[str, Any] = {
            **_FIXED,
            "sample_size": sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.num_res_blocks,
            "down_block_types": tuple("AttnDownBlock2D" if attends else down for attends in self.attention),
            "up_block_types": tuple("AttnUpBlock2D" if attends else up for attends in self.attention[::-1]),
            "downsample_type": "resnet" if residual else "conv",
            "upsample_type": "resnet" if residual else "conv",
            "dropout": dropout,
            # By default UNet2DModel has no normalisation in the attention of the middle block.
            "attn_norm_num_groups": GROUPS,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "num_class_embeds": self.num_classes,
        }
        used = {self.head_dims[-1]}
        for attends, *dims in zip(self.attention, self.head_dims, self.up_head_dims, strict=True):
            used.update(dims if attends else ())
        own_time = self.model_channels != self.widths[0]
        if len(used) == 1 and not own_time and self.resample != "none":
            return UNet2DModel(attention_head_dim=used.pop(), **arguments)
        return AdmUNet2DModel(
            model_channels=self.model_channels if own_time else None,
            time_embedding_dim=4 * self.model_channels if own_time else None,
            attention_head_dim=self.head_dims,
            upsample_attention_head_dim=self.up_head_dims,
            conv_resample=self.resample != "none",
            **arguments,
        )

    def tensors(self) -> Iterator[TensorLayout]:
        """Yield the tensors of the ADM file in its order."""
        embedding = 4 * self.model_channels
        kernel = (1,) * self.qkv_dims

        def layer(adm: str, unet: str, *shape: int) -> Iterator[TensorLayout]:
            yield TensorLayout(f"{adm}.weight", (f"{unet}.weight",), shape)
            yield TensorLayout(f"{adm}.bias", (f"{unet}.bias",), shape[:1])

        def resblock(adm: str, unet: str, inputs: int, outputs: int) -> Iterator[TensorLayout]:
            yield from layer(f"{adm}.in_layers.0", f"{unet}.norm1", inputs)
            yield from layer(f"{adm}.in_layers.2", f"{unet}.conv1", outputs, inputs, 3, 3)
            modulation = 2 * outputs if self.scale_shift else outputs
            yield from layer(f"{adm}.emb_layers.1", f"{unet}.time_emb_proj", modulation, embedding)
            yield from layer(f"{adm}.out_layers.0", f"{unet}.norm2", outputs)
            yield from layer(f"{adm}.out_layers.3", f"{unet}.conv2", outputs, outputs, 3, 3)
            if inputs != outputs:
                yield from layer(f"{adm}.skip_connection", f"{unet}.conv_shortcut", outputs, inputs, 1, 1)

        def attention(adm: str, unet: str, width: int, head_dim: int) -> Iterator[TensorLayout]:
            yield from layer(f"{adm}.norm", f"{unet}.group_norm", width)
            for kind, shape in (("weight", (3 * width, width, *kernel)), ("bias", (3 * width,))):
                names = tuple(f"{unet}.to_{part}.{kind}" for part in "qkv")
                yield TensorLayout(f"{adm}.qkv.{kind}", names, shape, heads=width // head_dim)
            yield from layer(f"{adm}.proj_out", f"{unet}.to_out.0", width, width, *kernel)

        def resample(adm: str, convolution: str, unet: str, width: int) -> Iterator[TensorLayout]:
            if self.resample == "resblock":
                yield from resblock(adm, unet, width, width)
            elif self.resample == "conv":
                yield from layer(f"{adm}.{convolution}", f"{unet}.conv", width, width, 3, 3)

        yield from layer("time_embed.0", "time_embedding.linear_1", embedding, self.model_channels)
        yield from layer("time_embed.2", "time_embedding.linear_2", embedding, embedding)
        if self.num_classes is not None:
            yield TensorLayout("label_emb.weight", ("class_embedding.weight",), (self.num_classes, embedding))

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
