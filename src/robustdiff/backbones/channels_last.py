r"""Operations on activations whose channels are neighbours in memory, where PyTorch's are slow on a GPU.

    add       x + y + b with a bias b for each channel, in one trip through memory
    sum       the gradient of a bias: the sum of an activation over samples and pixels
    spread    each pixel to 2×2 pixels: nearest neighbours, and the gradient of the mean of 2×2 pixels
    gather    the sum of 2×2 pixels: their mean, and the gradient of nearest neighbours

Elsewhere than on a GPU, for other types than float32, float16 and bfloat16, and for activations in another layout,
PyTorch's operations are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import triton

    from robustdiff.kernels.channels_last import add_kernel, gather_kernel, spread_kernel, sum_kernel
except ImportError:  # as with PyTorch for CPUs
    triton = None

__all__ = ["BiasedConv2d", "add", "bias_gradient", "doubled", "fits", "halved"]

TILE = 4096
"""Elements of a program's tile."""

COLUMNS = 128
"""Its channels, at most."""

PARTS = 512
"""Programs that sum over the pixels of some channels each."""

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def fits(x: Tensor) -> bool:
    """Return whether the kernels are for x, with shape (N, C, H, W)."""
    return bool(
        triton is not None
        and x.is_cuda
        and x.dtype in _TYPES
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel()
    )


def add(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + y + bias, for activations with shape (N, C, H, W) and a bias for each channel."""
    if bias is None:
        return x + y
    if fits(x) and fits(y) and x.shape == y.shape:
        result: Tensor = _Add.apply(x, y, bias)
        return result
    return x + (y + bias.to(y.dtype)[:, None, None])


def bias_gradient(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y, which has a bias in it that was detached, with the gradient of the bias.

    Args:
        y: Activations with shape (N, C, H, W), or (N, L, C) of a linear layer.
        bias: The bias with shape (C,), or None for none.
    """
    if bias is None:
        return y
    result: Tensor = _BiasGradient.apply(y, bias)
    return result


def doubled(x: Tensor) -> Tensor:
    """Return x with each pixel repeated in a square of 2×2: (N, C, H, W) to (N, C, 2H, 2W)."""
    if fits(x):
        result: Tensor = _Spread.apply(x, 1.0)
        return result
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def halved(x: Tensor) -> Tensor:
    """Return the means of squares of 2×2 pixels: (N, C, H, W) to (N, C, ⌊H/2⌋, ⌊W/2⌋)."""
    if fits(x) and x.shape[2] % 2 == x.shape[3] % 2 == 0:
        result: Tensor = _Gather.apply(x, 0.25)
        return result
    return F.avg_pool2d(x, 2)


class BiasedConv2d(nn.Conv2d):
    """A convolution whose bias can be left to what comes after it, and has a fast gradient.

    A ``Conv2d`` becomes one by its class, and has the same parameters.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach()
        return bias_gradient(self._conv_forward(input, self.weight, bias), self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """Return the convolution of x without its bias."""
        return self._conv_forward(x, self.weight, None)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        context.types = x.dtype, y.dtype, bias.dtype
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype), memory_format=torch.channels_last)
        _launch(add_kernel, out, x, y, bias, out)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x_type, y_type, bias_type = context.types
        bias = _summed(dy).to(bias_type) if context.needs_input_grad[2] else None
        return dy.to(x_type), dy.to(y_type), bias


class _BiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, y: Tensor, bias: Tensor) -> Tensor:
        context.type = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        return dy, _summed(dy).to(context.type) if context.needs_input_grad[1] else None


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        samples, channels, height, width = x.shape
        out = _empty(x, (samples, channels, 2 * height, 2 * width))
        _launch(spread_kernel, x, x, out, width=width, factor=factor)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(gradients[0].contiguous(memory_format=torch.channels_last), context.factor), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        samples, channels, height, width = x.shape
        out = _empty(x, (samples, channels, height // 2, width // 2))
        _launch(gather_kernel, out, x, out, width=width // 2, factor=factor)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(gradients[0].contiguous(memory_format=torch.channels_last), context.factor), None


def _summed(dy: Tensor) -> Tensor:
    """Return the sum over all but the channels, in float32 by the kernel."""
    x = dy if dy.ndim == 4 else dy.transpose(1, 2).unsqueeze(-1)  # (N, L, C) is (N, C, L, 1) with neighbouring channels
    if torch.is_grad_enabled() or not fits(x):  # of a second derivative
        return x.sum((0, 2, 3))
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    columns, rows = _tile(channels)
    tiles = triton.cdiv(triton.cdiv(pixels, rows), PARTS)
    parts = triton.cdiv(pixels, rows * tiles)
    out = x.new_empty((parts, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        grid = (parts, triton.cdiv(channels, columns))
        sum_kernel[grid](x, out, pixels, tiles, C=channels, ROWS=rows, COLUMNS=columns)
    return out.sum(0)


def _tile(channels: int) -> tuple[int, int]:
    """Return the columns and rows of a tile."""
    columns = min(triton.next_power_of_2(channels), COLUMNS)
    return columns, TILE // columns


def _launch(kernel: Any, like: Tensor, *tensors: Tensor, **values: Any) -> None:
    """Run a kernel with a program for each tile of an activation."""
    pixels, channels = like.numel() // like.shape[1], like.shape[1]
    columns, rows = _tile(channels)
    grid = (triton.cdiv(pixels, rows), triton.cdiv(channels, columns))
    with torch.cuda.device_of(like):  # where Triton launches
        kernel[grid](*tensors, pixels=pixels, C=channels, ROWS=rows, COLUMNS=columns, num_warps=8, **values)
