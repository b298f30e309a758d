"""Triton kernels over all parameters of a network at once. Imported when one is launched.

A table tells where each tensor lies, by address, and how its rows, which are units or filters, are counted: programs
are numbered row after row, tensor after tensor. Rows are dense in memory one after another.
"""

# Triton is typed for what is called on the host, and settles branches as it compiles:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportArgumentType=false
import triton
import triton.language as tl

from anybatch.kernels.triton_pieces import rounded


@triton.jit
def _at(address, element: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to a row that begins at an address."""
    ptr = address.to(tl.pointer_type(element))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _norm(ptr, size, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        values = tl.load(ptr + s, mask=s < size, other=0.0).to(tl.float32)
        squares += values * values
    return tl.sqrt(tl.sum(squares, axis=0))


@triton.jit
def clip_units(
    owners_ptr,  # (U,): the row of the table that tells of a unit
    table_ptr,  # (T, 5): addresses of weights and gradient, values in a unit, first unit here and in the results
    scale_ptr,  # (): how many times too large gradients are
    ratios_ptr,  # results, as the next
    over_ptr,
    clip_factor,
    eps,
    least,
    WEIGHT: tl.constexpr,  # dtypes
    GRADIENT: tl.constexpr,
    WEIGHT_BYTES: tl.constexpr,
    GRADIENT_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether units begin at 16 bytes
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0)
    entry = table_ptr + tl.load(owners_ptr + unit) * 5
    size = tl.load(entry + 2)
    row = unit - tl.load(entry + 3)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    w_ptr = _at(tl.load(entry) + row * size * WEIGHT_BYTES, WEIGHT, ALIGNED)
    g_ptr = _at(tl.load(entry + 1) + row * size * GRADIENT_BYTES, GRADIENT, ALIGNED)
    floored = tl.maximum(_norm(w_ptr, size, BLOCK), eps)
    gradient = _norm(g_ptr, size, BLOCK)
    if scale_ptr is not None:
        gradient /= tl.load(scale_ptr).to(tl.float32)
    most = clip_factor * floored
    # What is not finite stays so: a factor of 0 would turn an infinite gradient's finite neighbors into 0.
    over = (gradient > most) & (gradient < float("inf"))
    at = tl.load(entry + 4) + row
    tl.store(ratios_ptr + at, gradient / floored)
    tl.store(over_ptr + at, over.to(tl.int8))
    if over:
        factor = most / tl.maximum(gradient, least)
        for first in range(0, size, BLOCK):
            s = first + tl.arange(0, BLOCK)
            values = tl.load(g_ptr + s, mask=s < size, other=0.0).to(tl.float32) * factor
            tl.store(g_ptr + s, rounded(values, GRADIENT), mask=s < size)


@triton.jit
def _standardize_row(w_ptr, out_ptr, gain, size, divisor, eps, PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Write a standardized filter times a gain; its mean, and scale and pull of `anybatch.methods.filters.Rule`."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        total += tl.load(w_ptr + s, mask=s < size, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / size
    rest = tl.zeros((BLOCK,), tl.float32)  # what rounding a large sum left
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + s, mask=s < size, other=0.0).to(tl.float32)
        apart = tl.where(s < size, w - mean, 0.0)
        rest += apart
        squares += apart * apart
    off = tl.sum(rest, axis=0) / size
    mean += off
    squared_norm = tl.maximum(tl.sum(squares, axis=0) - size * off * off, 0.0)
    v = squared_norm / divisor
    tiny = 1.1754943508222875e-38  # of float32
    if PLACE == "outside":
        scale = 1.0 / (tl.sqrt(tl.maximum(v, tiny)) + eps)
        pull = 1.0 / tl.maximum(tl.sqrt(squared_norm * divisor), 1.0842021724855044e-19)
    elif PLACE == "inside":
        scale = 1.0 / tl.sqrt(v + eps)
        pull = scale / divisor
    else:
        scale = 1.0 / tl.sqrt(tl.maximum(v, eps))
        pull = tl.where(squared_norm >= eps, scale, 0.0)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + s, mask=s < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + s, rounded((w - mean) * (scale * gain), out_ptr.dtype.element_ty), mask=s < size)
    return mean, scale, pull


@triton.jit
def _pull_row(g_ptr, w_ptr, to_ptr, gain, stats_ptr, filters, size, BLOCK: tl.constexpr):
    """Write the gradient of a filter; the gain's."""
    mean = tl.load(stats_ptr)
    scale = tl.load(stats_ptr + filters)
    pull = tl.load(stats_ptr + 2 * filters)
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + s, mask=s < size, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + s, mask=s < size, other=0.0).to(tl.float32)
        total += g
        along += g * (w - mean)
    g_mean = tl.sum(total, axis=0) / size
    g_gain = tl.sum(along, axis=0) * scale
    own = scale * gain
    for first in range(0, size, BLOCK):
        s = first + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + s, mask=s < size, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + s, mask=s < size, other=0.0).to(tl.float32)
        pulled = own * ((g - g_mean) - (pull * g_gain) * (w - mean))
        tl.store(to_ptr + s, rounded(pulled, to_ptr.dtype.element_ty), mask=s < size)
    return g_gain


