"""Local context normalization as Triton kernels, on CUDA: a launch for each dimension of windows, and some more.

Forward takes each position's moments over its channels, then those over windows along one dimension after another; the
last of these launches normalizes too. Backward makes the moments anew, since ``x`` and the parameters alone are kept,
and then sums over the windows that hold each position what these give. For images it is three launches forward, and six
backward with the parameters' sums. The cost does not depend on the window.

How work is split follows from the shape of one sample and the memory format, never from the batch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.kernels.activations import refused_activation
from anybatch.kernels.layouts import Layout, layout_of
from anybatch.kernels.local_windows import refused_windows
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas
from anybatch.kernels.triton_common import (
    Dtypes,
    Plan,
    dtypes_of,
    on_its_device,
    pieces,
    planned,
    power_of_two,
    readable,
    refused_activations,
    refused_device,
    refused_parameters,
)
from anybatch.kernels.triton_tuning import Launch, Tuned, class_of
from anybatch.methods.group_norm import group_norm
from anybatch.methods.local_context_norm import Window, local_context_norm, windows_within

_TILE = 1024
"""Values that a program reads at once: 8 for each of its 128 threads, beside the sums of its groups."""
_LANES = 128
"""Sums that a program moves along a dimension."""
_CHUNK = 16
"""Positions along a dimension, or more where windows are large, behind which sums begin anew."""
_MOST_CHANNELS = 4096
"""Of a group, which a program sees whole."""


class _Options(NamedTuple):
    windows: tuple[int, ...]  # at most as large as the map
    each: int  # channels of a group
    eps: float
    activation: str


class _Tiles(NamedTuple):
    """How positions behind the first dimension, and groups, are split among programs, whose sums move along it."""

    size: int
    window: int
    inner: int
    groups: int
    each: int
    rows: int
    columns: int

    @property
    def chunk(self) -> int:
        return _chunk(self.size, self.window)

    @property
    def parts(self) -> int:
        """Programs of a sample for each block of groups."""
        return -(-self.size // self.chunk) * -(-self.inner // self.rows)

    @property
    def blocks(self) -> int:
        return -(-self.groups // self.columns)

    @property
    def constants(self) -> tuple[int, ...]:
        return self.each, power_of_two(self.each), self.rows, self.columns

    @property
    def warps(self) -> int:
        return min(max(4, self.rows * self.columns * power_of_two(self.each) // 256), 16)


def _chunk(size: int, window: int) -> int:
    # At least half a window, so that beginning sums anew costs no more than moving them on; a grid has 65535 at most.
    return max(_CHUNK, -(-window // 2), -(-size // 32768))


def _tiles(options: _Options, shape: torch.Size, layout: Layout, tile: int = _TILE) -> _Tiles:
    sizes, windows = shape[2:], options.windows
    # Lanes lie side by side in memory where sums move along the first of several dimensions; else they stay in place.
    size, window = (sizes[0], windows[0]) if len(sizes) > 1 else (1, 1)
    inner, groups = math.prod(sizes) // size, shape[1] // options.each
    channels = power_of_two(options.each)
    if layout.channel == 1 or inner == 1:
        columns = min(power_of_two(groups), max(1, 64 // channels))
        rows = min(power_of_two(inner), max(1, tile // (columns * channels)))
    else:
        rows = min(power_of_two(inner), 32, max(1, tile // channels))
        columns = min(power_of_two(groups), max(1, tile // (rows * channels)))
    return _Tiles(size, window, inner, groups, options.each, rows, columns)


def _boxed(options: _Options, shape: torch.Size, moments: bool) -> tuple[Plan, ...]:
    """Along each dimension but the first of several; none where windows have one position."""
    plans, sizes = [], shape[2:]
    for dim in reversed(range(1 if len(sizes) > 1 else 0, len(sizes))):
        size, window = sizes[dim], options.windows[dim]
        if window == 1:
            continue
        inner = math.prod(sizes[dim + 1 :]) * (shape[1] // options.each)
        lanes = shape[0] * math.prod(sizes[:dim]) * inner
        chunk = _chunk(size, window)
        grid = (-(-lanes // _LANES), -(-size // chunk))
        plans.append(Plan(_kernels().boxed, grid, (size, inner, lanes, window, chunk, moments, _LANES), warps=1))
    return tuple(plans)


class _Moments(NamedTuple):
    """Those over all dimensions of windows but the first of several."""

    pixels: Launch
    boxed: tuple[Plan, ...]

    def __call__(self, x: Tensor, fields: list[Tensor]) -> None:
        """Into the first of two fields, which change places as they are made."""
        self.pixels(x, fields[0])
        _along(self.boxed, fields)


def _along(plans: tuple[Plan, ...], fields: list[Tensor]) -> None:
    for plan in plans:
        plan(*fields)
        fields.reverse()


def _tuned(kernel: Any, tiles: _Tiles, n: int, numbers: tuple[Any, ...], about: tuple[Any, ...], **more: Any) -> Tuned:
    """A launch over tiles of ``n`` samples, with as many warps as are fastest."""
    grid = (n * tiles.parts * tiles.blocks,)
    about = (tiles.each, tiles.window, *about)
    return Tuned(lambda way: Plan(kernel, grid, numbers, way.of_warps(tiles.warps)), about, **more)


def _taking_moments(options: _Options, shape: torch.Size, layout: Layout, dtype: torch.dtype | None) -> _Moments:
    n, positions = shape[0], math.prod(shape[2:])
    tiles = _tiles(options, shape, layout)
    # Of positions wherever they are: a dimension of one position in front of them.
    tiles = tiles._replace(size=1, window=1, inner=positions)
    numbers = (positions, tiles.groups, n * positions * tiles.groups, *layout, *tiles.constants)
    pixels = _tuned(_kernels().pixel_moments, tiles, n, numbers, (class_of(shape, layout), dtype))
    return _Moments(pixels, _boxed(options, shape, True))


class _Forward(NamedTuple):
    moments: _Moments
    normalized: Launch


@planned
def _forward(
    options: _Options, shape: torch.Size, strides: tuple[int, ...], strides_of_y: tuple[int, ...], dtypes: Dtypes
) -> _Forward:
    layout, of_y = layout_of(shape, strides), layout_of(shape, strides_of_y)
    tiles = _tiles(options, shape, layout)
    numbers = (*_sizes(tiles, shape), *layout, *of_y, options.eps, options.activation, *tiles.constants)
    about = (class_of(shape, layout, of_y), options.activation, dtypes)
    normalized = _tuned(_kernels().normalized, tiles, shape[0], numbers, about)
    return _Forward(_taking_moments(options, shape, layout, dtypes[0]), normalized)


def _sizes(tiles: _Tiles, shape: torch.Size) -> tuple[int, ...]:
    row = shape[0] * tiles.size * tiles.inner * tiles.groups
    return tiles.size, tiles.inner, tiles.groups, row, tiles.window, tiles.chunk


class _Backward(NamedTuple):
    moments: _Moments
    pulled: Launch
    adding_up: Plan
    programs: int
    boxed: tuple[Plan, ...]
    combined: Launch


@planned
def _backward(
    options: _Options,
    shape: torch.Size,
    strides: tuple[int, ...],
    strides_of_g: tuple[int, ...],
    strides_of_g_x: tuple[int, ...],
    dtypes: Dtypes,
) -> _Backward:
    kernels, layout = _kernels(), layout_of(shape, strides)
    of_g, of_g_x = layout_of(shape, strides_of_g), layout_of(shape, strides_of_g_x)
    tiles, channels = _tiles(options, shape, layout, _TILE // 2), shape[1]  # of several tensors
    programs, values = shape[0] * tiles.parts, options.each * math.prod(options.windows)
    numbers = (
        *_sizes(tiles, shape), values, *of_g, *layout, *of_g_x, options.eps, options.activation, *tiles.constants,
    )  # fmt: skip
    about = (class_of(shape, of_g, layout, of_g_x), options.activation, dtypes)
    pulled = _tuned(kernels.pulled, tiles, shape[0], numbers, about)
    adding_up = Plan(pieces().added_up, (-(-2 * channels // 16),), (programs, 2 * channels, 64, 16))
    through = options.activation != "none"  # then g_x holds it
    numbers = (*_sizes(tiles, shape), *(of_g_x if through else of_g), *layout, *of_g_x, *tiles.constants)
    combined = _tuned(kernels.combined, tiles, shape[0], numbers, about, overwritten=(0,) if through else ())
    moments = _taking_moments(options, shape, layout, dtypes[0])
    return _Backward(moments, pulled, adding_up, programs, _boxed(options, shape, False), combined)


def _fields(x: Tensor, each: int) -> list[Tensor]:
    """Two fields, one of which is read as the other is made."""
    size = (2, x.numel() // each)
    return [x.new_empty(size, dtype=torch.float32) for _ in range(2)]


class _LocalContextNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, options: _Options, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        plans = _forward(options, x.shape, x.stride(), y.stride(), dtypes_of(x, weight, bias))
        fields = _fields(x, options.each)
        plans.moments(x, fields)
        plans.normalized(x, y, weight, bias, fields[0])
        ctx.options = options
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        options: _Options = ctx.options
        if taken_in_formulas(gradient):  # for second derivatives
            reference = partial(local_context_norm.reference, eps=options.eps, activation=options.activation)
            given = (x, options.windows, options.each, weight, bias)
            g_x, _, _, g_weight, g_bias = recomputed_gradients(reference, given, gradient)
            return None, g_x, g_weight, g_bias
        g_x = torch.empty_like(x)
        g = readable(gradient, g_x)
        plans = _backward(options, x.shape, x.stride(), g.stride(), g_x.stride(), dtypes_of(x, g, weight, bias))
        fields = _fields(x, options.each)
        rstd = torch.empty_like(fields[0][0])
        partial_sums = x.new_empty((plans.programs, 2, x.shape[1]), dtype=torch.float32)
        plans.moments(x, fields)
        through = g if options.activation == "none" else g_x
        plans.pulled(g, x, weight, bias, *fields, rstd, through, partial_sums)
        fields.reverse()
        _along(plans.boxed, fields)
        plans.combined(through, x, weight, fields[0], rstd, g_x)
        if weight is None and bias is None:
            return None, g_x, None, None
        sums = torch.empty_like(partial_sums[0])
        plans.adding_up(partial_sums, sums)
        return None, g_x, *(None if p is None else s.to(p.dtype) for s, p in zip(sums, (weight, bias), strict=True))


def _refusal(
    x: Tensor,
    window: Window,
    channels_per_group: int = 2,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    released: bool = False,
    activation: str = "none",
) -> str | None:
    if reason := refused_device(x) or refused_activation(activation):
        return reason
    if reason := refused_windows(x, window, channels_per_group, released):
        return reason
    if channels_per_group > _MOST_CHANNELS:
        return f"a group has {channels_per_group} channels, more than {_MOST_CHANNELS}"
    if any(p is not None and p.shape != x.shape[1:2] for p in (weight, bias)):
        return "weight or bias is not one number a channel of x"
    if reason := refused_activations(x) or refused_parameters(x, weight, bias):
        return reason
    return f"a sample of x has {x[0].numel()} values, 2^31 or more" if x[0].numel() >= 2**31 else None


@local_context_norm.kernel("triton", refusal=_refusal, first=True)
@on_its_device
def triton_local_context_norm(
    x: Tensor,
    window: Window,
    channels_per_group: int = 2,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    released: bool = False,
    activation: str = "none",
) -> Tensor:
    windows = windows_within(window, x.shape[2:])
    if windows == tuple(x.shape[2:]):
        return group_norm(x, x.shape[1] // channels_per_group, weight, bias, eps=eps, activation=activation)
    options = _Options(windows, channels_per_group, eps, activation)
    return _LocalContextNorm.apply(options, x, weight, bias)  # pyright: ignore[reportReturnType]


def _kernels() -> Any:
    from anybatch.kernels import triton_local_context_kernels  # here, since Triton takes a while to import

    return triton_local_context_kernels
