"""How the Triton kernels of norms by channel moments are launched: what a program reads, and with which numbers.

How many positions a program reads follows from the shape of one sample and the memory format, never from the batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from anybatch.kernels.layouts import Layout, layout_of
from anybatch.kernels.triton_common import Dtypes, Plan, pieces, planned, power_of_two
from anybatch.kernels.triton_tuning import RULE, Launch, Tuned, Way, class_of

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
    """How the positions and channels of samples are split among programs."""

    samples: int
    positions: int
    channels: int
    chunk: int
    last: bool  # whether channels lie side by side

    @property
    def chunks(self) -> int:
        return -(-self.positions // self.chunk)

    def plan(self, kernel: Any, numbers: tuple[Any, ...], way: Way, length: int | None = None, others: int = 0) -> Plan:
        """Of programs that see so many positions, by default those of a tile, and of some others in front."""
        rows, columns = _tile(self.positions, self.channels, self.last, way)
        programs = -(-self.positions // (length or rows)) * -(-self.channels // columns)
        grid = (others + self.samples * programs,)
        return Plan(kernel, grid, (*numbers, rows, columns), way.of_warps(4))


def _tile(positions: int, channels: int, last: bool, way: Way = RULE) -> tuple[int, int]:
    """Positions and channels that a program reads at once."""
    values = way.of_values(_TILE)
    if last or positions == 1:
        columns = min(power_of_two(channels), max(64, values // power_of_two(positions)))
        return min(power_of_two(positions), max(1, values // columns)), columns
    rows = min(power_of_two(positions), 1024)
    return rows, min(power_of_two(channels), values // rows)


def _tiles(shape: torch.Size, layout: Layout) -> _Tiles:
    channels, positions = shape[1], math.prod(shape[2:])
    rows, columns = _tile(positions, channels, layout.channel == 1)
    # 64 programs a sample or more, each of 64 tiles or less, so that single images fill a GPU and few sums are left.
    tiles, blocks = -(-positions // rows), -(-channels // columns)
    chunks = min(tiles, max(64 // blocks, -(-tiles // 64), 1))
    return _Tiles(shape[0], positions, channels, -(-tiles // chunks) * rows, layout.channel == 1)


def _joining(size: int, chunks: int) -> tuple[int, int]:
    """Chunks and channels that a program reads at once which joins the chunks of so many channels."""
    block = power_of_two(size)
    return min(power_of_two(chunks), max(1, _TILE // block)), block


def _moments(tiles: _Tiles, shape: torch.Size, layout: Layout, dtype: torch.dtype | None) -> Tuned:
    kernel, numbers = _kernels().moments, (tiles.positions, tiles.channels, tiles.chunk, tiles.chunks, *layout)
    return Tuned(lambda way: tiles.plan(kernel, numbers, way, tiles.chunk), (class_of(shape, layout), dtype))


class Forward(NamedTuple):
    moments: Launch
    numbers: Plan
    applied: Launch
    chunks: int
    rows: int  # of the table of numbers


@planned
def forward(
    norm: Norm, shape: torch.Size, strides: tuple[int, ...], strides_of_y: tuple[int, ...], shared: int, dtypes: Dtypes
) -> Forward:
    kernels, layout, (n, channels) = _kernels(), layout_of(shape, strides), shape[:2]
    of_y = layout_of(shape, strides_of_y)
    tiles, row = _tiles(shape, layout), shape[0] * shape[1]
    joined = (tiles.positions, channels, tiles.chunk, tiles.chunks)
    if norm.groups:
        size = channels // norm.groups
        given = (*joined, norm.groups, shared, row, norm.eps, *_joining(size, tiles.chunks))
        numbers = Plan(_group_kernels().group_numbers, (n * norm.groups,), given, warps=4 if size <= 1024 else 8)
    else:
        block = min(power_of_two(channels), 32)
        given = (*joined, shared, row, norm.eps, *_joining(block, tiles.chunks))
        numbers = Plan(kernels.response_numbers, (n * -(-channels // block),), given)
    of_positions = (tiles.positions, channels, row, *layout, *of_y, norm.activation)
    applied = Tuned(
        lambda way: tiles.plan(kernels.applied, of_positions, way),
        (class_of(shape, layout, of_y), norm.activation, dtypes),
    )
    moments = _moments(tiles, shape, layout, dtypes[0])
    return Forward(moments, numbers, applied, tiles.chunks, 6 if norm.groups else 4)


class Backward(NamedTuple):
    sums: Launch
    coefficients: Plan
    combined: Launch
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
    dtypes: Dtypes,
) -> Backward:
    kernels, layout, (n, channels) = _kernels(), layout_of(shape, strides), shape[:2]
    tiles, row, of_g = _tiles(shape, layout), shape[0] * shape[1], layout_of(shape, strides_of_g)
    of_g_x = layout_of(shape, strides_of_g_x)
    of_chunks = (tiles.positions, channels, tiles.chunk, tiles.chunks, row, *of_g, *layout, norm.activation)
    sums = Tuned(
        lambda way: tiles.plan(kernels.gradient_sums, of_chunks, way, tiles.chunk),
        (class_of(shape, of_g, layout), norm.activation, dtypes),
    )
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
    of_positions = (
        *(n, rows * channels, adders, tiles.positions, channels, row), *of_g, *layout, *of_g_x, norm.activation, 16, 64,
    )  # fmt: skip
    combined = Tuned(
        lambda way: tiles.plan(kernels.combined, of_positions, way, others=adders),
        (class_of(shape, of_g, layout, of_g_x), norm.activation, dtypes),
    )
    return Backward(sums, coefficients, combined, tiles.chunks)


class BatchMoments(NamedTuple):
    moments: Launch
    joined: Plan
    chunks: int


@planned
def batch_moments(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> BatchMoments:
    """Of each channel over all samples."""
    return _over_samples(_kernels().joined_samples, (), shape, strides, dtype)


@planned
def letting_in(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rate: float, warm_start: bool
) -> BatchMoments:
    """The same, joined to estimates."""
    return _over_samples(_kernels().let_in, (rate, warm_start), shape, strides, dtype)


def _over_samples(
    kernel: Any, options: tuple[Any, ...], shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
) -> BatchMoments:
    layout, (n, channels) = layout_of(shape, strides), shape[:2]
    tiles = _tiles(shape, layout)
    joined = (tiles.positions, channels, tiles.chunk, tiles.chunks)
    numbers = (*joined, n * tiles.chunks, float(n * tiles.positions), *options, 64, 16)
    joining = Plan(kernel, (-(-channels // 16),), numbers)
    return BatchMoments(_moments(tiles, shape, layout, dtype), joining, tiles.chunks)


def _whole_tiles(norm: Norm, shape: torch.Size, layout: Layout, itemsize: int) -> tuple[int, int] | None:
    """Positions and channels of a program that holds groups whole; None where none can, or groups are no power of 2."""
    channels, positions = shape[1], power_of_two(math.prod(shape[2:]))
    size = channels // norm.groups if norm.groups else 0
    if size != power_of_two(size):
        return None
    # With channels last a few groups side by side, so that what is read at once fills sectors of memory.
    columns = max(size, min(32 // itemsize, power_of_two(channels))) if layout.channel == 1 else size
    return (positions, columns) if positions * columns <= _WHOLE else None


def _held(
    kernel: Any, shape: torch.Size, layout: Layout, tiles: tuple[int, int], numbers: tuple[Any, ...], way: Way
) -> Plan:
    """Of a kernel that holds groups whole, ``tiles`` of them or, where a program can, some times as many."""
    positions, columns = tiles
    wide = way.of_values(columns)
    if wide <= power_of_two(shape[1]) and positions * wide <= _WHOLE:
        columns = wide
    grid = (shape[0] * -(-shape[1] // columns),)
    return Plan(kernel, grid, (*numbers, positions, columns), way.of_warps(_warps(math.prod(tiles), layout)))


def _warps(values: int, layout: Layout) -> int:
    # With positions side by side, which no 16 bytes may hold, addresses take registers too, of which 8 warps have more.
    return min(max(values // 512, 4), 16 if layout.channel == 1 else 8)


@planned
def whole_forward(
    norm: Norm, shape: torch.Size, strides: tuple[int, ...], strides_of_y: tuple[int, ...], shared: int, dtypes: Dtypes
) -> Launch | None:
    """The whole norm in one launch, where a program holds groups whole."""
    layout, of_y, channels = layout_of(shape, strides), layout_of(shape, strides_of_y), shape[1]
    if dtypes[0] is None or (tiles := _whole_tiles(norm, shape, layout, dtypes[0].itemsize)) is None:
        return None
    size, kernel = channels // norm.groups, _group_kernels().whole_groups
    numbers = (math.prod(shape[2:]), channels, shared, *layout, *of_y, norm.eps, norm.activation, size)
    about = (class_of(shape, layout, of_y), size, norm.activation, dtypes)
    return Tuned(lambda way: _held(kernel, shape, layout, tiles, numbers, way), about)


class WholeBackward(NamedTuple):
    plan: Launch
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
    of_g, of_g_x = layout_of(shape, strides_of_g), layout_of(shape, strides_of_g_x)
    if dtypes[0] is None or (tiles := _whole_tiles(norm, shape, layout, dtypes[0].itemsize)) is None:
        return None
    size, kernel = channels // norm.groups, _group_kernels().through_whole_groups
    numbers = (
        math.prod(shape[2:]), channels, shared, *of_g, *layout, *of_g_x, norm.eps, norm.activation, shared > 1, size,
    )  # fmt: skip
    about = (class_of(shape, of_g, layout, of_g_x), size, norm.activation, shared > 1, dtypes)
    plan = Tuned(lambda way: _held(kernel, shape, layout, tiles, numbers, way), about)
    adding_up = Plan(pieces().added_up, (-(-rows * channels // 64),), (n, rows * channels, 16, 64))
    return WholeBackward(plan, adding_up)


def _kernels() -> Any:
    from anybatch.kernels import triton_channel_kernels  # here, since Triton takes a while to import

    return triton_channel_kernels


def _group_kernels() -> Any:
    from anybatch.kernels import triton_group_kernels

    return triton_group_kernels
