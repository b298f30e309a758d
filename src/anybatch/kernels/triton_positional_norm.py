"""Positional normalization as Triton kernels, on CUDA: one launch forward, and two backward with the parameters' sums.

What a program reads at once is chosen by the number of channels, the memory format and the positions of one sample,
never by the batch; only the number of rows whose parameter gradients one program adds up depends on it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.kernels.activations import refused_activation
from anybatch.kernels.layouts import Layout, layout_of
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
from anybatch.kernels.triton_tuning import Launch, Tuned, Way, class_of
from anybatch.methods.positional_norm import positional_norm

_TILE = 4096
"""Values that a program reads at once: 32 for each of its 128 threads, in 16-byte loads."""
_MOST_CHANNELS = 2048
"""Of a program that sees all channels of a position."""


class _Options(NamedTuple):
    eps: float
    unbiased: bool
    activation: str

    def divisor(self, channels: int) -> int:
        return channels - self.unbiased


def _blocks(shape: torch.Size, layout: Layout, tile: int) -> tuple[int, int]:
    """So many positions of so many channels."""
    channels, positions = power_of_two(shape[1]), power_of_two(math.prod(shape[2:]))
    if layout.channel == 1 or positions == 1:
        columns = min(channels, _MOST_CHANNELS)
        return min(positions, max(1, tile // columns)), columns
    rows = min(positions, max(16, min(128, tile // channels)))
    return rows, min(channels, tile // rows)


@planned
def _normalizing(
    options: _Options, shape: torch.Size, strides: tuple[int, ...], strides_of_y: tuple[int, ...], dtypes: Dtypes
) -> Launch:
    layout, (n, channels), positions = layout_of(shape, strides), shape[:2], math.prod(shape[2:])
    of_y, kernel = layout_of(shape, strides_of_y), _kernels().normalized
    numbers = (
        positions, channels, n * positions, *layout, *of_y,
        options.divisor(channels), options.eps, options.activation,
    )  # fmt: skip

    def plan(way: Way) -> Plan:
        rows, columns = _blocks(shape, layout, way.of_values(_TILE))
        grid = (n * -(-positions // rows),)
        return Plan(kernel, grid, (*numbers, columns >= channels, rows, columns), way.of_warps(4))

    return Tuned(plan, (class_of(shape, layout, of_y), options.activation, dtypes))


class _Pulling(NamedTuple):
    plan: Launch
    adding_up: Plan
    programs: int


@planned
def _pulling(
    options: _Options,
    shape: torch.Size,
    strides: tuple[int, ...],
    strides_of_g: tuple[int, ...],
    strides_of_g_x: tuple[int, ...],
    dtypes: Dtypes,
) -> _Pulling:
    layout, (n, channels), positions = layout_of(shape, strides), shape[:2], math.prod(shape[2:])
    of_g, of_g_x, kernel = layout_of(shape, strides_of_g), layout_of(shape, strides_of_g_x), _kernels().pulled
    rows, columns = _blocks(shape, layout, _TILE // 2)  # of several tensors
    sees_all, together = columns >= channels, rows
    while sees_all and together < positions and n * positions > 512 * together:
        together *= 2  # fewer sums to add up where there are programs enough for every processor
    programs = n * -(-positions // together)
    numbers = (
        positions, channels, n * positions, *of_g, *layout, *of_g_x,
        options.divisor(channels), options.activation, sees_all, together,
    )  # fmt: skip

    def plan(way: Way) -> Plan:
        at_once = way.of_values(rows) if sees_all else rows
        return Plan(kernel, (programs,), (*numbers, at_once, columns), way.of_warps(4))

    about = (class_of(shape, of_g, layout, of_g_x), options.activation, dtypes)
    adding_up = Plan(pieces().added_up, (-(-2 * channels // 16),), (programs, 2 * channels, 64, 16))
    return _Pulling(Tuned(plan, about), adding_up, programs)


class _PositionalNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, options: _Options, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        moments = x.new_empty((2, x.shape[0], 1, *x.shape[2:]), dtype=torch.float32)
        plan = _normalizing(options, x.shape, x.stride(), y.stride(), dtypes_of(x, weight, bias))
        plan(x, y, weight, bias, moments)
        ctx.options = options
        ctx.save_for_backward(x, weight, bias, moments)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, moments = ctx.saved_tensors
        options: _Options = ctx.options
        if taken_in_formulas(gradient):  # for second derivatives
            reference = partial(positional_norm.reference, **options._asdict())
            return None, *recomputed_gradients(reference, (x, weight, bias), gradient)
        g_x = torch.empty_like(x)
        g = readable(gradient, g_x)
        dtypes = dtypes_of(x, g, weight, bias)
        plan, adding_up, programs = _pulling(options, x.shape, x.stride(), g.stride(), g_x.stride(), dtypes)
        partial_sums = x.new_empty((programs, 2, x.shape[1]), dtype=torch.float32)
        plan(g, x, weight, bias, moments, g_x, partial_sums)
        if weight is None and bias is None:
            return None, g_x, None, None
        sums = partial_sums[0] if programs == 1 else torch.empty_like(partial_sums[0])
        if programs > 1:
            adding_up(partial_sums, sums)
        return None, g_x, *(None if p is None else s.to(p.dtype) for s, p in zip(sums, (weight, bias), strict=True))


def _refusal(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, activation: str = "none", **_: Any
) -> str | None:
    if reason := refused_device(x):
        return reason
    if x.dim() < 2 or x.shape[1] < 2:
        return "x has no channels to normalize over"
    if any(p is not None and p.shape != x.shape[1:2] for p in (weight, bias)):
        return "weight or bias is not one number a channel of x"
    return refused_activation(activation) or refused_activations(x) or refused_parameters(x, weight, bias)


@positional_norm.kernel("triton", refusal=_refusal, first=True)
@on_its_device
def triton_positional_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unbiased: bool = False,
    activation: str = "none",
) -> Tensor:
    return _PositionalNorm.apply(_Options(eps, unbiased, activation), x, weight, bias)  # pyright: ignore[reportReturnType]


def _kernels() -> Any:
    from anybatch.kernels import triton_positional_kernels  # here, since Triton takes a while to import

    return triton_positional_kernels
