"""KNConv's stages as Triton kernels, on CUDA: three launches beside the convolution forward and four backward.

In groups of channels it is one more each way, and what rounds filters for autocast.

What a program reads at once is chosen by the number of channels, the memory format and the positions of one sample,
never by the batch; only the number of rows whose parameter gradients one program adds up depends on it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.kernels.fused_kn_conv import STAGES, kn_conv_in_stages
from anybatch.kernels.fused_kn_conv import refusal as refused_by_formulas
from anybatch.kernels.kn_stages import Filters, Normalized, Pixels, Pulled, Stages, rounds
from anybatch.kernels.layouts import Layout, filters_as_rows, laid_out, layout_of, places, steps, three
from anybatch.kernels.triton_common import (
    Dtypes,
    Plan,
    dtypes_of,
    on_its_device,
    pieces,
    planned,
    power_of_two,
    refused_device,
    refused_layout,
)
from anybatch.kernels.triton_tuning import Launch, Tuned, Way, class_of
from anybatch.methods.kernel_norm import dropout_threshold
from anybatch.methods.kn_conv import kn_conv
from anybatch.methods.windows import Windows, channels_are_last

_TILE = 4096
"""Values that a program reads at once: 32 for each of its 128 threads, in 16-byte loads."""
_MOST_CHANNELS = 2048
"""Of a program that sees all channels of a position."""
_MOST_TAPS = 128


def _refusal(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> str | None:
    if (reason := refused_device(x)) or (reason := refused_by_formulas(x, weight, bias, *args, **options)):
        return reason
    if x.dtype == torch.float64:
        return "x is float64, which its statistics are not taken in"
    if not 3 <= x.dim() <= 5 or x.dim() != weight.dim() or x.numel() == 0:
        return f"x of shape {tuple(x.shape)} is no map of one to three dimensions with values"
    return refused_layout(x) or _refused_size(x.shape, weight.shape)


@functools.lru_cache(4096)
def _refused_size(shape: torch.Size, weight: torch.Size) -> str | None:
    values, taps = weight[0] * math.prod(shape[2:]), math.prod(weight[2:])
    if values >= 2**30:  # with room for what padding adds
        return f"a sample of the result may have {values} values, 2^30 or more"
    return f"a window has {taps} positions, more than {_MOST_TAPS}" if taps > _MOST_TAPS else None


class _Blocks(NamedTuple):
    """What a program reads at once: so many positions of so many channels."""

    positions: int
    channels: int


def _blocks(channels: int, positions: int, layout: Layout, tile: int = _TILE) -> _Blocks:
    if layout.channel == 1 or positions == 1:
        columns = min(power_of_two(max(channels, 16)), _MOST_CHANNELS)
        rows = max(1, tile // columns)
    else:
        rows, columns = 128, tile // 128
    return _Blocks(min(rows, power_of_two(positions)), columns)


@planned
def _pixels(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, p: float, drops: bool, own: bool
) -> Launch:
    layout, (n, channels), positions = layout_of(shape, strides), shape[:2], math.prod(shape[2:])
    kernel, numbers = _kernels().pixel_moments, (dropout_threshold(p), positions, channels, *layout, drops, own)

    def plan(way: Way) -> Plan:
        rows, columns = _blocks(channels, positions, layout, way.of_values(_TILE))
        return Plan(kernel, (n * -(-positions // rows),), (*numbers, rows, columns), way.of_warps(4))

    return Tuned(plan, (class_of(shape, layout), dtype, drops, own))


@planned
def _centering(shape: torch.Size, _: Dtypes) -> Plan:
    filters, size = shape[0], math.prod(shape[1:])
    return Plan(_kernels().center_filters, (filters,), (size, min(power_of_two(size), 2048)))


@planned
def _grouping(
    shape: torch.Size, strides: tuple[int, ...], to: torch.Size, to_strides: tuple[int, ...], at: Windows,
    dtype: torch.dtype,
) -> Launch:  # fmt: skip
    layout, of_own, groups, windows = layout_of(shape, strides), layout_of(to, to_strides), to[1], math.prod(to[2:])
    kernel, size = _kernels().group_means, shape[1] // groups
    numbers = (windows, groups, size, *layout, *of_own, *three(shape[2:]), *three(to[2:])[1:], *places(at))

    def plan(way: Way) -> Plan:
        tile, columns = way.of_values(_TILE // 2), 64 if layout.channel == 1 or windows == 1 else 16
        within = min(power_of_two(size), columns)
        beside = min(columns // within, power_of_two(groups))
        rows = min(max(1, tile // (within * beside)), power_of_two(windows))
        grid = (to[0] * -(-windows // rows), -(-groups // beside))
        return Plan(kernel, grid, (*numbers, rows, beside, within), way.of_warps(4))

    return Tuned(plan, (class_of(shape, layout), power_of_two(groups), at.kernel, at.stride, dtype))


_Own = tuple[torch.Size, tuple[int, ...]] | None
"""Shape and strides of means of groups."""


def _of_groups(own: _Own, filters: int) -> tuple[int, ...]:
    """Filters a group, and the layout."""
    return (1, 0, 0, 0) if own is None else (filters // own[0][1], *layout_of(*own))


def _how_it_lies(own: Tensor | None) -> _Own:
    return None if own is None else (own.shape, own.stride())


@planned
def _normalizing(
    shape: torch.Size,
    strides: tuple[int, ...],
    positions: torch.Size,
    at: Windows,
    p: float,
    eps: float,
    drops: bool,
    rests: bool,
    residual: bool,
    alone: bool,
    relu: bool,
    dtypes: Dtypes,
    own: _Own,
) -> Launch:
    layout, (n, filters), windows = layout_of(shape, strides), shape[:2], math.prod(shape[2:])
    kernel, flags = _kernels().normalized, (drops, own is not None, rests, dtypes[1] is not None, residual, alone, relu)
    numbers = (
        windows, filters, *layout, *_of_groups(own, filters), *three(positions), *three(shape[2:])[1:], *places(at),
        1 - p, eps, *flags, power_of_two(at.positions),
    )  # fmt: skip

    def plan(way: Way) -> Plan:
        rows, columns = _blocks(filters, windows, layout, way.of_values(_TILE))
        grid = (n * -(-windows // rows), -(-filters // columns))
        return Plan(kernel, grid, (*numbers, rows, columns), way.of_warps(4))

    return Tuned(plan, (class_of(shape, layout), at.kernel, at.stride, flags, dtypes), overwritten=(0,))


class _Pulling(NamedTuple):
    plan: Launch
    adding_up: Plan
    programs: int


@planned
def _pulling(
    shape: torch.Size,
    strides: tuple[int, ...],
    sums: bool,
    alone: bool,
    subtracts: bool,
    relu: bool,
    masked: bool,
    dtypes: Dtypes,
    own: _Own,
) -> _Pulling:
    layout, (n, filters), windows = layout_of(shape, strides), shape[:2], math.prod(shape[2:])
    rows, columns = _blocks(filters, windows, layout, _TILE // 2)  # of several tensors
    sees_all, together = columns >= filters, rows
    while sees_all and together < windows and n * windows > 512 * together:
        together *= 2  # fewer sums to add up where there are programs enough for every processor
    programs = n * -(-windows // together)
    kernel, flags = _kernels().pulled, (sums, own is not None, dtypes[1] is not None, alone, subtracts, relu, masked)
    numbers = (windows, filters, *layout, *_of_groups(own, filters), *flags, sees_all, together)

    def plan(way: Way) -> Plan:
        at_once = way.of_values(rows) if sees_all else rows
        return Plan(kernel, (programs,), (*numbers, at_once, columns), way.of_warps(4))

    width = filters * (1 + sums)
    adding_up = Plan(pieces().added_up, (-(-width // 16),), (programs, width, 64, 16))
    return _Pulling(Tuned(plan, (class_of(shape, layout), flags, dtypes)), adding_up, programs)


@planned
def _through_filters(shape: torch.Size, sums: bool, _: Dtypes) -> Plan:
    filters, size = shape[0], math.prod(shape[1:])
    return Plan(_kernels().through_filters, (filters,), (size, sums, min(power_of_two(size), 2048)))


@planned
def _through_moments(
    shape: torch.Size,
    strides: tuple[int, ...],
    strides_of_x: tuple[int, ...],
    windows: torch.Size,
    at: Windows,
    p: float,
    drops: bool,
    plain: bool,
    dtype: torch.dtype,
) -> Launch:
    layout, (n, channels), positions = layout_of(shape, strides), shape[:2], math.prod(shape[2:])
    of_x, kernel = layout_of(shape, strides_of_x), _kernels().through_moments
    numbers = (
        dropout_threshold(p), positions, channels, *layout, *of_x, *three(shape[2:])[1:],
        *three(windows), *places(at), 1 - p, drops, plain, power_of_two(at.positions),
    )  # fmt: skip

    def plan(way: Way) -> Plan:
        rows, columns = _blocks(channels, positions, layout, way.of_values(_TILE))
        grid = (n * -(-positions // rows), -(-channels // columns))
        return Plan(kernel, grid, (*numbers, rows, columns), way.of_warps(4))

    return Tuned(plan, (class_of(shape, layout, of_x), at.kernel, at.stride, dtype, drops, plain), overwritten=(0,))


class TritonStages(Stages):
    keeps_filters = True  # as autocast keeps its rounded weights

    def pixels(self, x: Tensor, p: float, seed: Tensor | None, grouped: bool) -> Pixels:
        parts = seed is not None and not grouped
        found = _fields(3 if parts else 2, x)
        mean, var, own = found if parts else (*found, None)
        _pixels(x.shape, x.stride(), x.dtype, p, seed is not None, parts)(x, mean, var, own, seed)
        return Pixels(mean, var, own)

    def filters(self, weight: Tensor, dtype: torch.dtype) -> Filters:
        weight = filters_as_rows(weight)
        centered = torch.empty_like(weight, dtype=dtype)
        total = weight.new_empty(weight.shape[0], dtype=torch.float32)
        rest = torch.empty_like(total)
        _centering(weight.shape, (weight.dtype, dtype))(weight, centered, total, rest)
        return Filters(centered, total, rest if rounds(dtype) else None)

    def group_means(self, x: Tensor, at: Windows, groups: int, like: Tensor) -> Tensor:
        n, places = len(like), like.shape[2:]
        if channels_are_last(like):
            own = x.new_empty((n, *places, groups), dtype=torch.float32).movedim(-1, 1)
        else:
            own = x.new_empty((n, groups, *places), dtype=torch.float32)
        _grouping(x.shape, x.stride(), own.shape, own.stride(), at, x.dtype)(x, own)
        return own

    def normalized(
        self,
        z: Tensor,
        pixels: Pixels,
        filters: Filters,
        own: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        at: Windows,
        p: float,
        eps: float,
        relu: bool,
    ) -> Normalized:
        drops = pixels.own is not None
        z = z if steps(z.shape, z.stride()) else z.contiguous()
        found = _fields(3 if drops else 2, z)
        mean, scale, apart = found if drops else (*found, None)
        alone = residual is not None and rounds(z.dtype)
        y = torch.empty_like(z) if alone else z
        residual = None if residual is None else laid_out(residual, z)
        plan = _normalizing(
            z.shape, z.stride(), pixels.mean.shape[2:], at, p, eps, drops, filters.rest is not None,
            residual is not None, alone, relu, dtypes_of(z, bias), _how_it_lies(own),
        )  # fmt: skip
        plan(
            z, y, residual, pixels.mean, pixels.var, pixels.own if own is None else own, filters.total, filters.rest,
            bias, mean, scale, apart,
        )  # fmt: skip
        return Normalized(y, mean, scale, apart, z if alone else None)

    def pulled(
        self,
        gradient: Tensor,
        done: Normalized,
        total: Tensor,
        own: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        at: Windows,
        relu: bool,
    ) -> Pulled:
        y, apart = done.y, done.apart if own is None else done.mean
        sums = apart is not None
        taken = None if residual is None or done.own is not None else laid_out(residual, y)
        h = torch.empty_like(y)
        masked = torch.empty_like(y) if relu and residual is not None else None
        found = _fields(2 if sums else 1, y)
        g_var, g_own = found if sums else (found[0], None)
        plan, adding_up, programs = _pulling(
            y.shape, y.stride(), sums, done.own is not None, taken is not None, relu, masked is not None,
            dtypes_of(y, bias), _how_it_lies(own),
        )  # fmt: skip
        partial = y.new_empty((programs, 1 + sums, y.shape[1]), dtype=torch.float32)
        whole = partial.new_empty(partial.shape[1:])
        plan(
            gradient, y, done.own, taken, bias, total, done.scale, apart, own, h, masked, g_var, g_own, partial,
        )  # fmt: skip
        adding_up(partial, whole)
        g_bias, g_total = whole.unbind() if sums else (whole[0], None)
        return Pulled(gradient if masked is None else masked, h, g_var, g_own, g_bias, g_total, own is not None)

    def through_filters(self, g_convolved: Tensor, g_total: Tensor | None, dtype: torch.dtype) -> Tensor:
        g = filters_as_rows(g_convolved)
        g_weight = torch.empty_like(g, dtype=dtype)
        _through_filters(g.shape, g_total is not None, (g.dtype, dtype))(g, g_weight, g_total)
        return g_weight

    def through_moments(
        self, g_x: Tensor, x: Tensor, done: Normalized, back: Pulled, at: Windows, p: float, seed: Tensor | None
    ) -> Tensor:
        g_x = g_x if steps(g_x.shape, g_x.stride()) else torch.empty_like(x).copy_(g_x)
        windows, drops = done.mean.shape[2:], seed is not None
        plan = _through_moments(x.shape, g_x.stride(), x.stride(), windows, at, p, drops, back.plain, x.dtype)
        plan(g_x, x, done.mean, back.var, back.own, seed)
        return g_x


def _fields(count: int, like: Tensor) -> tuple[Tensor, ...]:
    """So many maps of one channel for (N, C, *), (N, 1, *) each."""
    first = like.new_empty((like.shape[0], 1, *like.shape[2:]), dtype=torch.float32)
    return first, *[torch.empty_like(first) for _ in range(count - 1)]


def _kernels() -> Any:
    from anybatch.kernels import triton_kn_kernels  # here, since Triton takes a while to import

    return triton_kn_kernels


STAGES["triton"] = TritonStages


@kn_conv.kernel("triton", refusal=_refusal, first=True)
@on_its_device
def triton_kn_conv(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return kn_conv_in_stages(TritonStages(), x, *args, **options)
