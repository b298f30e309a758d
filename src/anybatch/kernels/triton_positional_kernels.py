"""Triton kernels of positional normalization. Imported when one is launched, since Triton takes a while to import.

A program sees positions of one sample, so that its result does not depend on the batch; within a sample places in
memory are counted in 32 bits. Where a program cannot hold all channels of its positions it reads them twice.
"""

# Triton is typed for what is called on the host, and settles branches as it compiles:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl

from anybatch.kernels.triton_pieces import activated, rounded, through_activation


@triton.jit
def _values(ptr, place, c, mask, stride_p, stride_c):
    return tl.load(ptr + (place[:, None] * stride_p + c[None, :] * stride_c), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _affine(normalized, weight_ptr, bias_ptr, c, real):
    """The activation's input, and the weight."""
    weight = tl.full(c.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
    z = normalized * weight[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
    return z, weight[None, :]


@triton.jit
def _moments(x, mask, count):
    """Of each row of what is in registers, the mean and the sum of squares around it, in two passes."""
    mean = tl.sum(x, axis=1) / count
    apart = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.sum(apart * apart, axis=1)


@triton.jit
def _put(hat, y_ptr, weight_ptr, bias_ptr, place, c, mask, channels, stride_p, stride_c, ACTIVATION: tl.constexpr):
    z, _ = _affine(hat, weight_ptr, bias_ptr, c, c < channels)
    y = rounded(activated(z, ACTIVATION), y_ptr.dtype.element_ty)
    tl.store(y_ptr + (place[:, None] * stride_p + c[None, :] * stride_c), y, mask=mask)


@triton.jit
def normalized(
    x_ptr,  # (N, C, *), as the next
    y_ptr,
    weight_ptr,  # (C,), as the next
    bias_ptr,
    moments_ptr,  # (2, N positions): mean and 1 / std
    positions,
    channels,  # C
    row,  # N positions
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    divisor,  # of the sum of squares
    eps,
    ACTIVATION: tl.constexpr,
    ALL: tl.constexpr,  # whether BLOCK_C holds all channels
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(positions, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    there = place < positions
    x_ptr += n * stride_xn
    y_ptr += n * stride_n
    at = moments_ptr + n * positions + place
    row = tl.cast(row, tl.int64)
    if ALL:
        c = tl.arange(0, BLOCK_C)
        mask = there[:, None] & (c < channels)[None, :]
        x = _values(x_ptr, place, c, mask, stride_xp, stride_xc)
        mean, squares = _moments(x, mask, channels)
        rstd = 1.0 / tl.sqrt(squares / divisor + eps)
        hat = (x - mean[:, None]) * rstd[:, None]
        _put(hat, y_ptr, weight_ptr, bias_ptr, place, c, mask, channels, stride_p, stride_c, ACTIVATION)
        tl.store(at, mean, mask=there)
        tl.store(at + row, rstd, mask=there)
    else:
        mean = tl.zeros((BLOCK_P,), tl.float32)
        squares = tl.zeros((BLOCK_P,), tl.float32)
        for first in range(0, channels, BLOCK_C):  # Chan's rule between blocks of channels
            c = first + tl.arange(0, BLOCK_C)
            mask = there[:, None] & (c < channels)[None, :]
            count = tl.minimum(channels - first, BLOCK_C).to(tl.float32)
            x = _values(x_ptr, place, c, mask, stride_xp, stride_xc)
            block_mean, block_squares = _moments(x, mask, count)
            delta = block_mean - mean
            mean += delta * (count / (first + count))
            squares += block_squares + delta * delta * (first * count / (first + count))
        rstd = 1.0 / tl.sqrt(squares / divisor + eps)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            mask = there[:, None] & (c < channels)[None, :]
            hat = (_values(x_ptr, place, c, mask, stride_xp, stride_xc) - mean[:, None]) * rstd[:, None]
            _put(hat, y_ptr, weight_ptr, bias_ptr, place, c, mask, channels, stride_p, stride_c, ACTIVATION)
        tl.store(at, mean, mask=there)
        tl.store(at + row, rstd, mask=there)


@triton.jit
def pulled(
    g_ptr,  # (N, C, *): of y
    x_ptr,  # (N, C, *)
    weight_ptr,  # (C,), as the next
    bias_ptr,
    moments_ptr,  # (2, N positions)
    g_x_ptr,  # (N, C, *)
    partial_ptr,  # (programs, 2, C): of the weight's and the bias's gradients
    positions,
    channels,  # C
    row,  # N positions
    stride_gn,
    stride_gp,
    stride_gc,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    divisor,
    ACTIVATION: tl.constexpr,
    ALL: tl.constexpr,  # whether BLOCK_C holds all channels; else ROWS is BLOCK_P
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    start = program % tiles * ROWS
    g_ptr += n * stride_gn
    x_ptr += n * stride_xn
    g_x_ptr += n * stride_n
    moments_ptr += n * positions
    row = tl.cast(row, tl.int64)
    within = tl.zeros((BLOCK_P,), tl.float32)
    slope = tl.zeros((BLOCK_P,), tl.float32)
    if not ALL:
        place = start + tl.arange(0, BLOCK_P)
        there = place < positions
        mean = tl.load(moments_ptr + place, mask=there, other=0.0)[:, None]
        rstd = tl.load(moments_ptr + row + place, mask=there, other=0.0)[:, None]
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            real = c < channels
            mask = there[:, None] & real[None, :]
            hat = (_values(x_ptr, place, c, mask, stride_xp, stride_xc) - mean) * rstd
            z, weight = _affine(hat, weight_ptr, bias_ptr, c, real)
            g = through_activation(_values(g_ptr, place, c, mask, stride_gp, stride_gc), z, ACTIVATION) * weight
            within += tl.sum(g, axis=1)
            slope += tl.sum(g * hat, axis=1)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        real = c < channels
        # Added up over rows at the end alone: that takes all threads.
        g_weight = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        g_bias = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for block in range(0, ROWS, BLOCK_P):
            place = start + block + tl.arange(0, BLOCK_P)
            there = place < positions
            mask = there[:, None] & real[None, :]
            mean = tl.load(moments_ptr + place, mask=there, other=0.0)[:, None]
            rstd = tl.load(moments_ptr + row + place, mask=there, other=0.0)[:, None]
            hat = (_values(x_ptr, place, c, mask, stride_xp, stride_xc) - mean) * rstd
            z, weight = _affine(hat, weight_ptr, bias_ptr, c, real)
            g = through_activation(_values(g_ptr, place, c, mask, stride_gp, stride_gc), z, ACTIVATION)
            g_weight += g * hat
            g_bias += g
            g *= weight
            if ALL:
                within = tl.sum(g, axis=1)
                slope = tl.sum(tl.where(mask, g * hat, 0.0), axis=1)
            g_x = rstd * (g - (within / channels)[:, None] - hat * (slope / divisor)[:, None])
            g_x = rounded(g_x, g_x_ptr.dtype.element_ty)
            tl.store(g_x_ptr + (place[:, None] * stride_p + c[None, :] * stride_c), g_x, mask=mask)
        at = partial_ptr + program.to(tl.int64) * 2 * channels + c
        tl.store(at, tl.sum(g_weight, axis=0), mask=real)
        tl.store(at + channels, tl.sum(g_bias, axis=0), mask=real)
