"""What Triton kernels of several ops share. Imported when one is launched, since Triton takes a while to import."""

# Triton is typed for what is called on the host, and settles branches as it compiles:
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
import triton
import triton.language as tl

from anybatch.kernels.triton_common import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x``, float32, to the nearest of a dtype; the interpreter by itself would cut bfloat16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def added_up(
    partial_ptr,  # (R, S)
    sums_ptr,  # (S,)
    rows,  # R
    size,  # S
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    sums = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (s < size)[None, :]
        sums += tl.load(partial_ptr + row.to(tl.int64)[:, None] * size + s[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + s, tl.sum(sums, axis=0), mask=s < size)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """One of `anybatch.methods.common.ACTIVATIONS` of ``z``, float32; NaN stays."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        return z


@triton.jit
def through_activation(g, z, ACTIVATION: tl.constexpr):
    """The gradient of the activation's input ``z``, for ``g`` of its output."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, g)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return g * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return g * (below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
    else:
        return g
