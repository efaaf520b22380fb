"""Compare the fused kernels with their definition in float64: ``python tests/cuda/fused_norm.py cpu|cuda``.

On the CPU it needs ``TRITON_INTERPRET=1`` in the environment, before Triton is imported.
"""

from __future__ import annotations

import copy
import itertools
import sys

import torch
from torch import nn

from robustdiff.backbones.fused_norm import torch_group_norm, triton_group_norm

# (N, C, H, W), groups: sizes of the tile and others, one group, groups of one channel, many channels in a group, one
# pixel.
SHAPES = [((2, 8, 3, 5), 4), ((3, 96, 12, 13), 32), ((2, 5, 1, 1), 5), ((1, 36, 9, 40), 3), ((1, 2048, 2, 2), 1)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def errors(device, shape, groups, modulated, silu, dtype):
    """The relative errors ‖v − v₆₄‖ / ‖v₆₄‖ of the result and of each gradient.

    The mean of the activations is far from zero, as no variance by the difference of two sums would bear.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size, mean=0.0, type=torch.float32):
        return (torch.randn(*size, generator=generator) + mean).to(device, type)

    norm = nn.GroupNorm(groups, shape[1], device=device)
    norm.weight.data.copy_(normal(shape[1], mean=1.0))
    norm.bias.data.copy_(normal(shape[1]))
    x = normal(*shape, mean=10.0, type=dtype).contiguous(memory_format=torch.channels_last)
    modulation = normal(shape[0], 2 * shape[1], type=dtype) if modulated else None
    dy = normal(*shape, type=dtype)

    def values(function, kind):
        own = copy.deepcopy(norm).to(kind)
        leaves = [one.detach().to(kind).requires_grad_() for one in (x, modulation) if one is not None]
        result = function(own, *leaves, *([] if modulated else [None]), silu)
        leaves += [own.weight, own.bias]
        return result, *torch.autograd.grad(result, leaves, dy.to(result.dtype))

    own = copy.deepcopy(norm)
    leaves = [one.detach().clone().requires_grad_() for one in (x, modulation) if one is not None]
    result = triton_group_norm(own, leaves[0], leaves[1] if modulated else None, silu)
    found = result, *torch.autograd.grad(result, [*leaves, own.weight, own.bias], dy)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    for one, expected in zip(found, values(torch_group_norm, torch.float64), strict=True):
        # Where a gradient is zero, of a group of one value, only rounding is left.
        yield ((one.double() - expected).norm() / (expected.norm() + 1e-2 * dy.double().norm())).item()


def main(device):
    """Check all cases, and print their number."""
    cases = list(itertools.product(SHAPES, [True, False], [True, False], TOLERANCE))
    for (shape, groups), modulated, silu, dtype in cases:
        found = list(errors(device, shape, groups, modulated, silu, dtype))
        assert max(found) < TOLERANCE[dtype], (shape, groups, modulated, silu, dtype, found)
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main(sys.argv[1])
