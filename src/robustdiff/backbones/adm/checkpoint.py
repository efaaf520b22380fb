"""ADM networks: created from flags, loaded from a guided-diffusion checkpoint, and saved as one.

The field `_adm` of the config stores the information that saving needs and that a `UNet2DModel` has no field for: the
attention order, the dimension of the qkv convolutions, and the types of tensors that are not float32.
`save_pretrained` and `from_pretrained` preserve it. A checkpoint in half precision is loaded in float32 and saved in
half precision.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from robustdiff.backbones.adm.diagnose import explanation, first_mismatch
from robustdiff.backbones.adm.flags import AdmFlags
from robustdiff.backbones.adm.layout import INPUT, NO_COUNTERPART, OUTPUT, QKV, TIME, Layout
from robustdiff.errors import InputError
from robustdiff.files import atomic_write
from robustdiff.weights import FLOATS, read_weights

__all__ = ["build_adm", "load_adm", "save_adm"]


def _split_qkv(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Reorder (3·heads·channels, *) in the file's order → (3, heads·channels, *), heads within each of q, k and v."""
    if new_order:
        return qkv.unflatten(0, (3, -1))
    return qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)


def _join_qkv(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Invert :func:`_split_qkv`."""
    if new_order:
        return qkv.flatten(0, 1)
    return qkv.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 2)


def build_adm(flags: AdmFlags, in_channels: int = 3) -> UNet2DModel:
    """Return an untrained ADM network in train mode, initialised as in guided-diffusion.

    The initialisation is PyTorch's default, except that the last layer of every residual block, of every attention
    block and of the network is zero. Each block is then the identity, and the output is 0.

    Args:
        flags: The flags of the network (:data:`PRESETS` has those of published networks).
        in_channels: The number of image channels; the output has as many, or twice as many with `learn_sigma`.
    """
    unet = Layout.from_flags(flags, in_channels).unet(flags.image_size, flags.dropout)
    for name, parameter in unet.named_parameters():
        if name.rsplit(".", 1)[0].endswith((".conv2", ".to_out.0", "conv_out")):
            nn.init.zeros_(parameter)
    unet.register_to_config(_adm=_way_back(flags.use_new_attention_order))
    return unet


def _way_back(new_order: bool, qkv_dims: int = 1, dtypes: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {"use_new_attention_order": new_order, "qkv_dims": qkv_dims, "dtypes": dict(dtypes or {})}


def _recorded(unet: UNet2DModel) -> tuple[dict[str, Any], dict[str, torch.dtype]]:
    """Return the field `_adm` of a config and its types, after validation: the config may be from an untrusted file."""
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
    """Return the type to compute in: float32, or a wider type if there is one."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _types(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the types unless all are float32: the most common type under "*", the others by tensor."""
    names = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
    [(common, _)] = Counter(names.values()).most_common(1)
    rare = {name: dtype for name, dtype in names.items() if dtype != common}
    return rare if common == "float32" else {"*": common, **rare}


def _read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    state = read_weights(path)
    for tensor, ndims in ((TIME, (2,)), (INPUT, (4,)), (OUTPUT, (4,)), (QKV, (3, 4))):
        if tensor not in state or state[tensor].ndim not in ndims:
            raise InputError(f"{path} is not a guided-diffusion UNet checkpoint: no image UNet's {tensor}")
    # Three channels of the image and three of its low-resolution version.
    if state[INPUT].shape[1] == 6 and state[OUTPUT].shape[0] in (3, 6):
        raise InputError(f"{path} is a super-resolution checkpoint, which is another network")
    return state


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

    The flags are those of :class:`AdmFlags`; here they default to `PRESETS["cifar10-adm"]`. To pass an instance of
    `AdmFlags`, write `load_adm(path, **dataclasses.asdict(flags))`.

    The flags are checked against the shapes of the tensors. The attention order, the number of heads and the dropout
    rate have no effect on the shapes and cannot be checked. With a wrong attention order or number of heads the network
    runs, but its outputs are wrong.

    The number of image channels is read from the file, and so is the number of classes unless it is given.

    Args:
        path: The `.pt` or `.safetensors` file: a state dict, such as that of an EMA, or a training script's dict with
            one, from which the moving average is read. Prefixes of wrappers are stripped.

    Returns:
        The UNet in eval mode, in float32; call it as `unet(x, t, class_labels=y).sample`. It is a `UNet2DModel`, or its
        subclass :class:`AdmUNet2DModel` for networks that `UNet2DModel` cannot represent.

    Raises:
        InputError: The file is missing, it is not a guided-diffusion UNet, or the flags do not fit it. In the last
            case the message names the first tensor that differs and the flag that is most likely wrong.
    """
    flags = AdmFlags(**{name: value for name, value in locals().items() if name != "path"})
    state = _read_state(path)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if (mismatch := first_mismatch(shapes, flags)) is not None:
        raise InputError(f"{os.fspath(path)} does not fit its flags: {explanation(shapes, flags, mismatch)}")
    layout = Layout.from_shapes(flags, shapes)
    working = _working_type(value.dtype for value in state.values())
    weights: dict[str, Tensor] = {}
    for tensor in layout.tensors():
        value = state[tensor.adm].to(working, copy=True)  # the file's tensors may be memory-mapped
        if tensor.heads:
            parts = _split_qkv(value, tensor.heads, use_new_attention_order)
            # The parameters of a UNet do not share memory.
            weights |= {name: part.clone() for name, part in zip(tensor.unet, parts, strict=True)}
        else:
            weights[tensor.unet[0]] = value
    with torch.device("meta"):
        unet = layout.unet(flags.image_size, flags.dropout)
    # A convolution with kernel size 1 in the file is a linear layer in the UNet.
    reshaped = {name: weights[name].reshape(parameter.shape) for name, parameter in unet.named_parameters()}
    unet.load_state_dict(reshaped, assign=True)
    unet.register_to_config(_adm=_way_back(use_new_attention_order, layout.qkv_dims, _types(state)))
    return unet.eval()


def save_adm(unet: UNet2DModel, path: str | os.PathLike[str]) -> None:
    """Write a UNet as a guided-diffusion checkpoint; the inverse of :func:`load_adm`.

    A UNet from `load_adm` is written in the attention order and the tensor types of its file, and in guided-diffusion's
    order of tensors, also after training or `save_pretrained` and `from_pretrained`. Any other `UNet2DModel` with ADM's
    structure is written in the new attention order and its own tensor types.

    Args:
        unet: The network. Parameters that were cast, for example by `unet.half()`, are written in their new type.
        path: The file to create or replace; the write is atomic.

    Raises:
        InputError: ADM cannot represent this UNet, or the folder of `path` does not exist.
    """
    if not isinstance(unet, UNet2DModel):
        raise InputError(f"save_adm needs a diffusers UNet2DModel, got a {type(unet).__name__}")
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {Path(path).parent} does not exist")
    way_back, dtypes = _recorded(unet)
    layout = Layout.from_unet(unet, way_back["qkv_dims"])
    working = _working_type(dtypes.values())
    weights = {name: value.detach().cpu() for name, value in unet.state_dict().items()}
    state: dict[str, Tensor] = {}
    for tensor in layout.tensors():
        try:
            parts = [weights.pop(name) for name in tensor.unet]
        except KeyError as error:
            raise InputError(f"{NO_COUNTERPART}: it lacks {error}, {tensor.adm} in ADM") from None
        value = parts[0]
        if tensor.heads:
            value = _join_qkv(torch.stack(parts), tensor.heads, way_back["use_new_attention_order"])
        if value.numel() != torch.Size(tensor.shape).numel():
            raise InputError(
                f"{NO_COUNTERPART}: {tensor.unet[0]} is {tuple(parts[0].shape)}, and {tensor.adm} {tensor.shape}"
            )
        # Only tensors that loading cast to the working type are cast back.
        dtype = dtypes.get(tensor.adm, dtypes.get("*", working)) if value.dtype == working else value.dtype
        state[tensor.adm] = value.reshape(tensor.shape).to(dtype).contiguous()
    if weights:
        raise InputError(f"{NO_COUNTERPART}: it has a tensor {next(iter(weights))}")
    with atomic_write(path) as file:
        torch.save(state, file)
