r"""Group norm, modulation and SiLU in one kernel, and the blocks of diffusers' UNets that call it.

Of an activation x of shape (N, C, H, W) whose channels are in G groups, with the mean μ and the variance σ² of each
sample's group,

    x̂ = (x − μ) / √(σ² + eps),   z = (γ x̂ + β)(1 + scale) + shift,   y = z sigmoid(z)

with γ and β for each channel, and scale and shift for each sample and channel. Before it the bias of a convolution and
an embedding of the time may be added to x. Each of these operations alone is a trip of the whole activation through
memory, in float32 under autocast. Here a program of a GPU takes a few groups of one sample: it reads them for the
statistics and again, now from a cache, for y, which is written in the type that the next convolution wants. In memory
the channels of a pixel are neighbours (``torch.channels_last``), as convolutions on tensor cores want them.

For the backward pass x, μ and 1/√(σ² + eps) are kept, and all else is computed again. With dz = dy · dy/dz, a = γ (1 +
scale), the sums A = Σ dz and B = Σ dz x̂ over the pixels of a sample's channel, and m = HW·C/G,

    dshift = A,   dscale = γ B + β A,   dβ = Σₙ (1 + scale) A,   dγ = Σₙ (1 + scale) B
    dx = (a dz − Σ a A / m − x̂ Σ a B / m) / √(σ² + eps)        sums over the channels of the group

The gradient of what is added to x is the sum of dx over the pixels. Variances are found by Welford's recurrence along
the pixels and the formula of Chan et al. (1983) across them, so that a mean far from zero costs no precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from robustdiff.backbones.channels_last import BiasedConv2d, add, bias_gradient, doubled, fits, halved

try:
    import triton

    from robustdiff.kernels.channels_last import backward_kernel, forward_kernel
except ImportError:  # as with PyTorch for CPUs
    triton = None

__all__ = ["fuse_norms", "group_norm", "torch_group_norm", "triton_group_norm"]

Norm = Callable[..., Tensor]
"""A function with the arguments of :func:`group_norm`."""

ELEMENTS = 2048
"""Elements of a program's tile."""

WIDTH = 32
"""Its channels, at least, where there are as many."""

WARPS = 8
"""Warps of a program."""


def torch_group_norm(
    norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None = None, silu: bool = True, offset: Tensor | None = None
) -> Tensor:
    """Return the normalised, modulated and activated x by PyTorch's operations.

    Args:
        norm: γ, β, the groups and eps.
        x: Activations with shape (N, C, H, W).
        modulation: Scale and shift with shape (N, 2C), or None for neither.
        silu: Whether the result is activated.
        offset: Addend of x before the statistics, with shape (C,) or (N, C), or None for none.

    Returns:
        Activations with the shape of x, in the type of autocast where that is on, else in that of x.
    """
    return _by_torch(x, norm.weight, norm.bias, modulation, offset, norm.num_groups, norm.eps, silu, _dtype(x))


def _by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    offset: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    if offset is not None:
        x = x + offset.to(x.dtype)[..., None, None]
    result = F.group_norm(x, groups, weight, bias, eps)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        result = result * (1 + scale) + shift
    return (F.silu(result) if silu else result).to(dtype)


def group_norm(
    norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None = None, silu: bool = True, offset: Tensor | None = None
) -> Tensor:
    """Return the normalised, modulated and activated x, by the fused kernel where it is for x.

    It is for activations on a GPU in float32, float16 or bfloat16 with neighbouring channels. Arguments and result are
    those of :func:`torch_group_norm`.
    """
    return (triton_group_norm if fits(x) else torch_group_norm)(norm, x, modulation, silu, offset)


