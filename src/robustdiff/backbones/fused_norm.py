r"""Group norm, modulation and SiLU in one kernel, and the blocks of diffusers' UNets that call it.

Of an activation x of shape (N, C, H, W) whose channels are in G groups, with the mean μ and the variance σ² of each
sample's group,

    x̂ = (x − μ) / √(σ² + eps),   z = (γ x̂ + β)(1 + scale) + shift,   y = z sigmoid(z)

with γ and β for each channel, and scale and shift for each sample and channel. Each of these operations alone is a trip
of the whole activation through memory, in float32 under autocast. Here a program of a GPU takes a few groups of one
sample: it reads them for the statistics and again, now from a cache, for y, which is written in the type that the next
convolution wants. In memory the channels of a pixel are neighbours (``torch.channels_last``), as convolutions on tensor
cores want them.

For the backward pass x, μ and 1/√(σ² + eps) are kept, and all else is computed again. With dz = dy · dy/dz, a = γ (1 +
scale), the sums A = Σ dz and B = Σ dz x̂ over the pixels of a sample's channel, and m = HW·C/G,

    dshift = A,   dscale = γ B + β A,   dβ = Σₙ (1 + scale) A,   dγ = Σₙ (1 + scale) B
    dx = (a dz − Σ a A / m − x̂ Σ a B / m) / √(σ² + eps)        sums over the channels of the group

Variances are found by Welford's recurrence along the pixels and the formula of Chan et al. (1983) across them, so that
a mean far from zero costs no precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

try:
    import triton

    from robustdiff.kernels.group_norm import backward_kernel, forward_kernel
except ImportError:  # as with PyTorch for CPUs
    triton = None

__all__ = ["fuse_norms", "group_norm", "torch_group_norm", "triton_group_norm"]

Norm = Callable[..., Tensor]
"""A function with the arguments of :func:`group_norm`."""

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_ELEMENTS = 2048
_WIDTH = 32
_WARPS = 8


def torch_group_norm(norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None = None, silu: bool = True) -> Tensor:
    """Return the normalised, modulated and activated x by PyTorch's operations.

    Args:
        norm: γ, β, the groups and eps.
        x: Activations with shape (N, C, H, W).
        modulation: Scale and shift with shape (N, 2C), or None for neither.
        silu: Whether the result is activated.

    Returns:
        Activations with the shape of x, in the type of autocast where that is on, else in that of x.
    """
    result = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        result = result * (1 + scale) + shift
    return (F.silu(result) if silu else result).to(_dtype(x))


def group_norm(norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None = None, silu: bool = True) -> Tensor:
    """Return the normalised, modulated and activated x, by the fused kernel where it is for x.

    It is for activations on a GPU in float32, float16 or bfloat16 with neighbouring channels. Arguments and result are
    those of :func:`torch_group_norm`.
    """
    if triton is not None and x.is_cuda and x.dtype in _TYPES and x.is_contiguous(memory_format=torch.channels_last):
        return triton_group_norm(norm, x, modulation, silu)
    return torch_group_norm(norm, x, modulation, silu)


def _dtype(x: Tensor) -> torch.dtype:
    """Return the type of autocast where that is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def triton_group_norm(norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None = None, silu: bool = True) -> Tensor:
    """Return the normalised, modulated and activated x by the fused kernel, as :func:`group_norm` does."""
    parameters = (norm.weight, norm.bias, modulation, norm.num_groups, norm.eps)
    result: Tensor = _FusedNorm.apply(x, *parameters, silu, _dtype(x))
    return result


