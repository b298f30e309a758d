"""How maps and filters lie in memory, as kernels want to know it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.methods.windows import Windows


class Layout(NamedTuple):
    """Steps in memory from sample to sample, from position to position in row-major order, and between channels."""

    n: int
    position: int
    channel: int


@functools.lru_cache(4096)
def steps(shape: torch.Size, strides: tuple[int, ...]) -> Layout | None:
    """The layout of (N, C, *); None where its positions are not one step apart."""
    if len(shape) == 2:
        return Layout(strides[0], 1, strides[1])
    step = expected = next((s for n, s in zip(reversed(shape[2:]), reversed(strides[2:]), strict=True) if n > 1), 1)
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:]), strict=True):
        if size > 1 and stride != expected:
            return None
        expected *= size
    return Layout(strides[0], step, strides[1])


@functools.lru_cache(4096)
def apart(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the values of (N, C, *) lie at places of their own; samples may be one and the same."""
    reach, first = 0, 0 if strides[0] else 1
    for stride, size in sorted(zip(strides[first:], shape[first:], strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def layout_of(shape: torch.Size, strides: tuple[int, ...]) -> Layout:
    """`steps` of a map that has them."""
    if (layout := steps(shape, strides)) is None:
        raise ValueError(f"a map of shape {tuple(shape)} and strides {strides} is no layout of kernels")
    return layout


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t``, or a copy that lies in memory as ``like`` does."""
    t = t.resolve_neg()  # a view of its opposites has these in memory
    own, others = t.stride(), like.stride()
    if own == others or all(n == 1 or a == b for n, a, b in zip(t.shape, own, others, strict=True)):
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def filters_as_rows(weight: Tensor) -> Tensor:
    """``weight``, or a copy, whose filters are rows in memory one after another."""
    return weight if are_rows(weight.shape, weight.stride()) else weight.contiguous()


@functools.lru_cache(4096)
def are_rows(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the values of (O, C, *) lie row after row of dimension 0, and in each its channels first or last."""
    within = list(zip(shape[1:], strides[1:], strict=True))
    return strides[0] == math.prod(shape[1:]) and (_in_order(within) or _in_order([*within[1:], *within[:1]]))


def _in_order(sizes_and_strides: Sequence[tuple[int, int]]) -> bool:
    """Whether values lie one behind the other, those of the last dimension first."""
    expected = 1
    for size, stride in reversed(sizes_and_strides):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def three(sizes: Sequence[int], missing: int = 1) -> tuple[int, ...]:
    """One number for each of three dimensions, the outermost first."""
    return (missing,) * (3 - len(sizes)) + tuple(sizes)


def places(at: Windows) -> tuple[int, ...]:
    """Kernel, stride, padding before, and dilation, three numbers each."""
    pads = [before for before, _ in at.pads]
    return *three(at.kernel), *three(at.stride), *three(pads, 0), *three(at.dilation)