def _dtype(x: Tensor) -> torch.dtype:
    """Return the type of autocast where that is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def triton_group_norm(
    norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None = None, silu: bool = True, offset: Tensor | None = None
) -> Tensor:
    """Return the normalised, modulated and activated x by the fused kernel, as :func:`group_norm` does."""
    parameters = (norm.weight, norm.bias, modulation, offset, norm.num_groups, norm.eps)
    result: Tensor = _FusedNorm.apply(x, *parameters, silu, _dtype(x))
    return result


class _FusedNorm(torch.autograd.Function):
    """The fused kernels with their gradients."""

    @staticmethod
    def forward(context: Any, x: Tensor, *others: Any) -> Tensor:
        weight, bias, modulation, offset, groups, eps, silu, dtype = others
        x = x.contiguous(memory_format=torch.channels_last)
        modulation, offset = (None if one is None else one.contiguous() for one in (modulation, offset))
        samples, channels, height, width = x.shape
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
        statistics = x.new_empty((2, samples, groups), dtype=torch.float32)
        grid, constants = _launch(x, groups, silu, modulation, offset)
        with torch.cuda.device_of(x):  # where Triton launches
            forward_kernel[grid](
                x, weight, bias, weight if modulation is None else modulation, weight if offset is None else offset,
                y, statistics, samples, height * width, channels if offset is not None and offset.ndim == 2 else 0, eps,
                **constants,
            )  # fmt: skip
        context.save_for_backward(x, weight, bias, modulation, offset, statistics)
        context.others = groups, eps, silu, dtype
        return y

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, statistics = context.saved_tensors
        x, weight, bias, modulation, offset = tensors
        groups, _, silu, _ = context.others
        if torch.is_grad_enabled():  # the gradient is differentiated itself
            result = _by_torch(*tensors, *context.others)
            needed = [one for one, needs in zip(tensors, context.needs_input_grad, strict=False) if needs]
            found = iter(torch.autograd.grad(result, needed, gradients[0], create_graph=True))
            return *(next(found) if needs else None for needs in context.needs_input_grad[:5]), None, None, None, None
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        samples, channels, height, width = x.shape
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        sums = x.new_empty((2 if offset is None else 3, samples, channels), dtype=torch.float32)
        dmodulation = None if modulation is None else torch.empty_like(modulation)
        grid, constants = _launch(x, groups, silu, modulation, offset)
        backward_kernel[grid](
            x, weight, bias, weight if modulation is None else modulation, weight if offset is None else offset,
            statistics, dy, dx, sums, weight if dmodulation is None else dmodulation, samples, height * width,
            channels if offset is not None and offset.ndim == 2 else 0, **constants,
        )  # fmt: skip
        doffset = None
        if offset is not None and offset.ndim == 2:
            doffset, sums = sums[2].to(offset.dtype), sums[:2]
        dweight, dbias, *rest = sums.sum(1)
        if offset is not None and offset.ndim == 1:
            doffset = rest[0].to(offset.dtype)
        dweight, dbias = dweight.to(weight.dtype), dbias.to(bias.dtype)
        return dx, dweight, dbias, dmodulation, doffset, None, None, None, None


def _launch(
    x: Tensor, groups: int, silu: bool, modulation: Tensor | None, offset: Tensor | None
) -> tuple[tuple[int], dict[str, Any]]:
    """Return the number of programs, and the constants of the kernels."""
    size = x.shape[1] // groups
    padded = triton.next_power_of_2(size)
    block = min(triton.next_power_of_2(groups), max(1, WIDTH // padded))
    constants = {
        "GROUPS": groups,
        "SIZE": size,
        "PADDED": padded,
        "BLOCK": block,
        "ROWS": max(1, ELEMENTS // (block * padded)),
        "MODULATED": modulation is not None,
        "OFFSET": offset is not None,
        "SILU": silu,
        "num_warps": WARPS,
    }
    return (len(x) * triton.cdiv(groups, block),), constants


def _without_bias(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what a layer makes of x but its bias, and the bias; all and None for a layer that must be called."""
    called = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if type(layer) is BiasedConv2d and not called:
        return layer.without_bias(x), layer.bias
    return layer(x), None


