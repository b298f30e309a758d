"""Triton kernels of what sets group and batch-channel normalization apart, and of groups that one program holds whole.

Numbers of channels stand in blocks of groups by the channels of each. See `anybatch.kernels.triton_channel_kernels`.
"""

# Triton is typed for what is called on the host, and settles branches as it compiles:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from anybatch.kernels.triton_channel_kernels import added, joined
from anybatch.kernels.triton_pieces import activated, rounded, through_activation


@triton.jit
def _batch_scale(batch_var_ptr, batch_weight_ptr, c, real, eps):
    """1 / std of Batch-Channel Norm's batch part, and its weight."""
    rstd = 1.0 / tl.sqrt(tl.load(batch_var_ptr + c, mask=real, other=1.0).to(tl.float32) + eps)
    weight = tl.full(c.shape, 1.0, tl.float32)
    if batch_weight_ptr is not None:
        weight = tl.load(batch_weight_ptr + c, mask=real, other=0.0).to(tl.float32)
    return rstd, weight


@triton.jit
def _numbers(mean, var, c, real, size, shared, weight_ptr, bias_ptr, batch_mean_ptr, batch_var_ptr, batch_weight_ptr,
             batch_bias_ptr, eps):  # fmt: skip
    """Scale and shift of x, off (a channel's mean from its group's), and 1 / std of each group, for all channels."""
    z_mean, z_var = mean, var
    if batch_var_ptr is not None:
        batch_rstd, batch_weight = _batch_scale(batch_var_ptr, batch_weight_ptr, c, real, eps)
        batch_scale = batch_rstd * batch_weight
        z_mean = (mean - tl.load(batch_mean_ptr + c, mask=real, other=0.0).to(tl.float32)) * batch_scale
        if batch_bias_ptr is not None:
            z_mean += tl.load(batch_bias_ptr + c, mask=real, other=0.0).to(tl.float32)
        z_var = var * batch_scale * batch_scale
    off = tl.where(real, z_mean - (tl.sum(tl.where(real, z_mean, 0.0), axis=1) / size)[:, None], 0.0)
    group_var = tl.sum(tl.where(real, z_var + off * off, 0.0), axis=1) / size
    rstd = (1.0 / tl.sqrt(group_var + eps))[:, None] + tl.zeros(c.shape, tl.float32)
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c // shared, mask=real, other=0.0).to(tl.float32)
    shift = off * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c // shared, mask=real, other=0.0).to(tl.float32)
    if batch_var_ptr is not None:
        scale *= batch_scale
    return scale, shift, off, rstd


