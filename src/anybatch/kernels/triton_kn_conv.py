"""KNConv's stages as Triton kernels, on CUDA: four launches beside the convolution forward and four backward.

What a program reads at once is chosen by the number of channels, the memory format and the positions of one sample,
never by the batch; only the number of rows whose parameter gradients one program adds up depends on it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.kernels.fused_kn_conv import kn_conv_in_stages
from anybatch.kernels.fused_kn_conv import refusal as refused_by_formulas
from anybatch.kernels.kn_stages import Filters, Normalized, Pixels, Pulled, Stages, rounds
from anybatch.kernels.triton_common import refused_device
from anybatch.methods.kernel_norm import dropout_threshold
from anybatch.methods.kn_conv import kn_conv
from anybatch.methods.windows import Windows

_TILE = 4096
"""Values that a program reads at once: 32 for each of its 128 threads, in 16-byte loads."""
_MOST_CHANNELS = 2048
"""Of a program that sees all channels of a position."""
_MOST_TAPS = 128


class _Layout(NamedTuple):
    """Steps in memory from sample to sample, from position to position in row-major order, and between channels."""

    n: int
    position: int
    channel: int


def _layout(t: Tensor) -> _Layout:
    """Of (N, C, *) that `_steps` takes."""
    if (layout := _steps(t)) is None:
        raise ValueError(f"a map of shape {tuple(t.shape)} and strides {t.stride()} is no layout of kernels")
    return layout


def _steps(t: Tensor) -> _Layout | None:
    """None where the positions of (N, C, *) are not one step apart."""
    step = t.stride(-1) if t.dim() > 2 else 1
    expected = step
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size > 1 and stride != expected:
            return None
        expected *= size
    return _Layout(t.stride(0), step, t.stride(1))


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t``, or a copy that lies in memory as ``like`` does."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _refusal(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> str | None:
    if (reason := refused_device(x)) or (reason := refused_by_formulas(x, weight, bias, *args, **options)):
        return reason
    if x.dtype == torch.float64:
        return "x is float64, which its statistics are not taken in"
    if not 3 <= x.dim() <= 5 or x.dim() != weight.dim() or x.numel() == 0:
        return f"x of shape {tuple(x.shape)} is no map of one to three dimensions with values"
    if _steps(x) is None:
        return "x is neither contiguous nor channels last"
    if x[0].numel() >= 2**31:
        return f"a sample of x has {x[0].numel()} values, 2^31 or more"
    if weight[0, 0].numel() > _MOST_TAPS:
        return f"a window has {weight[0, 0].numel()} positions, more than {_MOST_TAPS}"
    return None


class _Blocks(NamedTuple):
    """What a program reads at once: so many positions of so many channels."""

    positions: int
    channels: int
    warps: int = 4


def _blocks(channels: int, positions: int, layout: _Layout, tile: int = _TILE) -> _Blocks:
    if layout.channel == 1 or positions == 1:
        columns = min(_power_of_two(max(channels, 16)), _MOST_CHANNELS)
        rows = max(1, tile // columns)
    else:
        rows, columns = 128, tile // 128
    return _Blocks(min(rows, _power_of_two(positions)), columns)


def _power_of_two(n: int) -> int:
    """The first from ``n`` on."""
    return 1 << max(n - 1, 0).bit_length()


def _geometry(at: Windows, positions: torch.Size, windows: torch.Size) -> dict[str, int]:
    """Names of the kernels' arguments and their values, for three dimensions."""
    missing = 3 - len(at.kernel)
    named = {
        "": ("DHW", (1,) * missing + tuple(positions)),
        "O": ("DHW", (1,) * missing + tuple(windows)),
        "K": ("DHW", (1,) * missing + at.kernel),
        "S": ("DHW", (1,) * missing + at.stride),
        "P": ("DHW", (0,) * missing + tuple(before for before, _ in at.pads)),
        "L": ("DHW", (1,) * missing + at.dilation),
    }
    return {
        first + letter: n for first, (letters, sizes) in named.items() for letter, n in zip(letters, sizes, strict=True)
    }


def _as_rows(weight: Tensor) -> Tensor:
    """``weight``, or a copy, whose filters are rows in memory one after another."""
    size = weight[0].numel()
    dense = weight.is_contiguous() or (weight.dim() in (4, 5) and weight.movedim(1, -1).is_contiguous())
    return weight if dense and weight.stride(0) == size else weight.contiguous()


