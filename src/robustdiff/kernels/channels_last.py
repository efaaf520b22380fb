"""The Triton kernels of the fused norms and of :mod:`robustdiff.backbones.channels_last`.

The channels of activations are neighbours in memory, and all is computed in float32. A program of the norms takes BLOCK
of the GROUPS groups of one sample, of SIZE channels each, and PADDED in the tile, and goes along the pixels by tiles of
(ROWS, BLOCK, PADDED) elements. The other kernels see a matrix of pixels × C channels, of which a program takes tiles of
(ROWS, COLUMNS) elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_kernel", "backward_kernel", "forward_kernel", "gather_kernel", "spread_kernel", "sum_kernel"]


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
def _offset(offset, start, channel, there, OFFSET: tl.constexpr):
    """Return what is added to x in this program's channels, with a dimension for the pixels."""
    added = tl.full((1, 1, 1), 0.0, tl.float32)
    if OFFSET:
        added = tl.load(offset + start + channel, mask=there, other=0.0).to(tl.float32)[None, :, :]
    return added


@triton.jit
def forward_kernel(
    x, weight, bias, modulation, offset, y, statistics, samples, pixels, offset_stride, eps,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MODULATED: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GROUPS * SIZE
    sample, group, channel, row, there = _place(GROUPS, SIZE, PADDED, BLOCK, ROWS)
    tile = row[:, None, None] * C + channel[None, :, :]
    added = _offset(offset, sample * offset_stride, channel, there, OFFSET)

    mean = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    squares = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    seen = 0.0
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        value = tl.load(x + start + tile, mask=mask, other=0.0).to(tl.float32) + added
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
    constant = beta * scale + shift
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        here = start + tile
        start += ROWS * C
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32) + added
        z = (value - mu[None, :, None]) * rstd[None, :, None] * factor[None, :, :] + constant[None, :, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + here, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, weight, bias, modulation, offset, statistics, dy, dx, sums, dmodulation, samples, pixels, offset_stride,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MODULATED: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GROUPS * SIZE
    sample, group, channel, row, there = _place(GROUPS, SIZE, PADDED, BLOCK, ROWS)
    tile = row[:, None, None] * C + channel[None, :, :]
    added = _offset(offset, sample * offset_stride, channel, there, OFFSET)
    mu = tl.load(statistics + sample * GROUPS + group, mask=group < GROUPS, other=0.0)[None, :, None]
    rstd = tl.load(statistics + (samples + sample) * GROUPS + group, mask=group < GROUPS, other=0.0)[None, :, None]
    gamma, beta, scale, shift = _affine(weight, bias, modulation, sample, channel, there, C, MODULATED)
    factor = (gamma * scale)[None, :, :]
    constant = (beta * scale + shift)[None, :, :]

    a = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    b = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        here = start + tile
        start += ROWS * C
        normal = (tl.load(x + here, mask=mask, other=0.0).to(tl.float32) + added - mu) * rstd
        dz = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = normal * factor + constant
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
    dx_sum = tl.zeros((ROWS, BLOCK, PADDED), tl.float32)
    start = sample.to(tl.int64) * pixels * C
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None, None] & there[None, :, :]
        here = start + tile
        start += ROWS * C
        normal = (tl.load(x + here, mask=mask, other=0.0).to(tl.float32) + added - mu) * rstd
        dz = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = normal * factor + constant
            s = tl.sigmoid(z)
            dz = dz * s * (1.0 + z * (1.0 - s))
        value = (factor * dz - a_mean - normal * b_mean) * rstd
        tl.store(dx + here, value.to(dx.dtype.element_ty), mask=mask)
        if OFFSET:
            dx_sum += tl.where(mask, value, 0.0)
    if OFFSET:
        tl.store(sums + (2 * samples + sample) * C + channel, tl.sum(dx_sum, axis=0), mask=there)


@triton.jit
def _matrix(pixels, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows, the columns and the mask of this program's tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, (row < pixels)[:, None] & (column < C)[None, :]


@triton.jit
def add_kernel(x, y, bias, out, pixels, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add x, y and the bias of each channel to out."""
    row, column, mask = _matrix(pixels, C, ROWS, COLUMNS)
    here = row[:, None] * C + column[None, :]
    added = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(y + here, mask=mask, other=0.0).to(tl.float32) + added[None, :]
    tl.store(out + here, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(x, out, pixels, tiles, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum x over the pixels of some tiles, to the row of out of this program."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64) * tiles * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, tiles):
        mask = (row < pixels)[:, None] & (column < C)[None, :]
        total += tl.load(x + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
        row += ROWS
    tl.store(out + tl.program_id(0) * C + column, tl.sum(total, axis=0), mask=column < C)


@triton.jit
def spread_kernel(x, out, pixels, width, factor, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write each pixel of x, times the factor, to 2×2 pixels of out."""
    row, column, mask = _matrix(pixels, C, ROWS, COLUMNS)
    value = tl.load(x + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    value = value.to(out.dtype.element_ty)
    corner = (4 * (row // width) * width + 2 * (row % width))[:, None] * C + column[None, :]
    tl.store(out + corner, value, mask=mask)
    tl.store(out + corner + C, value, mask=mask)
    tl.store(out + corner + 2 * width * C, value, mask=mask)
    tl.store(out + corner + (2 * width + 1) * C, value, mask=mask)


@triton.jit
def gather_kernel(x, out, pixels, width, factor, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum 2×2 pixels of x, times the factor, to each pixel of out."""
    row, column, mask = _matrix(pixels, C, ROWS, COLUMNS)
    corner = (4 * (row // width) * width + 2 * (row % width))[:, None] * C + column[None, :]
    value = tl.load(x + corner, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(x + corner + C, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(x + corner + 2 * width * C, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(x + corner + (2 * width + 1) * C, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * C + column[None, :], (value * factor).to(out.dtype.element_ty), mask=mask)