@triton.jit
def standardize_filters(
    w_ptr,  # (O, S), dense rows, as the next
    out_ptr,
    gain_ptr,  # (O,)
    stats_ptr,  # (3, O): mean, scale, pull
    filters,  # O
    size,  # S
    divisor,
    eps,
    PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64)
    gain = 1.0
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + o).to(tl.float32)
    mean, scale, pull = _standardize_row(w_ptr + o * size, out_ptr + o * size, gain, size, divisor, eps, PLACE, BLOCK)
    tl.store(stats_ptr + o, mean)
    tl.store(stats_ptr + filters + o, scale)
    tl.store(stats_ptr + 2 * filters + o, pull)


@triton.jit
def pull_filters(
    g_ptr,  # (O, S), dense rows, as the next two
    w_ptr,
    g_w_ptr,
    gain_ptr,  # (O,)
    stats_ptr,  # (3, O)
    g_gain_ptr,  # (O,)
    filters,  # O
    size,  # S
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64)
    at = o * size
    gain = 1.0
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + o).to(tl.float32)
    g_gain = _pull_row(g_ptr + at, w_ptr + at, g_w_ptr + at, gain, stats_ptr + o, filters, size, BLOCK)
    if gain_ptr is not None:
        tl.store(g_gain_ptr + o, g_gain)


@triton.jit
def _filter_of(owners_ptr, table_ptr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """The entry of the table of a program's filter, its place in the tensor, and how many values it has."""
    filter = tl.program_id(0)
    entry = table_ptr + tl.load(owners_ptr + filter) * COLUMNS
    size = tl.load(entry + 2)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return entry, filter - tl.load(entry + 4), size


@triton.jit
def standardize_all(
    owners_ptr,  # (U,): the row of the table that tells of a filter
    table_ptr,  # (T, 7): addresses of weight and gain, values, divisor, first filter here and of all, where out begins
    eps_ptr,  # (T,)
    out_ptr,
    stats_ptr,  # (3, all filters): mean, scale, pull
    filters,  # all
    WEIGHT: tl.constexpr,  # dtypes
    GAIN: tl.constexpr,  # None where there are no gains
    WEIGHT_BYTES: tl.constexpr,
    GAIN_BYTES: tl.constexpr,
    PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether filters begin at 16 bytes
    BLOCK: tl.constexpr,
):
    entry, row, size = _filter_of(owners_ptr, table_ptr, 7, ALIGNED)
    w_ptr = _at(tl.load(entry) + row * size * WEIGHT_BYTES, WEIGHT, ALIGNED)
    gain = 1.0
    if GAIN is not None:
        gain = tl.load(_at(tl.load(entry + 1) + row * GAIN_BYTES, GAIN, False)).to(tl.float32)
    start = tl.load(entry + 6)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    divisor = tl.load(entry + 3).to(tl.float32)
    eps = tl.load(eps_ptr + tl.load(owners_ptr + tl.program_id(0)))
    to_ptr = out_ptr + (start + row * size)
    mean, scale, pull = _standardize_row(w_ptr, to_ptr, gain, size, divisor, eps, PLACE, BLOCK)
    at = stats_ptr + tl.load(entry + 5) + row
    tl.store(at, mean)
    tl.store(at + filters, scale)
    tl.store(at + 2 * filters, pull)


@triton.jit
def pull_all(
    owners_ptr,  # (U,)
    table_ptr,  # (T, 8): as of `standardize_all`, and the address of the gradient of what it gave
    stats_ptr,  # (3, all filters)
    g_w_ptr,  # laid out as what was given
    g_gain_ptr,  # (all filters,)
    filters,  # all
    WEIGHT: tl.constexpr,  # dtypes
    GAIN: tl.constexpr,
    WEIGHT_BYTES: tl.constexpr,
    GAIN_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry, row, size = _filter_of(owners_ptr, table_ptr, 8, ALIGNED)
    w_ptr = _at(tl.load(entry) + row * size * WEIGHT_BYTES, WEIGHT, ALIGNED)
    g_ptr = _at(tl.load(entry + 7) + row * size * WEIGHT_BYTES, WEIGHT, ALIGNED)
    gain = 1.0
    if GAIN is not None:
        gain = tl.load(_at(tl.load(entry + 1) + row * GAIN_BYTES, GAIN, False)).to(tl.float32)
    start = tl.load(entry + 6)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    at = tl.load(entry + 5) + row
    g_gain = _pull_row(g_ptr, w_ptr, g_w_ptr + (start + row * size), gain, stats_ptr + at, filters, size, BLOCK)
    if GAIN is not None:
        tl.store(g_gain_ptr + at, g_gain)