class _FusedNorm(torch.autograd.Function):
    """The fused kernels with their gradients."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        modulation = None if modulation is None else modulation.contiguous()
        samples, pixels = len(x), x.shape[2] * x.shape[3]
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
        statistics = x.new_empty((2, samples, groups), dtype=torch.float32)
        if x.numel():
            grid, constants = _launch(x, groups, silu, modulation)
            with torch.cuda.device_of(x):  # where Triton launches
                forward_kernel[grid](
                    x, weight, bias, weight if modulation is None else modulation, y, statistics, samples, pixels, eps,
                    **constants,
                )  # fmt: skip
        context.save_for_backward(x, weight, bias, modulation, statistics)
        context.groups, context.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, modulation, statistics = context.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        samples, pixels, channels = len(x), x.shape[2] * x.shape[3], x.shape[1]
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        sums = x.new_empty((2, samples, channels), dtype=torch.float32)
        dmodulation = None if modulation is None else torch.empty_like(modulation)
        if x.numel():
            grid, constants = _launch(x, context.groups, context.silu, modulation)
            backward_kernel[grid](
                x, weight, bias, weight if modulation is None else modulation, statistics, dy, dx, sums,
                weight if dmodulation is None else dmodulation, samples, pixels, **constants,
            )  # fmt: skip
        dweight, dbias = sums.sum(1)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dmodulation, None, None, None, None


def _launch(x: Tensor, groups: int, silu: bool, modulation: Tensor | None) -> tuple[tuple[int], dict[str, Any]]:
    """Return the number of programs, and the constants of the kernels."""
    size = x.shape[1] // groups
    padded = triton.next_power_of_2(size)
    block = min(triton.next_power_of_2(groups), max(1, _WIDTH // padded))
    constants = {
        "GROUPS": groups,
        "SIZE": size,
        "PADDED": padded,
        "BLOCK": block,
        "ROWS": max(1, _ELEMENTS // (block * padded)),
        "MODULATED": modulation is not None,
        "SILU": silu,
        "num_warps": _WARPS,
    }
    return (len(x) * triton.cdiv(groups, block),), constants


class _FusedResnetBlock(ResnetBlock2D):
    """A ``ResnetBlock2D`` whose norms are fused with what follows them, and whose activations keep their layout.

    A block becomes one by its class: its parameters and attributes stay those of ``ResnetBlock2D``.
    """

    fused_norm: Norm

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.fused_norm(self.norm1, input_tensor)
        if self.upsample is not None:
            input_tensor, hidden = self._upsampled(input_tensor), self._upsampled(hidden)
        elif self.downsample is not None:
            input_tensor, hidden = self.downsample(input_tensor), self.downsample(hidden)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is not None and temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        modulation = None
        if self.time_embedding_norm == "scale_shift":
            modulation = temb
        elif temb is not None:
            hidden = hidden + temb[:, :, None, None]
        hidden = self.fused_norm(self.norm2, hidden, modulation)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        result = input_tensor + hidden
        return result if self.output_scale_factor == 1 else result / self.output_scale_factor

    def _upsampled(self, x: Tensor) -> Tensor:
        # Upsample2D gives up the layout of large batches, for tensors of 2³¹ elements.
        if isinstance(self.upsample, Upsample2D) and 4 * x.numel() < 2**31:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.upsample(x)


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
            parts = F.linear(tokens, weight, bias).chunk(3, dim=-1)
        else:
            parts = tuple(one(tokens) for one in projections)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        out = out.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if attn.residual_connection:
            out = hidden_states + out  # in the layout of the first
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class _FusedOut(nn.GroupNorm):
    """The last norm of a UNet with the activation after it."""

    fused_norm: Norm

    def forward(self, input: Tensor) -> Tensor:
        return self.fused_norm(self, input)


def fuse_norms(network: nn.Module, norm: Norm = group_norm) -> nn.Module:
    """Make the blocks of a UNet of diffusers call fused norms, and keep the layout of their activations.

    Parameters, buffers and their names stay as they are, and the result differs by rounding alone. Blocks that are of
    another kind than :class:`ResnetBlock2D` with SiLU, self-attention on pixels with group norm, and the last norm of a
    ``UNet2DModel`` are left as they are.

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
