"""Triton kernels of local context normalization. Imported when one is launched, as Triton takes a while to import.

Activations are positions of a sample by channels, with any strides; fields, two numbers for each position and group of
channels, are (2, N, P, G) in float32. Sums over windows move along one dimension after another, by adding what
comes in and taking what goes out, in float64, so that the cost does not depend on the window; programs begin them anew
every ``chunk`` positions. Fields of moments are joined by the law of total variance.

What is computed of a sample does not depend on what lies beside it. Samples and rows of them are found in 64 bits, what
lies within a row in 32.
"""

# Triton is typed for what is called on the host, and settles branches as it compiles:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from anybatch.kernels.triton_pieces import activated, rounded, through_activation


@triton.jit
def _window(q, size, kernel, SPREADS: tl.constexpr):
    """First and end of a position's window; with SPREADS, of the positions whose windows hold it."""
    before = (kernel - 1) // 2
    if SPREADS:
        start = tl.where(q < kernel, 0, q - kernel + 1 + before)
        end = tl.where(q < size - kernel, q + before + 1, size)
    else:
        start = tl.maximum(tl.minimum(q - before, size - kernel), 0)
        end = start + kernel
    return start, end


@triton.jit
def _added(at, row, there, step, start, end, first, second, SIGN: tl.constexpr, MOMENTS: tl.constexpr):
    """Both sums with what two fields have from ``start`` on; of moments, means and means of squares."""
    for s in range(start, end):
        one = tl.load(at + s * step, mask=there, other=0.0).to(tl.float64)
        two = tl.load(at + row + s * step, mask=there, other=0.0).to(tl.float64)
        if MOMENTS:
            two += one * one
        first += SIGN * one
        second += SIGN * two
    return first, second


@triton.jit
def _moved(at, row, there, step, q, size, kernel, start, end, first, second, MOMENTS: tl.constexpr):
    """The sums moved on to the window of ``q``, and where that begins and ends."""
    to_start, to_end = _window(q, size, kernel, not MOMENTS)
    first, second = _added(at, row, there, step, end, to_end, first, second, 1.0, MOMENTS)
    first, second = _added(at, row, there, step, start, to_start, first, second, -1.0, MOMENTS)
    return to_start, to_end, first, second


@triton.jit
def _moments(first, second, kernel):
    """Mean and variance over so many values, from sums of means and of mean squares."""
    share = 1.0 / tl.cast(kernel, tl.float64)
    mean = first * share
    return mean.to(tl.float32), tl.maximum((second * share - mean * mean).to(tl.float32), 0.0)