class TritonStages(Stages):
    keeps_filters = True  # as autocast keeps its rounded weights

    def pixels(self, x: Tensor, p: float, seed: Tensor | None) -> Pixels:
        layout = _layout(x)
        positions = math.prod(x.shape[2:])
        found = x.new_empty((2 if seed is None else 3, x.shape[0], 1, *x.shape[2:]), dtype=torch.float32)
        mean, var, own = (*found, None) if seed is None else found
        blocks = _blocks(x.shape[1], positions, layout)
        grid = (x.shape[0] * -(-positions // blocks.positions),)
        _kernels().pixel_moments[grid](
            x, mean, var, own, seed, dropout_threshold(p), positions, x.shape[1], *layout,
            DROPS=seed is not None, BLOCK_P=blocks.positions, BLOCK_C=blocks.channels, num_warps=blocks.warps,
        )  # fmt: skip
        return Pixels(mean, var, own)

    def filters(self, weight: Tensor, dtype: torch.dtype) -> Filters:
        weight = _as_rows(weight)
        centered = torch.empty_like(weight, dtype=dtype)
        total, rest = weight.new_empty((2, len(weight)), dtype=torch.float32)
        size = weight[0].numel()
        block = min(_power_of_two(size), 2048)
        _kernels().center_filters[(len(weight),)](weight, centered, total, rest, size, BLOCK=block)
        return Filters(centered, total, rest if rounds(dtype) else None)

    def normalized(
        self,
        z: Tensor,
        pixels: Pixels,
        filters: Filters,
        bias: Tensor | None,
        residual: Tensor | None,
        at: Windows,
        p: float,
        eps: float,
        relu: bool,
    ) -> Normalized:
        drops = pixels.own is not None
        z = z if _steps(z) else z.contiguous()
        layout = _layout(z)
        windows, count = math.prod(z.shape[2:]), z.shape[1]
        found = z.new_empty((3 if drops else 2, z.shape[0], 1, *z.shape[2:]), dtype=torch.float32)
        mean, scale, apart = found if drops else (*found, None)
        alone = residual is not None and rounds(z.dtype)
        y = torch.empty_like(z) if alone else z
        blocks = _blocks(count, windows, layout)
        grid = (z.shape[0] * -(-windows // blocks.positions), -(-count // blocks.channels))
        geometry = _geometry(at, pixels.mean.shape[2:], z.shape[2:])
        del geometry["OD"]
        _kernels().normalized[grid](
            z, y, None if residual is None else _laid_out(residual, z), pixels.mean, pixels.var, pixels.own,
            filters.total, filters.rest, bias, mean, scale, apart, windows, count, *layout, **geometry,
            kept_rate=1 - p, eps=eps, DROPS=drops, RESTS=filters.rest is not None, BIASED=bias is not None,
            RESIDUAL=residual is not None, ALONE=alone, RELU=relu, TAPS=_power_of_two(at.positions),
            BLOCK_W=blocks.positions, BLOCK_O=blocks.channels, num_warps=blocks.warps,
        )  # fmt: skip
        return Normalized(y, mean, scale, apart, z if alone else None)

    def pulled(
        self,
        gradient: Tensor,
        done: Normalized,
        total: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        at: Windows,
        relu: bool,
    ) -> Pulled:
        y, drops = done.y, done.apart is not None
        layout = _layout(y)
        samples, count, windows = y.shape[0], y.shape[1], math.prod(y.shape[2:])
        blocks = _blocks(count, windows, layout, _TILE // 2)  # of several tensors
        sees_all = blocks.channels >= count
        rows = blocks.positions
        while sees_all and rows < windows and samples * windows > 1024 * rows:
            rows *= 2  # fewer sums to add up where there are programs enough for every processor
        programs = samples * -(-windows // rows)
        h = torch.empty_like(y)
        masked = torch.empty_like(y) if relu and residual is not None else None
        g_var = torch.empty_like(done.scale)
        g_own = torch.empty_like(done.scale) if drops else None
        partial = y.new_empty((programs, 2, count), dtype=torch.float32)
        taken = None if residual is None or done.own is not None else _laid_out(residual, y)
        _kernels().pulled[(programs,)](
            gradient, y, y if done.own is None else done.own, taken, bias, total, done.scale, done.apart, h, masked,
            g_var, g_own, partial, windows, count, *layout, DROPS=drops, BIASED=bias is not None,
            SUBTRACTS=taken is not None, RELU=relu, MASKED=masked is not None, ALL=sees_all, ROWS=rows,
            BLOCK_W=blocks.positions, BLOCK_O=blocks.channels, num_warps=blocks.warps,
        )  # fmt: skip
        g_bias, g_total = partial.sum(0)
        return Pulled(gradient if masked is None else masked, h, g_var, g_own, g_bias, g_total if drops else None)

    def through_filters(self, g_centered: Tensor, g_total: Tensor | None, dtype: torch.dtype) -> Tensor:
        g = _as_rows(g_centered)
        g_weight = torch.empty_like(g, dtype=dtype)
        size = g[0].numel()
        block = min(_power_of_two(size), 2048)
        _kernels().through_filters[(len(g),)](g, g_weight, g_total, size, DROPS=g_total is not None, BLOCK=block)
        return g_weight

    def through_moments(
        self, g_x: Tensor, x: Tensor, done: Normalized, back: Pulled, at: Windows, p: float, seed: Tensor | None
    ) -> Tensor:
        g_x = g_x if _steps(g_x) else torch.empty_like(x).copy_(g_x)
        layout = _layout(g_x)
        positions = math.prod(x.shape[2:])
        blocks = _blocks(x.shape[1], positions, layout)
        grid = (x.shape[0] * -(-positions // blocks.positions), -(-x.shape[1] // blocks.channels))
        geometry = _geometry(at, x.shape[2:], done.mean.shape[2:])
        del geometry["D"]
        _kernels().through_moments[grid](
            g_x, x, done.mean, back.var, back.own, seed, dropout_threshold(p), positions, x.shape[1], *layout,
            **dict(zip(("stride_xn", "stride_xp", "stride_xc"), _layout(x), strict=True)), **geometry,
            kept_rate=1 - p, DROPS=seed is not None, TAPS=_power_of_two(at.positions),
            BLOCK_P=blocks.positions, BLOCK_C=blocks.channels, num_warps=blocks.warps,
        )  # fmt: skip
        return g_x


def _kernels() -> Any:
    from anybatch.kernels import triton_kn_kernels  # here, since Triton takes a while to import

    return triton_kn_kernels


@kn_conv.kernel("triton", refusal=_refusal, first=True)
def triton_kn_conv(*args: Any, **options: Any) -> Tensor:
    return kn_conv_in_stages(TritonStages(), *args, **options)