@triton.jit
def _slopes(total, along, mean, var, off, rstd, group, c, real, positions, size, channels, shared, weight_ptr,
            batch_mean_ptr, batch_var_ptr, batch_weight_ptr, own_ptr, eps, SHARED: tl.constexpr):  # fmt: skip
    """p and q of the gradient of x, ``scale * g + p * (x - mean) + q``, from sums of g and of ``g * (x - mean)``.

    Writes this sample's part of the gradients of all parameters of `_numbers`, in order, (2 or 6, C).
    """
    batch_scale = tl.full(c.shape, 1.0, tl.float32)
    if batch_var_ptr is not None:
        batch_rstd, batch_weight = _batch_scale(batch_var_ptr, batch_weight_ptr, c, real, eps)
        batch_scale = batch_rstd * batch_weight
    through = rstd * (along * batch_scale + off * total)  # of the gradient with the normalized values
    weight = tl.full(c.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c // shared, mask=real, other=0.0).to(tl.float32)
    within = rstd * (tl.sum(tl.where(real, weight * total, 0.0), axis=1) / (positions * size))[:, None]
    slope = rstd * rstd * (tl.sum(tl.where(real, weight * through, 0.0), axis=1) / (positions * size))[:, None]
    q = -(within + slope * off)
    if SHARED:
        tl.store(own_ptr + group, tl.sum(tl.where(real, through, 0.0), axis=1), mask=group * size < channels)
        tl.store(own_ptr + channels + group, tl.sum(tl.where(real, total, 0.0), axis=1), mask=group * size < channels)
        behind = real & (c * size >= channels)  # places of no group, which may be added up too
        tl.store(own_ptr + c, tl.full(c.shape, 0.0, tl.float32), mask=behind)
        tl.store(own_ptr + channels + c, tl.full(c.shape, 0.0, tl.float32), mask=behind)
    else:
        tl.store(own_ptr + c, through, mask=real)
        tl.store(own_ptr + channels + c, total, mask=real)
    if batch_var_ptr is not None:
        batch_mean = tl.load(batch_mean_ptr + c, mask=real, other=0.0).to(tl.float32)
        # Of the gradient of what is behind the batch part: its sum over positions, and with x - its batch mean.
        z_total = rstd * weight * total + positions * q
        z_along = rstd * weight * along - positions * slope * batch_scale * var + z_total * (mean - batch_mean)
        cubed = batch_rstd * batch_rstd * batch_rstd
        tl.store(own_ptr + 2 * channels + c, -batch_scale * z_total, mask=real)
        tl.store(own_ptr + 3 * channels + c, -0.5 * cubed * batch_weight * z_along, mask=real)
        tl.store(own_ptr + 4 * channels + c, batch_rstd * z_along, mask=real)
        tl.store(own_ptr + 5 * channels + c, z_total, mask=real)
    return -slope * batch_scale * batch_scale, q * batch_scale


@triton.jit
def group_numbers(
    partial_ptr,  # (N, K, 2, C): of `moments`
    weight_ptr,  # (C,) or (G,), as the next
    bias_ptr,
    batch_mean_ptr,  # (C,), as the next three
    batch_var_ptr,
    batch_weight_ptr,
    batch_bias_ptr,
    numbers_ptr,  # (6, N, C): mean, scale and shift of x, off, 1 / std, variance
    positions,
    channels,  # C
    chunk,
    chunks,  # K
    groups,  # G
    shared,  # channels that share one weight
    row,  # N C
    eps,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,  # holds the channels of a group
):
    program = tl.program_id(0)
    n = (program // groups).to(tl.int64)
    size = channels // groups
    lane = tl.arange(0, BLOCK)
    real = lane < size
    c = program % groups * size + lane
    mean, var = joined(partial_ptr, n, c, real, positions, channels, chunk, chunks, BLOCK_K, BLOCK)
    mean, var, c, real = mean[None, :], var[None, :], c[None, :], real[None, :]
    scale, shift, off, rstd = _numbers(
        mean, var, c, real, size, shared, weight_ptr, bias_ptr, batch_mean_ptr, batch_var_ptr, batch_weight_ptr,
        batch_bias_ptr, eps,
    )  # fmt: skip
    at = numbers_ptr + n * channels + c
    row = tl.cast(row, tl.int64)
    tl.store(at, mean, mask=real)
    tl.store(at + row, scale, mask=real)
    tl.store(at + 2 * row, shift, mask=real)
    tl.store(at + 3 * row, off, mask=real)
    tl.store(at + 4 * row, rstd, mask=real)
    tl.store(at + 5 * row, var, mask=real)


@triton.jit
def group_coefficients(
    partial_ptr,  # (N, K, 2, C): of `gradient_sums`
    numbers_ptr,  # (6, N, C): of `group_numbers`
    weight_ptr,  # (C,) or (G,)
    batch_mean_ptr,  # (C,), as the next two
    batch_var_ptr,
    batch_weight_ptr,
    slopes_ptr,  # (2, N, C): of `_slopes`
    own_ptr,  # (N, 2 or 6, C): of `_slopes`
    positions,
    channels,  # C
    chunks,  # K
    groups,  # G
    shared,
    row,  # N C
    eps,
    SHARED: tl.constexpr,  # whether the channels of a group share weight and bias
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    n = (program // groups).to(tl.int64)
    size = channels // groups
    lane = tl.arange(0, BLOCK)
    real = lane < size
    c = program % groups * size + lane
    total = added(partial_ptr, n, c, real, channels, chunks, 0, 2, BLOCK_K, BLOCK)[None, :]
    along = added(partial_ptr, n, c, real, channels, chunks, 1, 2, BLOCK_K, BLOCK)[None, :]
    c, real = c[None, :], real[None, :]
    row = tl.cast(row, tl.int64)
    at = numbers_ptr + n * channels + c
    mean = tl.load(at, mask=real, other=0.0)
    off = tl.load(at + 3 * row, mask=real, other=0.0)
    rstd = tl.load(at + 4 * row, mask=real, other=0.0)
    var = tl.load(at + 5 * row, mask=real, other=0.0)
    rows = 2 if batch_var_ptr is None else 6
    p, q = _slopes(
        total, along, mean, var, off, rstd, program % groups + tl.arange(0, 1), c, real, positions, size, channels,
        shared, weight_ptr, batch_mean_ptr, batch_var_ptr, batch_weight_ptr, own_ptr + n * rows * channels, eps, SHARED,
    )  # fmt: skip
    to = slopes_ptr + n * channels + c
    tl.store(to, p, mask=real)
    tl.store(to + row, q, mask=real)


@triton.jit
def _whole(x, inside, positions):
    """Mean and biased variance of each column of what is in registers, in two passes."""
    mean = tl.sum(x, axis=0) / positions
    apart = tl.where(inside, x - mean[None, :], 0.0)
    rest = tl.sum(apart, axis=0) / positions  # what rounding a large sum left
    return mean + rest, tl.maximum(tl.sum(apart * apart, axis=0) / positions - rest * rest, 0.0)


@triton.jit
def whole_groups(
    x_ptr,  # (N, C, *), as the next
    y_ptr,
    weight_ptr,  # (C,) or (G,), as the next
    bias_ptr,
    batch_mean_ptr,  # (C,), as the next three
    batch_var_ptr,
    batch_weight_ptr,
    batch_bias_ptr,
    positions,
    channels,  # C
    shared,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    eps,
    ACTIVATION: tl.constexpr,
    SIZE: tl.constexpr,  # channels in a group
    BLOCK_P: tl.constexpr,  # holds all positions
    BLOCK_C: tl.constexpr,  # of whole groups
):
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (place < positions)[:, None] & (c < channels)[None, :]
    at = n * stride_xn + (place[:, None] * stride_xp + c[None, :] * stride_xc)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean, var = _whole(x, inside, positions)
    GROUPS: tl.constexpr = BLOCK_C // SIZE
    of_groups = tl.reshape(c, (GROUPS, SIZE))
    scale, shift, _, _ = _numbers(
        tl.reshape(mean, (GROUPS, SIZE)), tl.reshape(var, (GROUPS, SIZE)), of_groups, of_groups < channels, SIZE,
        shared, weight_ptr, bias_ptr, batch_mean_ptr, batch_var_ptr, batch_weight_ptr, batch_bias_ptr, eps,
    )  # fmt: skip
    scale, shift = tl.reshape(scale, (BLOCK_C,))[None, :], tl.reshape(shift, (BLOCK_C,))[None, :]
    y = activated((x - mean[None, :]) * scale + shift, ACTIVATION)
    at = n * stride_n + (place[:, None] * stride_p + c[None, :] * stride_c)
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def through_whole_groups(
    g_ptr,  # (N, C, *): of y
    x_ptr,  # (N, C, *), as the next
    g_x_ptr,
    weight_ptr,  # (C,) or (G,), as the next
    bias_ptr,
    batch_mean_ptr,  # (C,), as the next three
    batch_var_ptr,
    batch_weight_ptr,
    batch_bias_ptr,
    own_ptr,  # (N, 2 or 6, C): of `_slopes`
    positions,
    channels,  # C
    shared,
    stride_gn,
    stride_gp,
    stride_gc,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    eps,
    ACTIVATION: tl.constexpr,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (place < positions)[:, None] & (c < channels)[None, :]
    at = n * stride_xn + (place[:, None] * stride_xp + c[None, :] * stride_xc)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = n * stride_gn + (place[:, None] * stride_gp + c[None, :] * stride_gc)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean_c, var = _whole(x, inside, positions)
    GROUPS: tl.constexpr = BLOCK_C // SIZE
    of_groups = tl.reshape(c, (GROUPS, SIZE))
    real = of_groups < channels
    mean, var = tl.reshape(mean_c, (GROUPS, SIZE)), tl.reshape(var, (GROUPS, SIZE))
    scale, shift, off, rstd = _numbers(
        mean, var, of_groups, real, SIZE, shared, weight_ptr, bias_ptr, batch_mean_ptr, batch_var_ptr,
        batch_weight_ptr, batch_bias_ptr, eps,
    )  # fmt: skip
    apart = x - mean_c[None, :]
    scale_c = tl.reshape(scale, (BLOCK_C,))[None, :]
    g = through_activation(g, apart * scale_c + tl.reshape(shift, (BLOCK_C,))[None, :], ACTIVATION)
    total, along = tl.sum(g, axis=0), tl.sum(tl.where(inside, g * apart, 0.0), axis=0)
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)
    rows = 2 if batch_var_ptr is None else 6
    p, q = _slopes(
        tl.reshape(total, (GROUPS, SIZE)), tl.reshape(along, (GROUPS, SIZE)), mean, var, off, rstd, group, of_groups,
        real, positions, SIZE, channels, shared, weight_ptr, batch_mean_ptr, batch_var_ptr, batch_weight_ptr,
        own_ptr + n * rows * channels, eps, SHARED,
    )  # fmt: skip
    g_x = scale_c * g + tl.reshape(p, (BLOCK_C,))[None, :] * apart + tl.reshape(q, (BLOCK_C,))[None, :]
    at = n * stride_n + (place[:, None] * stride_p + c[None, :] * stride_c)
    tl.store(g_x_ptr + at, rounded(g_x, g_x_ptr.dtype.element_ty), mask=inside)