@triton.jit
def boxed(
    fields_ptr,  # (2, O, S, J)
    boxes_ptr,  # (2, O, S, J): their moments over the window around each along S, or sums over windows that hold each
    size,  # S
    inner,  # J
    lanes,  # O J
    kernel,
    chunk,
    MOMENTS: tl.constexpr,  # whether fields are means and variances, else gradients
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = lane < lanes
    step = tl.cast(inner, tl.int64)
    row = tl.cast(lanes, tl.int64) * size
    place = lane // inner * step * (size - 1) + lane
    from_q = tl.program_id(1) * chunk
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    start, _ = _window(from_q, size, kernel, not MOMENTS)
    end = start
    for q in range(from_q, tl.minimum(from_q + chunk, size)):
        start, end, first, second = _moved(
            fields_ptr + place, row, there, step, q, size, kernel, start, end, first, second, MOMENTS
        )
        to = boxes_ptr + place + q * step
        if MOMENTS:
            mean, var = _moments(first, second, kernel)
            tl.store(to, mean, mask=there)
            tl.store(to + row, var, mask=there)
        else:
            tl.store(to, first.to(tl.float32), mask=there)
            tl.store(to + row, second.to(tl.float32), mask=there)


@triton.jit
def _part(chunks, inner, groups, EACH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
          BLOCK_G: tl.constexpr):  # fmt: skip
    """The sample, chunk, inner positions, groups and channels that a program works on."""
    program = tl.program_id(0)
    blocks, tiles = tl.cdiv(groups, BLOCK_G), tl.cdiv(inner, BLOCK_P)
    first = program % blocks * BLOCK_G
    i = program // blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    k = program // (blocks * tiles)
    lane = tl.arange(0, BLOCK_G * BLOCK_E)
    if EACH == BLOCK_E:
        c = first * EACH + lane
        real = c < groups * EACH
    else:
        c = (first + lane // BLOCK_E) * EACH + lane % BLOCK_E
        real = (lane % BLOCK_E < EACH) & (first + lane // BLOCK_E < groups)
    return (k // chunks).to(tl.int64), k % chunks, i, first + tl.arange(0, BLOCK_G), c, real


@triton.jit
def _values(ptr, i, c, mask, stride_p, stride_c):
    return tl.load(ptr + (i[:, None] * stride_p + c[None, :] * stride_c), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _of_channels(v, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr):
    """(BLOCK_P, BLOCK_G) numbers of groups, for each of their channels."""
    spread = v[:, :, None] + tl.zeros((BLOCK_P, BLOCK_G, BLOCK_E), tl.float32)
    return tl.reshape(spread, (BLOCK_P, BLOCK_G * BLOCK_E))


@triton.jit
def _summed(v, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sums over the channels of each group, (BLOCK_P, BLOCK_G)."""
    return tl.sum(tl.reshape(v, (BLOCK_P, BLOCK_G, BLOCK_E)), axis=2)


@triton.jit
def pixel_moments(
    x_ptr,  # (N, C, *)
    fields_ptr,  # (2, N, P, G): mean and variance over the channels of each group
    positions,  # P
    groups,  # G
    row,  # N P G
    stride_n,
    stride_p,
    stride_c,
    EACH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    n, _, i, g, c, real = _part(1, positions, groups, EACH, BLOCK_E, BLOCK_P, BLOCK_G)
    x_ptr += n * stride_n
    there = i < positions
    mask = there[:, None] & real[None, :]
    x = _values(x_ptr, i, c, mask, stride_p, stride_c)
    mean = _summed(x, BLOCK_P, BLOCK_G, BLOCK_E) / EACH
    apart = tl.where(mask, x - _of_channels(mean, BLOCK_P, BLOCK_G, BLOCK_E), 0.0)
    rest = _summed(apart, BLOCK_P, BLOCK_G, BLOCK_E) / EACH  # what rounding the sum left
    var = tl.maximum(_summed(apart * apart, BLOCK_P, BLOCK_G, BLOCK_E) / EACH - rest * rest, 0.0)
    to = fields_ptr + n * positions * groups + (i[:, None] * groups + g[None, :])
    held = there[:, None] & (g < groups)[None, :]
    tl.store(to, mean + rest, mask=held)
    tl.store(to + tl.cast(row, tl.int64), var, mask=held)


@triton.jit
def _affine(hat, weight_ptr, bias_ptr, c, real):
    if weight_ptr is not None:
        hat *= tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        hat += tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
    return hat


@triton.jit
def normalized(
    x_ptr,  # (N, C, *), as the next
    y_ptr,
    weight_ptr,  # (C,), as the next
    bias_ptr,
    fields_ptr,  # (2, N, S I, G): moments over all dimensions of windows but S
    size,  # S
    inner,  # I
    groups,  # G
    row,  # N S I G
    kernel,
    chunk,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    eps,
    ACTIVATION: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    n, k, i, g, c, real = _part(tl.cdiv(size, chunk), inner, groups, EACH, BLOCK_E, BLOCK_P, BLOCK_G)
    x_ptr += n * stride_xn
    y_ptr += n * stride_n
    step, row = tl.cast(inner, tl.int64) * groups, tl.cast(row, tl.int64)
    fields = fields_ptr + n * size * step + (i[:, None] * groups + g[None, :])
    mask = (i < inner)[:, None] & real[None, :]
    there = (i < inner)[:, None] & (g < groups)[None, :]
    first = tl.zeros((BLOCK_P, BLOCK_G), tl.float64)
    second = tl.zeros((BLOCK_P, BLOCK_G), tl.float64)
    start, _ = _window(k * chunk, size, kernel, False)
    end = start
    for q in range(k * chunk, tl.minimum((k + 1) * chunk, size)):
        start, end, first, second = _moved(fields, row, there, step, q, size, kernel, start, end, first, second, True)
        mean, var = _moments(first, second, kernel)
        mean = _of_channels(mean, BLOCK_P, BLOCK_G, BLOCK_E)
        rstd = _of_channels(1.0 / tl.sqrt(var + eps), BLOCK_P, BLOCK_G, BLOCK_E)
        at = tl.cast(q, tl.int64) * inner
        x = _values(x_ptr + at * stride_xp, i, c, mask, stride_xp, stride_xc)
        y = activated(_affine((x - mean) * rstd, weight_ptr, bias_ptr, c, real), ACTIVATION)
        to = y_ptr + at * stride_p + (i[:, None] * stride_p + c[None, :] * stride_c)
        tl.store(to, rounded(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pulled(
    g_ptr,  # (N, C, *): of y
    x_ptr,  # (N, C, *)
    weight_ptr,  # (C,), as the next
    bias_ptr,
    fields_ptr,  # (2, N, S I, G): moments over all dimensions of windows but S
    given_ptr,  # (2, N, S I, G): what the window of each position gives its values, a + b x
    rstd_ptr,  # (N, S I, G)
    through_ptr,  # (N, C, *): g in front of the activation, where there is one
    partial_ptr,  # (programs of a group, 2, C): of the weight's and the bias's gradients
    size,  # S
    inner,  # I
    groups,  # G
    row,  # N S I G
    kernel,
    chunk,
    values,  # of a window
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
    EACH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    n, k, i, g, c, real = _part(tl.cdiv(size, chunk), inner, groups, EACH, BLOCK_E, BLOCK_P, BLOCK_G)
    g_ptr += n * stride_gn
    x_ptr += n * stride_xn
    through_ptr += n * stride_n
    step, row = tl.cast(inner, tl.int64) * groups, tl.cast(row, tl.int64)
    place = n * size * step + (i[:, None] * groups + g[None, :])
    mask = (i < inner)[:, None] & real[None, :]
    there = (i < inner)[:, None] & (g < groups)[None, :]
    first = tl.zeros((BLOCK_P, BLOCK_G), tl.float64)
    second = tl.zeros((BLOCK_P, BLOCK_G), tl.float64)
    # Added up over positions at the end alone: that takes all threads.
    g_weight = tl.zeros((BLOCK_P, BLOCK_G * BLOCK_E), tl.float32)
    g_bias = tl.zeros((BLOCK_P, BLOCK_G * BLOCK_E), tl.float32)
    start, _ = _window(k * chunk, size, kernel, False)
    end = start
    for q in range(k * chunk, tl.minimum((k + 1) * chunk, size)):
        start, end, first, second = _moved(
            fields_ptr + place, row, there, step, q, size, kernel, start, end, first, second, True
        )
        mean, var = _moments(first, second, kernel)
        rstd = 1.0 / tl.sqrt(var + eps)
        at = tl.cast(q, tl.int64) * inner
        x = _values(x_ptr + at * stride_xp, i, c, mask, stride_xp, stride_xc)
        gradient = _values(g_ptr + at * stride_gp, i, c, mask, stride_gp, stride_gc)
        hat = (x - _of_channels(mean, BLOCK_P, BLOCK_G, BLOCK_E)) * _of_channels(rstd, BLOCK_P, BLOCK_G, BLOCK_E)
        if ACTIVATION != "none":
            gradient = through_activation(gradient, _affine(hat, weight_ptr, bias_ptr, c, real), ACTIVATION)
            at_through = through_ptr + at * stride_p + (i[:, None] * stride_p + c[None, :] * stride_c)
            tl.store(at_through, rounded(gradient, through_ptr.dtype.element_ty), mask=mask)
        along = tl.where(mask, gradient * hat, 0.0)
        g_weight += along
        g_bias += gradient
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
            gradient *= weight
            along *= weight
        b = -rstd * rstd * _summed(along, BLOCK_P, BLOCK_G, BLOCK_E) / values
        a = -rstd * _summed(gradient, BLOCK_P, BLOCK_G, BLOCK_E) / values - b * mean
        to = place + q * step
        tl.store(given_ptr + to, a, mask=there)
        tl.store(given_ptr + row + to, b, mask=there)
        tl.store(rstd_ptr + to, rstd, mask=there)
    channels = groups * EACH
    to = partial_ptr + (tl.program_id(0) // tl.cdiv(groups, BLOCK_G)).to(tl.int64) * 2 * channels + c
    tl.store(to, tl.sum(g_weight, axis=0), mask=real)
    tl.store(to + channels, tl.sum(g_bias, axis=0), mask=real)


@triton.jit
def combined(
    g_ptr,  # (N, C, *): of y in front of the activation; may be g_x
    x_ptr,  # (N, C, *)
    weight_ptr,  # (C,)
    given_ptr,  # (2, N, S I, G): a and b of `pulled`, summed over all dimensions of windows but S
    rstd_ptr,  # (N, S I, G)
    g_x_ptr,  # (N, C, *)
    size,  # S
    inner,  # I
    groups,  # G
    row,  # N S I G
    kernel,
    chunk,
    stride_gn,
    stride_gp,
    stride_gc,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_n,
    stride_p,
    stride_c,
    EACH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    n, k, i, g, c, real = _part(tl.cdiv(size, chunk), inner, groups, EACH, BLOCK_E, BLOCK_P, BLOCK_G)
    g_ptr += n * stride_gn
    x_ptr += n * stride_xn
    g_x_ptr += n * stride_n
    step, row = tl.cast(inner, tl.int64) * groups, tl.cast(row, tl.int64)
    place = n * size * step + (i[:, None] * groups + g[None, :])
    mask = (i < inner)[:, None] & real[None, :]
    there = (i < inner)[:, None] & (g < groups)[None, :]
    first = tl.zeros((BLOCK_P, BLOCK_G), tl.float64)
    second = tl.zeros((BLOCK_P, BLOCK_G), tl.float64)
    start, _ = _window(k * chunk, size, kernel, True)
    end = start
    for q in range(k * chunk, tl.minimum((k + 1) * chunk, size)):
        start, end, first, second = _moved(
            given_ptr + place, row, there, step, q, size, kernel, start, end, first, second, False
        )
        a = _of_channels(first.to(tl.float32), BLOCK_P, BLOCK_G, BLOCK_E)
        b = _of_channels(second.to(tl.float32), BLOCK_P, BLOCK_G, BLOCK_E)
        rstd = tl.load(rstd_ptr + place + q * step, mask=there, other=0.0)
        at = tl.cast(q, tl.int64) * inner
        x = _values(x_ptr + at * stride_xp, i, c, mask, stride_xp, stride_xc)
        gradient = _values(g_ptr + at * stride_gp, i, c, mask, stride_gp, stride_gc)
        if weight_ptr is not None:
            gradient *= tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
        g_x = gradient * _of_channels(rstd, BLOCK_P, BLOCK_G, BLOCK_E) + a + b * x
        to = g_x_ptr + at * stride_p + (i[:, None] * stride_p + c[None, :] * stride_c)
        tl.store(to, rounded(g_x, g_x_ptr.dtype.element_ty), mask=mask)
