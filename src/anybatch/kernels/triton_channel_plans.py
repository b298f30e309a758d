"""How the Triton kernels of norms by channel moments are launched: what a program reads, and with which numbers.

How many positions a program reads follows from the shape of one sample and the memory format, never from the batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from anybatch.kernels.layouts import Layout, layout_of
from anybatch.kernels.triton_common import Dtypes, Plan, pieces, planned, power_of_two

_TILE = 2048
"""Values that a program reads at once: 16 for each of its 128 threads."""
_WHOLE = 8192
"""Values of groups up to which one program holds them whole, and as many gradients: 16 each for each of 512 threads."""


class Norm(NamedTuple):
    """What is computed, but for tensors."""

    groups: int  # 0 for filter response normalization
    eps: float
    activation: str


class _Tiles(NamedTuple):
    """How the positions and channels of a sample are split among programs."""

    positions: int
    channels: int
    rows: int
    columns: int
    chunk: int

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.columns)

    @property
    def chunks(self) -> int:
        return -(-self.positions // self.chunk)

    def programs(self, chunk: int) -> int:
        return -(-self.positions // chunk) * self.blocks


def _tiles(shape: torch.Size, layout: Layout) -> _Tiles:
    channels, positions = shape[1], math.prod(shape[2:])
    if layout.channel == 1 or positions == 1:
        columns = min(power_of_two(channels), max(64, _TILE // power_of_two(positions)))
        rows = min(power_of_two(positions), max(1, _TILE // columns))
    else:
        rows = min(power_of_two(positions), 1024)
        columns = min(power_of_two(channels), _TILE // rows)
    # 64 programs a sample or more, each of 64 tiles or less, so that single images fill a GPU and few sums are left.
    tiles, blocks = -(-positions // rows), -(-channels // columns)
    chunks = min(tiles, max(64 // blocks, -(-tiles // 64), 1))
    return _Tiles(positions, channels, rows, columns, -(-tiles // chunks) * rows)


def _joining(size: int, chunks: int) -> tuple[int, int]:
    """Chunks and channels that a program reads at once which joins the chunks of so many channels."""
    block = power_of_two(size)
    return min(power_of_two(chunks), max(1, _TILE // block)), block


class Forward(NamedTuple):
    moments: Plan
    numbers: Plan
    applied: Plan
    chunks: int
    rows: int  # of the table of numbers


@planned
def forward(
    norm: Norm, shape: torch.Size, strides: tuple[int, ...], strides_of_y: tuple[int, ...], shared: int, _: Dtypes
) -> Forward:
    kernels, layout, (n, channels) = _kernels(), layout_of(shape, strides), shape[:2]
    tiles, row = _tiles(shape, layout), shape[0] * shape[1]
    joined = (tiles.positions, channels, tiles.chunk, tiles.chunks)
    sizes = (tiles.rows, tiles.columns)
    moments = Plan(kernels.moments, (n * tiles.programs(tiles.chunk),), (*joined, *layout, *sizes))
    if norm.groups:
        size = channels // norm.groups
        given = (*joined, norm.groups, shared, row, norm.eps, *_joining(size, tiles.chunks))
        numbers = Plan(_group_kernels().group_numbers, (n * norm.groups,), given, warps=4 if size <= 1024 else 8)
    else:
        block = min(power_of_two(channels), 32)
        given = (*joined, shared, row, norm.eps, *_joining(block, tiles.chunks))
        numbers = Plan(kernels.response_numbers, (n * -(-channels // block),), given)
    given = (tiles.positions, channels, row, *layout, *layout_of(shape, strides_of_y), norm.activation, *sizes)
    applied = Plan(kernels.applied, (n * tiles.programs(tiles.rows),), given)
    return Forward(moments, numbers, applied, tiles.chunks, 6 if norm.groups else 4)


class Backward(NamedTuple):
    sums: Plan
    coefficients: Plan
    combined: Plan
    chunks: int


@planned
def backward(
    norm: Norm,
    shape: torch.Size,
    strides: tuple[int, ...],
    strides_of_g: tuple[int, ...],
    strides_of_g_x: tuple[int, ...],
    shared: int,
    rows: int,
    _: Dtypes,
) -> Backward:
    kernels, layout, (n, channels) = _kernels(), layout_of(shape, strides), shape[:2]
    tiles, row, of_g = _tiles(shape, layout), shape[0] * shape[1], layout_of(shape, strides_of_g)
    sizes = (tiles.rows, tiles.columns)
    given = (tiles.positions, channels, tiles.chunk, tiles.chunks, row, *of_g, *layout, norm.activation, *sizes)
    sums = Plan(kernels.gradient_sums, (n * tiles.programs(tiles.chunk),), given)
    joined = (tiles.positions, channels, tiles.chunks)
    if norm.groups:
        size = channels // norm.groups
        given = (*joined, norm.groups, shared, row, norm.eps, shared > 1, *_joining(size, tiles.chunks))
        coefficients = Plan(
            _group_kernels().group_coefficients, (n * norm.groups,), given, warps=4 if size <= 1024 else 8
        )
    else:
        block = min(power_of_two(channels), 32)
        given = (*joined, shared, row, *_joining(block, tiles.chunks))
        coefficients = Plan(kernels.response_coefficients, (n * -(-channels // block),), given)
    adders = -(-rows * channels // 64)
    given = (
        *(n, rows * channels, adders, tiles.positions, channels, row),
        *of_g, *layout, *layout_of(shape, strides_of_g_x), norm.activation, 16, 64, *sizes,
    )  # fmt: skip
    combined = Plan(kernels.combined, (adders + n * tiles.programs(tiles.rows),), given)
    return Backward(sums, coefficients, combined, tiles.chunks)


class BatchMoments(NamedTuple):
    moments: Plan
    joined: Plan
    chunks: int


@planned
def batch_moments(shape: torch.Size, strides: tuple[int, ...], _: torch.dtype) -> BatchMoments:
    """Of each channel over all samples."""
    kernels, layout, (n, channels) = _kernels(), layout_of(shape, strides), shape[:2]
    tiles = _tiles(shape, layout)
    joined = (tiles.positions, channels, tiles.chunk, tiles.chunks)
    moments = Plan(kernels.moments, (n * tiles.programs(tiles.chunk),), (*joined, *layout, tiles.rows, tiles.columns))
    numbers = (*joined, n * tiles.chunks, float(n * tiles.positions), 64, 16)
    return BatchMoments(moments, Plan(kernels.joined_samples, (-(-channels // 16),), numbers), tiles.chunks)


def _whole_tiles(norm: Norm, shape: torch.Size, layout: Layout, itemsize: int) -> tuple[int, int] | None:
    """Positions and channels of a program that holds groups whole; None where none can, or groups are no power of 2."""
    channels, positions = shape[1], power_of_two(math.prod(shape[2:]))
    size = channels // norm.groups if norm.groups else 0
    if size != power_of_two(size):
        return None
    # With channels last a few groups side by side, so that what is read at once fills sectors of memory.
    columns = max(size, min(32 // itemsize, power_of_two(channels))) if layout.channel == 1 else size
    return (positions, columns) if positions * columns <= _WHOLE else None


def _warps(values: int, layout: Layout) -> int:
    # With positions side by side, which no 16 bytes may hold, addresses take registers too, of which 8 warps have more.
    return min(max(values // 512, 4), 16 if layout.channel == 1 else 8)


@planned
def whole_forward(
    norm: Norm, shape: torch.Size, strides: tuple[int, ...], strides_of_y: tuple[int, ...], shared: int, dtypes: Dtypes
) -> Plan | None:
    """The whole norm in one launch, where a program holds groups whole."""
    layout, (n, channels) = layout_of(shape, strides), shape[:2]
    if dtypes[0] is None or (tiles := _whole_tiles(norm, shape, layout, dtypes[0].itemsize)) is None:
        return None
    numbers = (
        math.prod(shape[2:]), channels, shared, *layout, *layout_of(shape, strides_of_y), norm.eps,
        norm.activation, channels // norm.groups, *tiles,
    )  # fmt: skip
    return Plan(
        _group_kernels().whole_groups, (n * -(-channels // tiles[1]),), numbers, _warps(math.prod(tiles), layout)
    )


class WholeBackward(NamedTuple):
    plan: Plan
    adding_up: Plan


@planned
def whole_backward(
    norm: Norm,
    shape: torch.Size,
    strides: tuple[int, ...],
    strides_of_g: tuple[int, ...],
    strides_of_g_x: tuple[int, ...],
    shared: int,
    rows: int,
    dtypes: Dtypes,
) -> WholeBackward | None:
    """Likewise of the gradients, and the sums of the parameters' over samples."""
    layout, (n, channels) = layout_of(shape, strides), shape[:2]
    if dtypes[0] is None or (tiles := _whole_tiles(norm, shape, layout, dtypes[0].itemsize)) is None:
        return None
    numbers = (
        math.prod(shape[2:]), channels, shared, *layout_of(shape, strides_of_g), *layout,
        *layout_of(shape, strides_of_g_x), norm.eps, norm.activation, shared > 1, channels // norm.groups, *tiles,
    )  # fmt: skip
    grid = (n * -(-channels // tiles[1]),)
    plan = Plan(_group_kernels().through_whole_groups, grid, numbers, _warps(math.prod(tiles), layout))
    adding_up = Plan(pieces().added_up, (-(-rows * channels // 64),), (n, rows * channels, 16, 64))
    return WholeBackward(plan, adding_up)


def _kernels() -> Any:
    from anybatch.kernels import triton_channel_kernels  # here, since Triton takes a while to import

    return triton_channel_kernels


def _group_kernels() -> Any:
    from anybatch.kernels import triton_group_kernels

    return triton_group_kernels