class _FusedResnetBlock(ResnetBlock2D):
    """A ``ResnetBlock2D`` whose norms are fused with what follows them, and whose activations keep their layout.

    A block becomes one by its class: its parameters and attributes stay those of ``ResnetBlock2D``.
    """

    fused_norm: Norm

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.fused_norm(self.norm1, input_tensor)
        if self.upsample is not None:
            # Upsample2D gives up the layout of large batches.
            up = doubled if type(self.upsample) is Upsample2D else self.upsample
            input_tensor, hidden = up(input_tensor), up(hidden)
        elif self.downsample is not None:
            down = halved if type(self.downsample) is Downsample2D else self.downsample
            input_tensor, hidden = down(input_tensor), down(hidden)
        hidden, offset = _without_bias(self.conv1, hidden)
        if self.time_emb_proj is not None and temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        modulation = None
        if self.time_embedding_norm == "scale_shift":
            modulation = temb
        elif temb is not None:
            offset = temb if offset is None else temb + offset
        hidden = self.fused_norm(self.norm2, hidden, modulation, offset=offset)
        hidden, bias = _without_bias(self.conv2, self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor, other = _without_bias(self.conv_shortcut, input_tensor)
            bias = other if bias is None else bias if other is None else bias + other
        result = add(input_tensor, hidden, bias)
        return result if self.output_scale_factor == 1 else result / self.output_scale_factor


class _FusedAttention(AttnProcessor2_0):
    """Self-attention on pixels whose activations keep their layout, with one product for queries, keys and values.

    Args:
        fused_norm: The group norm.
    """

    def __init__(self, fused_norm: Norm) -> None:
        super().__init__()
        self.fused_norm = fused_norm

    # Attention warns of arguments that are not named here.
    def __call__(self, attn: Attention, hidden_states: Tensor, temb: Tensor | None = None, **kwargs: Any) -> Tensor:
        samples, channels, height, width = hidden_states.shape
        x = self.fused_norm(attn.group_norm, hidden_states, silu=False)
        tokens = x.permute(0, 2, 3, 1).reshape(samples, height * width, channels)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        if all(type(one) is nn.Linear for one in projections):
            weight = torch.cat([one.weight for one in projections])
            bias = None if attn.to_q.bias is None else torch.cat([one.bias for one in projections])
            product = F.linear(tokens, weight, None if bias is None else bias.detach())
            parts = bias_gradient(product, bias).chunk(3, dim=-1)
        else:
            parts = tuple(one(tokens) for one in projections)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        last, bias = attn.to_out[0], None
        if type(last) is nn.Linear and attn.residual_connection and not (attn.training and attn.to_out[1].p):
            out, bias = F.linear(out, last.weight), last.bias
        else:
            out = attn.to_out[1](last(out))
        out = out.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if attn.residual_connection:
            out = add(hidden_states, out, bias)  # in the layout of the first
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class _FusedOut(nn.GroupNorm):
    """The last norm of a UNet with the activation after it."""

    fused_norm: Norm

    def forward(self, input: Tensor) -> Tensor:
        return self.fused_norm(self, input)


def fuse_norms(network: nn.Module, norm: Norm = group_norm) -> nn.Module:
    """Make the blocks of a UNet of diffusers call fused norms, and keep the layout of their activations.

    Parameters, buffers and their names stay as they are, and the result differs by rounding alone. Blocks that are of
    another kind than :class:`ResnetBlock2D` with SiLU, self-attention on pixels with group norm, the last norm of a
    ``UNet2DModel`` and convolutions are left as they are.

    Args:
        network: The network, which is changed in place.
        norm: The function of the norms, with the arguments of :func:`group_norm`.

    Returns:
        The same network.
    """
    own: Any = network
    modules: Iterable[Any] = network.modules()
    for module in modules:
        if type(module) is ResnetBlock2D and isinstance(module.nonlinearity, nn.SiLU):
            module.__class__ = _FusedResnetBlock
            module.fused_norm = norm
        elif type(module) is Attention and _on_pixels(module):
            module.set_processor(_FusedAttention(norm))
        elif type(module) is nn.Conv2d:
            module.__class__ = BiasedConv2d
    if type(getattr(network, "conv_norm_out", None)) is nn.GroupNorm and isinstance(own.conv_act, nn.SiLU):
        own.conv_norm_out.__class__ = _FusedOut
        own.conv_norm_out.fused_norm = norm
        own.conv_act = nn.Identity()
    return network


def _on_pixels(attention: Attention) -> bool:
    """Return whether a block is self-attention on pixels, as :class:`_FusedAttention` computes it."""
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.group_norm is not None
        and not attention.is_cross_attention
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
    )
