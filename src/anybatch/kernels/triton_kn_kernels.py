"""Triton kernels of KNConv's stages. Imported when one is launched, since Triton takes a while to import.

Activations are positions of a sample by channels, with any strides; maps of one channel are plain vectors of positions
(of the input, "pixels") or of windows (of the output). Programs are numbered sample by sample and see positions of one
sample, so that its result does not depend on the batch; within a sample places in memory are counted in 32 bits.
Geometry is given for three dimensions, outermost first, missing ones as one position.
"""

# Triton is typed for what is called on the host, and settles branches as it compiles:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl

from anybatch.kernels.triton_pieces import rounded


@triton.jit
def _kept(seed_ptr, n, place, first, channels, threshold, BLOCK_C: tl.constexpr):
    """(rows, BLOCK_C): what dropout keeps of channels ``first`` on; `anybatch.methods.kernel_norm.dropout_mask`."""
    z = tl.load(seed_ptr).to(tl.uint64, bitcast=True) + (n + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    low = (z & 0xFFFFFFFF).to(tl.uint32)
    high = (z >> 32).to(tl.uint32)
    pair = (first // 2 + tl.arange(0, BLOCK_C // 2)).to(tl.uint32)
    at = (place * ((channels + 1) // 2)).to(tl.uint32)
    h = (at[:, None] + pair[None, :]) ^ low
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = ((h ^ (h >> 15)) + high) * 0x846CA68B
    h = (h ^ (h >> 16)).to(tl.int32, bitcast=True)
    return tl.interleave((h << 16) >> 16, h >> 16) >= threshold


@triton.jit
def _rows(size, BLOCK: tl.constexpr):
    """The sample that a program works on, and its block of positions."""
    tiles = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), program % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def pixel_moments(
    x_ptr,  # (N, C, *)
    mean_ptr,  # (rows,), as the next two
    var_ptr,
    own_ptr,
    seed_ptr,  # ()
    threshold,
    positions,
    channels,  # C
    stride_n,
    stride_p,
    stride_c,
    DROPS: tl.constexpr,
    OWN: tl.constexpr,  # whether the mean of all values is asked for too
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, place = _rows(positions, BLOCK_P)
    there = place < positions
    row = n * positions + place
    x_ptr += n * stride_n
    mean = tl.zeros((BLOCK_P,), tl.float32)
    squares = tl.zeros((BLOCK_P,), tl.float32)
    own = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = there[:, None] & (c < channels)[None, :]
        x = tl.load(x_ptr + place[:, None] * stride_p + c[None, :] * stride_c, mask=inside, other=0.0)
        x = x.to(tl.float32)
        if OWN:
            own += tl.sum(x, axis=1)
        if DROPS:
            x = tl.where(_kept(seed_ptr, n, place, first, channels, threshold, BLOCK_C), x, 0.0)
        # Two passes over what is in registers, and Chan's rule between blocks of channels.
        count = tl.minimum(channels - first, BLOCK_C).to(tl.float32)
        block_mean = tl.sum(x, axis=1) / count
        apart = tl.where(inside, x - block_mean[:, None], 0.0)
        block_squares = tl.sum(apart * apart, axis=1)
        delta = block_mean - mean
        mean += delta * (count / (first + count))
        squares += block_squares + delta * delta * (first * count / (first + count))
    tl.store(mean_ptr + row, mean, mask=there)
    tl.store(var_ptr + row, squares / channels, mask=there)
    if OWN:
        tl.store(own_ptr + row, own / channels, mask=there)


@triton.jit
def _tap(tap, KH, KW):
    """The place of a window's position in it."""
    return tap // (KH * KW), tap // KW % KH, tap % KW


@triton.jit
def group_means(
    x_ptr,  # (N, C, *)
    own_ptr,  # (N, G, *)
    windows,
    groups,  # G
    size,  # C / G
    stride_n,
    stride_p,
    stride_c,
    stride_own_n,
    stride_own_w,
    stride_own_g,
    D, H, W,  # of the input
    OH, OW,  # of the output
    KD, KH, KW,
    SD, SH, SW,
    PD, PH, PW,
    LD, LH, LW,
    BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,  # of channels of each of these groups
):  # fmt: skip
    n, window = _rows(windows, BLOCK_W)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    channel = tl.arange(0, BLOCK_C)
    there = (window < windows)[:, None, None] & (group < groups)[None, :, None]
    first_d = window // (OH * OW) * SD - PD
    first_h = window // OW % OH * SH - PH
    first_w = window % OW * SW - PW
    x_ptr += n * stride_n
    sums = tl.zeros((BLOCK_W, BLOCK_G, BLOCK_C), tl.float32)
    for tap in range(0, KD * KH * KW):
        a, b, c = _tap(tap, KH, KW)
        d, h, w = first_d + a * LD, first_h + b * LH, first_w + c * LW
        inside = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        place = ((d * H + h) * W + w) * stride_p
        for first in range(0, size, BLOCK_C):
            within = first + channel
            at = (group * size)[:, None] + within[None, :]
            mask = there & inside[:, None, None] & (within < size)[None, None, :]
            x = tl.load(x_ptr + place[:, None, None] + at[None, :, :] * stride_c, mask=mask, other=0.0)
            sums += x.to(tl.float32)
    own = tl.sum(sums, axis=2) / (KD * KH * KW * size)
    at = n * stride_own_n + window[:, None] * stride_own_w + group[None, :] * stride_own_g
    tl.store(own_ptr + at, own, mask=(window < windows)[:, None] & (group < groups)[None, :])


@triton.jit
def normalized(
    z_ptr,  # (N, O, *), overwritten by what the convolution gives
    y_ptr,  # (N, O, *), may be z
    residual_ptr,  # (N, O, *)
    pixel_mean_ptr,  # (N pixels,), as the next two
    pixel_var_ptr,
    own_ptr,  # (N pixels,), or where GROUPED (N, G, *) of windows
    total_ptr,  # (O,), as the next two
    rest_ptr,
    bias_ptr,
    mean_ptr,  # (rows,), as the next two
    scale_ptr,
    apart_ptr,
    windows,
    filters,  # O
    stride_n,
    stride_w,
    stride_o,
    per_group,  # O / G
    stride_own_n,
    stride_own_w,
    stride_own_g,
    D, H, W,  # of the input
    OH, OW,  # of the output
    KD, KH, KW,
    SD, SH, SW,
    PD, PH, PW,
    LD, LH, LW,  # dilation
    kept_rate,  # 1 - p
    eps,
    DROPS: tl.constexpr,  # and all filters read all channels
    GROUPED: tl.constexpr,
    RESTS: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ALONE: tl.constexpr,  # whether what the convolution gives is kept beside y
    RELU: tl.constexpr,
    TAPS: tl.constexpr,  # the power of two from KD KH KW on
    BLOCK_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    n, window = _rows(windows, BLOCK_W)
    there = window < windows
    row = n * windows + window
    first_d = window // (OH * OW) * SD - PD
    first_h = window // OW % OH * SH - PH
    first_w = window % OW * SW - PW
    start = n * D * H * W
    taps = KD * KH * KW
    tap = tl.arange(0, TAPS)
    a, b, c = _tap(tap, KH, KW)
    d = first_d[:, None] + (a * LD)[None, :]
    h = first_h[:, None] + (b * LH)[None, :]
    w = first_w[:, None] + (c * LW)[None, :]
    inside = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    inside = inside & there[:, None] & (tap < taps)[None, :]
    at = start + (d * H + h) * W + w
    means = tl.load(pixel_mean_ptr + at, mask=inside, other=0.0)
    mean = tl.sum(means, axis=1) / taps
    apart = tl.where((tap < taps)[None, :], means - mean[:, None], 0.0)  # padded positions have the mean 0
    var = tl.sum(tl.load(pixel_var_ptr + at, mask=inside, other=0.0) + apart * apart, axis=1) / taps
    mean = mean / kept_rate
    scale = 1.0 / tl.sqrt(var / (kept_rate * kept_rate) + eps)
    own = mean
    if DROPS:
        own = tl.sum(tl.load(own_ptr + at, mask=inside, other=0.0), axis=1) / taps
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + row, mean, mask=there)
        tl.store(scale_ptr + row, scale, mask=there)
        if DROPS:
            tl.store(apart_ptr + row, own - mean, mask=there)

    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = there[:, None] & (o < filters)[None, :]
    place = window[:, None] * stride_w + o[None, :] * stride_o
    y = tl.load(z_ptr + n * stride_n + place, mask=mask, other=0.0).to(tl.float32)
    own = own[:, None]
    if GROUPED:
        at_own = n * stride_own_n + window[:, None] * stride_own_w + (o // per_group)[None, :] * stride_own_g
        own = tl.load(own_ptr + at_own, mask=mask, other=0.0)
    if RESTS:
        rest = tl.load(rest_ptr + o, mask=o < filters, other=0.0)
        y -= own * rest[None, :]
    if DROPS or GROUPED:
        total = tl.load(total_ptr + o, mask=o < filters, other=0.0)
        y += (own - mean[:, None]) * total[None, :]
    y *= scale[:, None]
    if BIASED:
        y += tl.load(bias_ptr + o, mask=o < filters, other=0.0).to(tl.float32)[None, :]
    y = rounded(y, y_ptr.dtype.element_ty)
    if ALONE:
        tl.store(z_ptr + n * stride_n + place, y, mask=mask)
    if RESIDUAL:
        residual = tl.load(residual_ptr + n * stride_n + place, mask=mask, other=0.0).to(tl.float32)
        y = rounded(y.to(tl.float32) + residual, y_ptr.dtype.element_ty)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    tl.store(y_ptr + n * stride_n + place, y, mask=mask)


@triton.jit
def _store_of_windows(var_ptr, own_ptr, along, through, scale, row, there, SUMS: tl.constexpr):
    tl.store(var_ptr + row, -0.5 * scale * scale * along, mask=there)
    if SUMS:
        tl.store(own_ptr + row, through, mask=there)


@triton.jit
def pulled(
    g_ptr,  # (N, O, *): of y
    y_ptr,  # (N, O, *)
    own_ptr,  # (N, O, *): what the convolution gave
    residual_ptr,  # (N, O, *): to be taken from y
    bias_ptr,  # (O,), as the next
    total_ptr,
    scale_ptr,  # (rows,), as the next
    apart_ptr,  # a window's mean less that after dropout; where GROUPED the latter
    group_ptr,  # (N, G, *): the former of each group
    h_ptr,  # (N, O, *): of z
    masked_ptr,  # (N, O, *): g behind the activation
    g_var_ptr,  # (rows,), as the next
    g_own_ptr,
    partial_ptr,  # (programs, 1 or 2, O): sums of g, and of g scale apart
    windows,
    filters,  # O
    stride_n,
    stride_w,
    stride_o,
    per_group,  # O / G
    stride_own_n,
    stride_own_w,
    stride_own_g,
    SUMS: tl.constexpr,  # whether sums of filters count: with dropout, and where GROUPED
    GROUPED: tl.constexpr,
    BIASED: tl.constexpr,
    ALONE: tl.constexpr,  # whether own is not y
    SUBTRACTS: tl.constexpr,
    RELU: tl.constexpr,
    MASKED: tl.constexpr,
    ALL: tl.constexpr,  # whether BLOCK_O holds all filters; else ROWS is BLOCK_W
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tiles = tl.cdiv(windows, ROWS)
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    start = program % tiles * ROWS
    sample = n * stride_n
    along = tl.zeros((BLOCK_W,), tl.float32)
    through = tl.zeros((BLOCK_W,), tl.float32)
    for first in range(0, filters, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        real = o < filters
        # Added up over rows at the end alone: that takes all threads.
        g_bias = tl.zeros((BLOCK_W, BLOCK_O), tl.float32)
        g_total = tl.zeros((BLOCK_W, BLOCK_O), tl.float32)
        if BIASED:
            bias = tl.load(bias_ptr + o, mask=real, other=0.0).to(tl.float32)
        if SUMS:
            total = tl.load(total_ptr + o, mask=real, other=0.0)
        for block in range(0, ROWS, BLOCK_W):
            window = start + block + tl.arange(0, BLOCK_W)
            row = n * windows + window
            there = window < windows
            mask = there[:, None] & real[None, :]
            place = window[:, None] * stride_w + o[None, :] * stride_o
            g = tl.load(g_ptr + sample + place, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + sample + place, mask=mask, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + row, mask=there, other=0.0)
            if RELU:
                g = tl.where(y <= 0, 0.0, g)
            if MASKED:
                tl.store(masked_ptr + sample + place, rounded(g, masked_ptr.dtype.element_ty), mask=mask)
            own = y
            if ALONE:
                own = tl.load(own_ptr + sample + place, mask=mask, other=0.0).to(tl.float32)
            if SUBTRACTS:
                own -= tl.load(residual_ptr + sample + place, mask=mask, other=0.0).to(tl.float32)
            if BIASED:
                own -= bias[None, :]
            h = g * scale[:, None]
            tl.store(h_ptr + sample + place, rounded(h, h_ptr.dtype.element_ty), mask=mask)
            g_bias += g
            if ALL:
                along = tl.sum(g * own, axis=1)
            else:
                along += tl.sum(g * own, axis=1)
            if SUMS:
                apart = tl.load(apart_ptr + row, mask=there, other=0.0)[:, None]
                if GROUPED:
                    group = (o // per_group)[None, :]
                    at_own = n * stride_own_n + window[:, None] * stride_own_w + group * stride_own_g
                    g_total += h * (tl.load(group_ptr + at_own, mask=mask, other=0.0) - apart)
                else:
                    g_total += h * apart
                if ALL:
                    through = tl.sum(h * total[None, :], axis=1)
                else:
                    through += tl.sum(h * total[None, :], axis=1)
            if ALL:
                _store_of_windows(g_var_ptr, g_own_ptr, along, through, scale, row, there, SUMS)
        at = partial_ptr + program.to(tl.int64) * (1 + SUMS) * filters + o
        tl.store(at, tl.sum(g_bias, axis=0), mask=real)
        if SUMS:
            tl.store(at + filters, tl.sum(g_total, axis=0), mask=real)
    if not ALL:
        window = start + tl.arange(0, BLOCK_W)
        row = n * windows + window
        there = window < windows
        scale = tl.load(scale_ptr + row, mask=there, other=0.0)
        _store_of_windows(g_var_ptr, g_own_ptr, along, through, scale, row, there, SUMS)


@triton.jit
def through_moments(
    g_ptr,  # (N, C, *): of x through the convolution, overwritten by the whole gradient
    x_ptr,  # (N, C, *)
    mean_ptr,  # (N windows,), as the next two
    g_var_ptr,
    g_own_ptr,
    seed_ptr,  # ()
    threshold,
    positions,
    channels,  # C
    stride_n,
    stride_p,
    stride_c,
    stride_xn,
    stride_xp,
    stride_xc,
    H, W,  # of the input
    OD, OH, OW,  # of the output
    KD, KH, KW,
    SD, SH, SW,
    PD, PH, PW,
    LD, LH, LW,
    kept_rate,
    DROPS: tl.constexpr,
    PLAIN: tl.constexpr,  # whether g_own goes through the mean after dropout alone
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, place = _rows(positions, BLOCK_P)
    there = place < positions
    d, h, w = place // (H * W), place // W % H, place % W
    tap = tl.arange(0, TAPS)  # the windows in which this is the position
    i, j, k = _tap(tap, KH, KW)
    td = (d + PD)[:, None] - (i * LD)[None, :]
    th = (h + PH)[:, None] - (j * LH)[None, :]
    tw = (w + PW)[:, None] - (k * LW)[None, :]
    a, b, c = td // SD, th // SH, tw // SW
    meets = (td >= 0) & (th >= 0) & (tw >= 0) & (a * SD == td) & (b * SH == th) & (c * SW == tw)
    meets = meets & (a < OD) & (b < OH) & (c < OW) & there[:, None] & (tap < KD * KH * KW)[None, :]
    at = n * OD * OH * OW + (a * OH + b) * OW + c
    slopes = 2 * tl.load(g_var_ptr + at, mask=meets, other=0.0) / (kept_rate * kept_rate)
    means = tl.load(mean_ptr + at, mask=meets, other=0.0) * kept_rate
    slope = tl.sum(slopes, axis=1)
    offset = -tl.sum(slopes * means, axis=1)
    own = slope
    if DROPS or PLAIN:
        own = tl.sum(tl.load(g_own_ptr + at, mask=meets, other=0.0), axis=1)
        offset -= own / kept_rate
    size = KD * KH * KW * channels
    slope, offset, own = slope / size, offset / size, own / size
    first = tl.program_id(1) * BLOCK_C
    column = first + tl.arange(0, BLOCK_C)
    mask = there[:, None] & (column < channels)[None, :]
    at_x = n * stride_xn + (place[:, None] * stride_xp + column[None, :] * stride_xc)
    at_g = n * stride_n + (place[:, None] * stride_p + column[None, :] * stride_c)
    x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
    through = slope[:, None] * x + offset[:, None]
    if DROPS:
        through = tl.where(_kept(seed_ptr, n, place, first, channels, threshold, BLOCK_C), through, 0.0)
        if not PLAIN:
            through += own[:, None]
    g = tl.load(g_ptr + at_g, mask=mask, other=0.0).to(tl.float32) + through
    tl.store(g_ptr + at_g, rounded(g, g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def center_filters(
    w_ptr,  # (O, S), contiguous, as the next
    centered_ptr,
    total_ptr,  # (O,), as the next
    rest_ptr,
    size,  # S
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        sums += tl.load(w_ptr + row * size + s, mask=s < size, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0)
    mean = total / size
    left = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row * size + s, mask=s < size, other=0.0).to(tl.float32)
        centered = rounded(tl.where(s < size, w - mean, 0.0), centered_ptr.dtype.element_ty)
        left += centered.to(tl.float32)
        tl.store(centered_ptr + row * size + s, centered, mask=s < size)
    tl.store(total_ptr + row, total)
    tl.store(rest_ptr + row, tl.sum(left, axis=0))


@triton.jit
def through_filters(
    g_ptr,  # (O, S), contiguous, as the next
    g_weight_ptr,
    g_total_ptr,  # (O,)
    size,  # S
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        sums += tl.load(g_ptr + row * size + s, mask=s < size, other=0.0).to(tl.float32)
    shift = -tl.sum(sums, axis=0) / size
    if SUMS:
        shift += tl.load(g_total_ptr + row)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + row * size + s, mask=s < size, other=0.0).to(tl.float32) + shift
        tl.store(g_weight_ptr + row * size + s, rounded(g, g_weight_ptr.dtype.element_ty), mask=s < size)
