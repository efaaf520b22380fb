"""The flags that define an ADM network, the flags of published networks, and a parser for command lines."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any, TypeVar

from robustdiff.errors import InputError

__all__ = ["CHANNEL_MULT", "GROUPS", "PRESETS", "AdmFlags", "parse_flags", "read_command"]

CHANNEL_MULT = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
    32: "1,2,2,2",
}
"""guided-diffusion's channel_mult by image size; the one for 32 is from improved-diffusion and used by ADM-IP."""

GROUPS = 32
"""The number of groups in every group norm."""

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
    """The flags of a network, with guided-diffusion's names and defaults.

    Args:
        image_size: Side of the images. It determines the default of `channel_mult` and the meaning of
            `attention_resolutions`; the network itself is convolutional.
        num_channels: Base width; level l has channel_mult[l] · num_channels channels.
        num_res_blocks: Residual blocks per level.
        channel_mult: Comma-separated widths of the levels in units of `num_channels`; "" is guided-diffusion's
            default for `image_size` (512, 256, 128, 64 or 32).
        attention_resolutions: Comma-separated sides of the feature maps with attention; the middle block always has
            attention.
        num_heads: Number of attention heads, unless `num_head_channels` is given.
        num_head_channels: Width of one head; −1 uses `num_heads` instead.
        num_heads_upsample: Number of heads on the way up; −1 is `num_heads`.
        use_scale_shift_norm: Whether the time embedding scales and shifts the normalised activations; otherwise it is
            added.
        resblock_updown: Whether residual blocks change the resolution; otherwise convolutions do.
        use_new_attention_order: Whether rows of qkv are ordered (q|k|v, head); otherwise (head, q|k|v).
        learn_sigma: Whether the output has twice the channels, for the prediction and the variance.
        class_cond: Whether the network takes class labels.
        num_classes: Number of classes; None is the number in the file, or guided-diffusion's 1000 without a file.
        dropout: Dropout rate in every residual block.
        conv_resample: Without `resblock_updown`, whether resampling has convolutions; otherwise it is average
            pooling and nearest neighbours. guided-diffusion's scripts have no such flag and use True.

    Raises:
        InputError: A value has the wrong type, or the flags define no valid network.
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
            # In Python a bool is an int, but num_heads=True is an error.
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
            if width < GROUPS or width % GROUPS:
                raise InputError(
                    f"num_channels={self.num_channels} and channel_mult={self.channel_mult!r} make a level"
                    f" {width} wide, which is no multiple of {GROUPS}, the groups of ADM's normalisation"
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
        """Widths of the levels in units of `num_channels`, with the default resolved."""
        text = self.channel_mult or CHANNEL_MULT.get(self.image_size, "")
        if not text:
            raise InputError(f"channel_mult must be given for image_size={self.image_size}, which has no default")
        multipliers = tuple(_numbers("channel_mult", text, float))
        if not all(0 < multiplier < math.inf for multiplier in multipliers):
            raise InputError(f"channel_mult must be positive, got {text!r}")
        return multipliers

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels of each level, the finest resolution first."""
        return tuple(int(multiplier * self.num_channels) for multiplier in self.multipliers)

    @property
    def attention(self) -> tuple[bool, ...]:
        """True for each level that has attention."""
        text = self.attention_resolutions
        sides = _numbers("attention_resolutions", text, int) if text else []
        if any(side < 1 for side in sides):
            raise InputError(f"attention_resolutions must be positive, got {text!r}")
        factors = {self.image_size // side for side in sides}
        return tuple(2**level in factors for level in range(len(self.multipliers)))

    @property
    def heads_upsample(self) -> int:
        """Number of heads on the way up, with the default resolved."""
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

`cifar10-adm` is the network of the CIFAR-10 checkpoints of ADM-IP (Ning et al. 2023,
https://github.com/forever208/DDPM-IP), the other `*-adm` are
guided-diffusion's releases, and `*-edm` and `*-cm` are the EDM and consistency models of Song et al. 2023. The models
of Song et al. ignore use_new_attention_order: their flash attention always uses the new order. `imagenet64-edm` was
trained with a dropout of 0.1; here it is 0, the published value for the distillation of consistency models from it.
"""

# Flags of guided-diffusion, consistency_models, ADM-IP and ADM-ES that do not affect the network.
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
    """Parse guided-diffusion's flags from a command line or a part of one.

    Flags of diffusion, training and sampling are skipped. Missing flags have guided-diffusion's defaults, except that a
    command of OpenAI's consistency models, recognised by its own flags, implies the new attention order (see
    :data:`PRESETS`).

    Args:
        text: The flags, for example `MODEL_FLAGS="--image_size 64 --class_cond True"`.

    Raises:
        InputError: A flag is unknown, has no value, or has a value of the wrong type.
    """
    command = read_command(text)
    values = {
        field.name: _parse(field.name, command[field.name], str(field.type))
        for field in fields(AdmFlags)
        if field.name in command
    }
    if {"training_mode", "weight_schedule"} & set(command):
        values["use_new_attention_order"] = True
    return AdmFlags(**values)


def read_command(text: str) -> dict[str, str]:
    """Return the values of all flags in a command line by the names of the flags, without dashes.

    Raises:
        InputError: A flag is unknown or has no value.
    """
    start = text.find("--")
    if start < 0:
        raise InputError(f"no flags in {text!r}: expected something like --image_size 64 --class_cond True")
    # A pasted command may have line continuations, and MODEL_FLAGS="…" a closing quote.
    command = text[start:].replace("\\\n", " ").strip().rstrip("`")
    if command[-1] in "\"'" and command.count(command[-1]) % 2:
        command = command[:-1]
    try:
        words = [
            part for word in shlex.split(command) for part in (word.split("=", 1) if word.startswith("--") else [word])
        ]
    except ValueError as error:
        raise InputError(f"cannot read the flags: {error}") from None
    known = {field.name for field in fields(AdmFlags)} | _OTHER_FLAGS
    values: dict[str, str] = {}
    for flag, value in zip_longest(words[::2], words[1::2]):
        name = flag.removeprefix("--")
        if name == flag:
            raise InputError(f"expected a flag, got {flag!r}")
        if name not in known:
            raise InputError(f"unknown flag {flag}")
        if value is None or value.startswith("--"):
            raise InputError(f"{flag} has no value")
        values[name] = value
    return values


def _parse(name: str, value: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return (*_TRUE, *_FALSE).index(value.lower()) < len(_TRUE)
        return {"str": str, "float": float}.get(kind, int)(value)
    except ValueError:
        raise InputError(f"--{name} must be of type {kind}, got {value!r}") from None
