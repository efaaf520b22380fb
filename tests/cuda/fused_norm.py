"""Compare the fused kernels with their definition in float64: ``python tests/cuda/fused_norm.py cpu|cuda``.

On the CPU it needs ``TRITON_INTERPRET=1`` in the environment, before Triton is imported.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys

import torch
from torch import nn

from robustdiff.backbones import channels_last
from robustdiff.backbones.fused_norm import torch_group_norm, triton_group_norm

# (N, C, H, W), groups: sizes of the tile and others, one group, groups of one channel, many channels in a group, one
# pixel.
SHAPES = [((2, 8, 3, 5), 4), ((3, 96, 12, 13), 32), ((2, 5, 1, 1), 5), ((1, 36, 9, 40), 3), ((1, 2048, 2, 2), 1)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(generator, *size, mean=0.0, dtype=torch.float32, device="cpu"):
    return (torch.randn(*size, generator=generator) + mean).to(device, dtype)


def errors(device, shape, groups, modulated, silu, offset, dtype):
    """The errors ‖v − v₆₄‖ / (‖v₆₄‖ + ‖dy‖) of the result, of each gradient, and of a second derivative.

    The mean of the activations is far from zero, as no variance by the difference of two sums would bear.
    """
    draw = functools.partial(normal, torch.Generator().manual_seed(0), device=device)
    norm = nn.GroupNorm(groups, shape[1], device=device)
    norm.weight.data.copy_(draw(shape[1], mean=1.0))
    norm.bias.data.copy_(draw(shape[1]))
    x = draw(*shape, mean=10.0, dtype=dtype).contiguous(memory_format=torch.channels_last)
    others = {
        "modulation": draw(shape[0], 2 * shape[1], dtype=dtype) if modulated else None,
        "offset": draw(*shape[1 - offset : 2], dtype=dtype) if offset is not None else None,
    }
    dy = draw(*shape, dtype=dtype)

    def values(function, kind):
        own = copy.deepcopy(norm).to(kind or torch.float32)
        given = {"x": x} | {name: one for name, one in others.items() if one is not None}
        given = {name: one.detach().to(kind or one.dtype).requires_grad_() for name, one in given.items()}
        leaves = [*given.values(), own.weight, own.bias]
        result = function(own, silu=silu, **given)
        gradients = torch.autograd.grad(result, leaves, dy.to(result.dtype), retain_graph=True)
        yield from (result, *gradients)
        again = torch.autograd.grad(result, leaves, dy.to(result.dtype), create_graph=True)
        yield from torch.autograd.grad(again[0].square().sum(), leaves[0])

    for one, expected in zip(values(triton_group_norm, None), values(torch_group_norm, torch.float64), strict=True):
        # The gradient of a group of one value is zero, and what is left is rounding times 1/√eps, relative to dy.
        yield ((one.double() - expected).norm() / (expected.norm() + dy.double().norm())).item()


def others(device, shape, dtype):
    """The errors of the other operations and of their gradients."""
    draw = functools.partial(normal, torch.Generator().manual_seed(0), device=device)
    x, y = (draw(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    bias = draw(shape[1], mean=1.0)
    tokens = draw(shape[0], shape[2] * shape[3], shape[1], dtype=dtype)
    calls = {
        "add": (lambda x, y, bias: channels_last.add(x, y, bias), (x, y, bias)),
        "bias of a convolution": (
            lambda x, bias: channels_last.bias_gradient(x + bias.detach().to(x.dtype)[:, None, None], bias), (x, bias)
        ),
        "bias of a linear layer": (
            lambda x, bias: channels_last.bias_gradient(x + bias.detach().to(x.dtype), bias), (tokens, bias)
        ),
        "doubled": (channels_last.doubled, (x,)),
        **({"halved": (channels_last.halved, (x,))} if min(shape[2:]) > 1 else {}),
    }  # fmt: skip
    for name, (function, arguments) in calls.items():
        results = []
        for kind in (None, torch.float64):
            leaves = [one.detach().to(kind or one.dtype).requires_grad_() for one in arguments]
            result = function(*leaves)
            weights = torch.linspace(0.5, 1.5, result.numel(), device=device, dtype=torch.float64).view_as(result)
            results.append([result, *torch.autograd.grad((result.double() * weights).sum(), leaves)])
        for one, expected in zip(*results, strict=True):
            yield name, ((one.double() - expected).norm() / (expected.norm() + 1e-2)).item()


def main(device):
    """Check all cases, and print their number."""
    if device == "cpu":  # under the interpreter
        channels_last.fits = lambda x: x.dtype != torch.float64 and x.is_contiguous(memory_format=torch.channels_last)
    switches = [(True, True), (True, False), (False, True), (False, False)]
    cases = list(itertools.product(SHAPES, switches, TOLERANCE, (None, 0, 1)))
    for (shape, groups), (modulated, silu), dtype, offset in cases:
        *found, second = errors(device, shape, groups, modulated, silu, offset, dtype)
        assert max(found) < TOLERANCE[dtype], (shape, groups, modulated, silu, offset, dtype, found)
        # By PyTorch's operations, and the gradient in it is rounded.
        assert second < 20 * TOLERANCE[dtype], (shape, groups, modulated, silu, offset, dtype, second)
    for (shape, _), dtype in itertools.product([*SHAPES, ((4, 300, 6, 4), 1), ((2, 64, 64, 64), 1)], TOLERANCE):
        for name, error in others(device, shape, dtype):
            assert error < TOLERANCE[dtype], (name, shape, dtype, error)
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main(sys.argv[1])
