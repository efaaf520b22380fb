"""The Triton kernels of :mod:`robustdiff.backbones.fused_norm`, whose mathematics they compute.

A program takes BLOCK of the GROUPS groups of one sample. Each has SIZE channels, of PADDED in the tile, and the program
goes along the pixels by tiles of (ROWS, BLOCK, PADDED) elements, with channels fastest in memory, in float32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]


@triton.jit
def _place(GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return the sample of this program, and its groups, channels, rows and the mask of its channels."""
    blocks: tl.constexpr = (GROUPS + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // blocks
    group = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    within = tl.arange(0, PADDED)
    channel = group[:, None] * SIZE + within[None, :]
    there = (group[:, None] < GROUPS) & (within[None, :] < SIZE)
    return sample, group, channel, tl.arange(0, ROWS), there


@triton.jit
def _affine(weight, bias, modulation, sample, channel, there, C: tl.constexpr, MODULATED: tl.constexpr):
    """Return γ, β, 1 + scale and shift of this program's channels."""
    gamma = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    scale = tl.full(gamma.shape, 1.0, tl.float32)
    shift = tl.full(gamma.shape, 0.0, tl.float32)
    if MODULATED:
        row = modulation + sample * (2 * C) + channel
        scale += tl.load(row, mask=there, other=0.0).to(tl.float32)
        shift += tl.load(row + C, mask=there, other=0.0).to(tl.float32)
    return gamma, beta, scale, shift


@triton.jit
def forward_kernel(
    x, weight, bias, modulation, y, statistics, samples, pixels, eps,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GROUPS * SIZE
    sample, group, channel, row, there = _place(GROUPS, SIZE, PADDED, BLOCK, ROWS)
    offset = row[:, None, None] * C + channel[None, :, :]

    mean = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    squares = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    seen = 0.0
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        value = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
        start += ROWS * C
        seen += 1.0
        difference = tl.where(mask, value - mean, 0.0)
        mean += difference * (1.0 / seen)
        squares += difference * tl.where(mask, value - mean, 0.0)
    # The number of pixels that each row of the tile has seen.
    count = ((pixels - row + ROWS - 1) // ROWS).to(tl.float32)[:, None, None]
    total = 1.0 * pixels * SIZE
    mu = tl.sum(tl.sum(mean * count, axis=0), axis=1) / total
    difference = tl.where(there[None, :, :], mean - mu[None, :, None], 0.0)
    variance = tl.sum(tl.sum(squares + count * difference * difference, axis=0), axis=1) / total
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(statistics + sample * GROUPS + group, mu, mask=group < GROUPS)
    tl.store(statistics + (samples + sample) * GROUPS + group, rstd, mask=group < GROUPS)

    gamma, beta, scale, shift = _affine(weight, bias, modulation, sample, channel, there, C, MODULATED)
    factor = gamma * scale
    added = beta * scale + shift
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        here = start + offset
        start += ROWS * C
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        z = (value - mu[None, :, None]) * rstd[None, :, None] * factor[None, :, :] + added[None, :, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + here, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, weight, bias, modulation, statistics, dy, dx, sums, dmodulation, samples, pixels,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GROUPS * SIZE
    sample, group, channel, row, there = _place(GROUPS, SIZE, PADDED, BLOCK, ROWS)
    offset = row[:, None, None] * C + channel[None, :, :]
    mu = tl.load(statistics + sample * GROUPS + group, mask=group < GROUPS, other=0.0)[None, :, None]
    rstd = tl.load(statistics + (samples + sample) * GROUPS + group, mask=group < GROUPS, other=0.0)[None, :, None]
    gamma, beta, scale, shift = _affine(weight, bias, modulation, sample, channel, there, C, MODULATED)
    factor = (gamma * scale)[None, :, :]
    added = (beta * scale + shift)[None, :, :]

    a = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    b = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        here = start + offset
        start += ROWS * C
        normal = (tl.load(x + here, mask=mask, other=0.0).to(tl.float32) - mu) * rstd
        dz = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = normal * factor + added
            s = tl.sigmoid(z)
            dz = dz * s * (1.0 + z * (1.0 - s))
        a += dz
        b += dz * normal
    a_sum = tl.sum(a, axis=0)
    b_sum = tl.sum(b, axis=0)
    tl.store(sums + sample * C + channel, b_sum * scale, mask=there)
    tl.store(sums + (samples + sample) * C + channel, a_sum * scale, mask=there)
    if MODULATED:
        out = dmodulation + sample * (2 * C) + channel
        tl.store(out, (gamma * b_sum + beta * a_sum).to(dmodulation.dtype.element_ty), mask=there)
        tl.store(out + C, a_sum.to(dmodulation.dtype.element_ty), mask=there)

    total = 1.0 * pixels * SIZE
    a_mean = (tl.sum(gamma * scale * a_sum, axis=1) / total)[None, :, None]
    b_mean = (tl.sum(gamma * scale * b_sum, axis=1) / total)[None, :, None]
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        here = start + offset
        start += ROWS * C
        normal = (tl.load(x + here, mask=mask, other=0.0).to(tl.float32) - mu) * rstd
        dz = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = normal * factor + added
            s = tl.sigmoid(z)
            dz = dz * s * (1.0 + z * (1.0 - s))
        value = (factor * dz - a_mean - normal * b_mean) * rstd
        tl.store(dx + here, value.to(dx.dtype.element_ty), mask=mask)
