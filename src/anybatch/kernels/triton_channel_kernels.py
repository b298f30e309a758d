"""Triton kernels of norms by each channel's moments. Imported when one is launched, as Triton takes a while to import.

Activations are positions of a sample by channels, with any strides. A program sees one sample, in chunks of positions
whose number follows from the shape of a sample, so that its result does not depend on the batch; within a sample places
in memory are counted in 32 bits. Tables of (N, C) numbers have one row a number, (R, N, C).
"""

# Triton is typed for what is called on the host, and settles branches as it compiles:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl

from anybatch.kernels.triton_pieces import activated, rounded, through_activation


@triton.jit
def _part(program, chunks, channels, BLOCK_C: tl.constexpr):
    """The sample, the chunk and the channels that a program works on."""
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (program // (blocks * chunks)).to(tl.int64), program // blocks % chunks, c


@triton.jit
def _around(mean, squares, count, size):
    """Mean and sum of squares around it of what has these in parts, by Chan's rule, over the first dimension."""
    whole = tl.sum(mean * count, axis=0) / size
    apart = tl.where(count > 0, mean - whole[None, :], 0.0)
    rest = tl.sum(apart * count, axis=0) / size  # what rounding a large sum left
    return whole + rest, tl.sum(squares + count * apart * apart, axis=0) - size * rest * rest


@triton.jit
def moments(
    x_ptr,  # (N, C, *)
    partial_ptr,  # (N, K, 2, C): the mean and the sum of squares around it, of each chunk
    positions,
    channels,  # C
    chunk,  # positions in each
    chunks,  # K
    stride_n,
    stride_p,
    stride_c,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, k, c = _part(tl.program_id(0), chunks, channels, BLOCK_C)
    start = k * chunk
    size = tl.minimum(positions - start, chunk)
    lane = tl.arange(0, BLOCK_P)
    x_ptr += n * stride_n
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, size, BLOCK_P):  # each lane by Welford's rule, and then all lanes by Chan's
        inside = (first + lane < size)[:, None] & (c < channels)[None, :]
        place = start + first + lane
        x = tl.load(x_ptr + (place[:, None] * stride_p + c[None, :] * stride_c), mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, x - mean, 0.0)
        mean += apart * (1.0 / (first // BLOCK_P + 1))
        squares += apart * (x - mean)
    count = (tl.maximum(size - lane, 0) + BLOCK_P - 1) // BLOCK_P
    count = count.to(tl.float32)[:, None]
    whole, squares = _around(mean, squares, count, size)
    at = partial_ptr + (n * chunks + k) * 2 * channels + c
    tl.store(at, whole, mask=c < channels)
    tl.store(at + channels, squares, mask=c < channels)


@triton.jit
def joined(partial_ptr, n, c, real, positions, channels, chunk, chunks, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and biased variance of channels, (BLOCK,), from those of chunks."""
    partial_ptr += n * chunks * 2 * channels
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    for first in range(0, chunks, BLOCK_K):
        k = first + lane
        mask = (k < chunks)[:, None] & real[None, :]
        count = tl.minimum(positions - k * chunk, chunk).to(tl.float32)[:, None]
        total += count * tl.load(partial_ptr + k[:, None] * 2 * channels + c[None, :], mask=mask, other=0.0)
    mean = tl.sum(total, axis=0) / positions
    rest = tl.zeros((BLOCK_K, BLOCK), tl.float32)  # what rounding a large sum left
    squares = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    for first in range(0, chunks, BLOCK_K):
        k = first + lane
        mask = (k < chunks)[:, None] & real[None, :]
        count = tl.minimum(positions - k * chunk, chunk).to(tl.float32)[:, None]
        at = partial_ptr + k[:, None] * 2 * channels + c[None, :]
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        rest += count * apart
        squares += tl.load(at + channels, mask=mask, other=0.0) + count * apart * apart
    off = tl.sum(rest, axis=0) / positions
    return mean + off, tl.maximum(tl.sum(squares, axis=0) / positions - off * off, 0.0)


@triton.jit
def added(partial_ptr, n, c, real, channels, chunks, row, rows, BLOCK_K: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """(BLOCK,): the sum of one of the rows (N, K, ROWS, C) over chunks."""
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    for first in range(0, chunks, BLOCK_K):
        k = first + lane
        mask = (k < chunks)[:, None] & real[None, :]
        at = partial_ptr + (n * chunks + k)[:, None] * rows * channels + row * channels + c[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _over_samples(partial_ptr, c, real, positions, channels, chunk, chunks, rows, values, BLOCK_R: tl.constexpr,
                  BLOCK_C: tl.constexpr):  # fmt: skip
    """Mean of channels over all samples, and the sum of squares around it."""
    lane = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + lane
        mask = (row < rows)[:, None] & real[None, :]
        count = tl.minimum(positions - row % chunks * chunk, chunk).to(tl.float32)[:, None]
        at = partial_ptr + row.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        total += count * tl.load(at, mask=mask, other=0.0)
    mean = tl.sum(total, axis=0) / values
    rest = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)  # what rounding a large sum left
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + lane
        mask = (row < rows)[:, None] & real[None, :]
        count = tl.minimum(positions - row % chunks * chunk, chunk).to(tl.float32)[:, None]
        at = partial_ptr + row.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        rest += count * apart
        squares += tl.load(at + channels, mask=mask, other=0.0) + count * apart * apart
    off = tl.sum(rest, axis=0) / values
    return mean + off, tl.maximum(tl.sum(squares, axis=0) - values * off * off, 0.0)


@triton.jit
def joined_samples(
    partial_ptr,  # (N, K, 2, C): of `moments`
    moments_ptr,  # (2, C): mean and sum of squares around it, of all samples
    positions,
    channels,  # C
    chunk,
    chunks,  # K
    rows,  # N K
    values,  # in a channel
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < channels
    mean, squares = _over_samples(
        partial_ptr, c, real, positions, channels, chunk, chunks, rows, values, BLOCK_R, BLOCK_C
    )
    tl.store(moments_ptr + c, mean, mask=real)
    tl.store(moments_ptr + channels + c, squares, mask=real)


@triton.jit
def let_in(
    partial_ptr,  # (N, K, 2, C): of `moments`
    running_mean_ptr,  # (C,), as the next: estimates, which are brought up to date
    running_var_ptr,
    batches_ptr,  # (): how many were let in before
    mean_ptr,  # (C,), as the next: copies of the estimates behind it
    var_ptr,
    positions,
    channels,  # C
    chunk,
    chunks,  # K
    rows,  # N K
    values,  # in a channel
    rate,
    WARM: tl.constexpr,  # whether the first batches weigh more
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < channels
    now_mean, squares = _over_samples(
        partial_ptr, c, real, positions, channels, chunk, chunks, rows, values, BLOCK_R, BLOCK_C
    )
    before = tl.load(running_mean_ptr + c, mask=real, other=0.0)
    around = tl.load(running_var_ptr + c, mask=real, other=0.0)
    drift = now_mean - before
    spread, weight = drift, tl.cast(rate, tl.float32)
    if WARM:
        batches = tl.load(batches_ptr)
        weight = tl.maximum(1.0 / (batches.to(tl.float32) + 1.0 + 1.0 / values), weight)
        spread = tl.where(batches == 0, 0.0, drift)  # the mean of before is no estimate then
    mean = before + weight * drift
    var = around + weight * (squares / values + spread * spread - around)
    tl.store(running_mean_ptr + c, mean, mask=real)
    tl.store(running_var_ptr + c, var, mask=real)
    tl.store(mean_ptr + c, mean, mask=real)
    tl.store(var_ptr + c, var, mask=real)


@triton.jit
def response_numbers(
    partial_ptr,  # (N, K, 2, C): of `moments`
    weight_ptr,  # (C,), as the next
    bias_ptr,
    eps_l_ptr,  # (C,) or (1,)
    numbers_ptr,  # (4, N, C): 0, scale and shift of x, 1 / root mean square
    positions,
    channels,  # C
    chunk,
    chunks,  # K
    shared,  # channels that share one eps_l
    row,  # N C
    eps,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, _, c = _part(tl.program_id(0), 1, channels, BLOCK)
    real = c < channels
    mean, var = joined(partial_ptr, n, c, real, positions, channels, chunk, chunks, BLOCK_K, BLOCK)
    radicand = var + mean * mean + eps
    if eps_l_ptr is not None:
        radicand += tl.abs(tl.load(eps_l_ptr + c // shared, mask=real, other=0.0).to(tl.float32))
    rstd = 1.0 / tl.sqrt(radicand)
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
    at = numbers_ptr + n * channels + c
    row = tl.cast(row, tl.int64)
    tl.store(at, tl.zeros((BLOCK,), tl.float32), mask=real)
    tl.store(at + row, scale, mask=real)
    tl.store(at + 2 * row, shift, mask=real)
    tl.store(at + 3 * row, rstd, mask=real)


@triton.jit
def _of_channels(numbers_ptr, n, c, real, channels, row):
    """Mean, scale and shift."""
    at = numbers_ptr + n * channels + c
    step = tl.cast(row, tl.int64)
    mean = tl.load(at, mask=real, other=0.0)[None, :]
    scale = tl.load(at + step, mask=real, other=0.0)[None, :]
    return mean, scale, tl.load(at + 2 * step, mask=real, other=0.0)[None, :]


@triton.jit
def applied(
    x_ptr,  # (N, C, *), as the next
    y_ptr,
    numbers_ptr,  # (R, N, C): mean, scale, shift
    floor_ptr,  # (C,): what y is at least
    positions,
    channels,  # C
    row,  # N C
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, k, c = _part(tl.program_id(0), tl.cdiv(positions, BLOCK_P), channels, BLOCK_C)
    place = k * BLOCK_P + tl.arange(0, BLOCK_P)
    real = c < channels
    mask = (place < positions)[:, None] & real[None, :]
    at = n * stride_xn + (place[:, None] * stride_xp + c[None, :] * stride_xc)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean, scale, shift = _of_channels(numbers_ptr, n, c, real, channels, row)
    y = activated((x - mean) * scale + shift, ACTIVATION)
    if floor_ptr is not None:
        floor = tl.load(floor_ptr + c, mask=real, other=0.0).to(tl.float32)
        y = tl.where(y < floor[None, :], floor[None, :], y)
    at = n * stride_n + (place[:, None] * stride_p + c[None, :] * stride_c)
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _above(g, z, floor_ptr, c, real):
    """The gradient of what a floor is put under: halves where both are equal, as torch's maximum has it."""
    if floor_ptr is not None:
        floor = tl.load(floor_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
        g = tl.where(z < floor, 0.0, tl.where(z == floor, 0.5 * g, g))
    return g


@triton.jit
def gradient_sums(
    g_ptr,  # (N, C, *): of y
    x_ptr,  # (N, C, *)
    numbers_ptr,  # (R, N, C): mean, scale, shift
    floor_ptr,  # (C,)
    partial_ptr,  # (N, K, 2 or 3, C): sums of the gradient in front of the activation, times x - mean too; of the floor
    positions,
    channels,  # C
    chunk,
    chunks,  # K
    row,  # N C
    stride_gn,
    stride_gp,
    stride_gc,
    stride_n,
    stride_p,
    stride_c,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, k, c = _part(tl.program_id(0), chunks, channels, BLOCK_C)
    real = c < channels
    start = k * chunk
    end = tl.minimum(positions, start + chunk)
    mean, scale, shift = _of_channels(numbers_ptr, n, c, real, channels, row)
    g_ptr += n * stride_gn
    x_ptr += n * stride_n
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    of_floor = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(start, end, BLOCK_P):
        place = first + tl.arange(0, BLOCK_P)
        mask = (place < end)[:, None] & real[None, :]
        g = tl.load(g_ptr + (place[:, None] * stride_gp + c[None, :] * stride_gc), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + (place[:, None] * stride_p + c[None, :] * stride_c), mask=mask, other=0.0).to(tl.float32)
        apart = x - mean
        z = apart * scale + shift
        through = _above(through_activation(g, z, ACTIVATION), z, floor_ptr, c, real)
        total += through
        along += through * apart
        if floor_ptr is not None:
            of_floor += g - through
    rows = 2 if floor_ptr is None else 3
    at = partial_ptr + (n * chunks + k) * rows * channels + c
    tl.store(at, tl.sum(total, axis=0), mask=real)
    tl.store(at + channels, tl.sum(along, axis=0), mask=real)
    if floor_ptr is not None:
        tl.store(at + 2 * channels, tl.sum(of_floor, axis=0), mask=real)


@triton.jit
def response_coefficients(
    partial_ptr,  # (N, K, 2 or 3, C): of `gradient_sums`
    numbers_ptr,  # (4, N, C): of `response_numbers`
    weight_ptr,  # (C,), as the next
    floor_ptr,
    eps_l_ptr,  # (C,) or (1,)
    slopes_ptr,  # (2, N, C)
    own_ptr,  # (N, 3 or 4, C): each sample's part of the gradients of weight, bias, eps_l and floor
    positions,
    channels,  # C
    chunks,  # K
    shared,  # channels that share one eps_l
    row,  # N C
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, _, c = _part(tl.program_id(0), 1, channels, BLOCK)
    real = c < channels
    rows = 2 if floor_ptr is None else 3
    total = added(partial_ptr, n, c, real, channels, chunks, 0, rows, BLOCK_K, BLOCK)
    along = added(partial_ptr, n, c, real, channels, chunks, 1, rows, BLOCK_K, BLOCK)
    row = tl.cast(row, tl.int64)
    at = n * channels + c
    rstd = tl.load(numbers_ptr + 3 * row + at, mask=real, other=0.0)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
    of_square = -0.5 * rstd * rstd * rstd * weight * along
    tl.store(slopes_ptr + at, 2.0 * of_square / positions, mask=real)
    tl.store(slopes_ptr + row + at, tl.zeros((BLOCK,), tl.float32), mask=real)
    to = own_ptr + n * (rows + 1) * channels + c
    tl.store(to, rstd * along, mask=real)
    tl.store(to + channels, total, mask=real)
    sign = tl.zeros((BLOCK,), tl.float32)
    if eps_l_ptr is not None:
        eps_l = tl.load(eps_l_ptr + c // shared, mask=real, other=0.0)
        sign = tl.where(eps_l > 0, 1.0, tl.where(eps_l < 0, -1.0, 0.0))
    tl.store(to + 2 * channels, sign * of_square, mask=real)
    if floor_ptr is not None:
        of_floor = added(partial_ptr, n, c, real, channels, chunks, 2, rows, BLOCK_K, BLOCK)
        tl.store(to + 3 * channels, of_floor, mask=real)


@triton.jit
def combined(
    g_ptr,  # (N, C, *): of y
    x_ptr,  # (N, C, *)
    numbers_ptr,  # (R, N, C): mean, scale, shift
    floor_ptr,  # (C,)
    slopes_ptr,  # (2, N, C)
    own_ptr,  # (N, S): parameters' gradients by each sample
    g_x_ptr,  # (N, C, *)
    sums_ptr,  # (S,)
    samples,  # N
    parameters,  # S
    adders,  # programs that add up own
    positions,
    channels,  # C
    row,  # N C
    stride_gn,
    stride_gp,
    stride_gc,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    if program < adders:
        s = program * BLOCK_S + tl.arange(0, BLOCK_S)
        sums = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
        for first in range(0, samples, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            mask = (n < samples)[:, None] & (s < parameters)[None, :]
            sums += tl.load(own_ptr + n.to(tl.int64)[:, None] * parameters + s[None, :], mask=mask, other=0.0)
        tl.store(sums_ptr + s, tl.sum(sums, axis=0), mask=s < parameters)
    else:
        n, k, c = _part(program - adders, tl.cdiv(positions, BLOCK_P), channels, BLOCK_C)
        place = k * BLOCK_P + tl.arange(0, BLOCK_P)
        real = c < channels
        mask = (place < positions)[:, None] & real[None, :]
        at = n * stride_gn + (place[:, None] * stride_gp + c[None, :] * stride_gc)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = n * stride_xn + (place[:, None] * stride_xp + c[None, :] * stride_xc)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean, scale, shift = _of_channels(numbers_ptr, n, c, real, channels, row)
        apart = x - mean
        z = apart * scale + shift
        g = _above(through_activation(g, z, ACTIVATION), z, floor_ptr, c, real)
        p = tl.load(slopes_ptr + n * channels + c, mask=real, other=0.0)[None, :]
        q = tl.load(slopes_ptr + tl.cast(row, tl.int64) + n * channels + c, mask=real, other=0.0)[None, :]
        g_x = scale * g + p * apart + q
        at = n * stride_n + (place[:, None] * stride_p + c[None, :] * stride_c)
        tl.store(g_x_ptr + at, rounded(g_x, g_x_ptr.dtype.element_ty), mask=mask)
