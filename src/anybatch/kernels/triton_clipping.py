"""Adaptive gradient clipping of a whole network in a few launches on CUDA, which waits for nothing.

One program measures a unit's weights and gradient and scales the gradient while it is in the cache. A table of
addresses tells programs where their units lie; it is copied to the device only when gradients have moved. Units whose
values are not dense in memory (those of transposed convolutions) are clipped by torch's operations.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.triton_common import Plan, planned, refused_device
from anybatch.kernels.triton_tables import DTYPES, LARGE, aligned, block, dense_rows, on, owners, table, triton_type
from anybatch.methods.adaptive_gradient_clipping import LEAST_NORM, Clipped, Units, clip_alike, local


def _is_taken(u: Units) -> bool:
    """Whether each of its units is dense in memory, and of a dtype that the kernel has."""
    p, grad = local(u.parameter), local(u.parameter.grad)  # pyright: ignore[reportArgumentType]
    if u.groups or p.numel() == 0 or p.dtype not in DTYPES or grad.dtype not in DTYPES:
        return False
    return dense_rows(p, u.count) and dense_rows(grad, u.count)


@planned
def _plan(
    weight: torch.dtype, gradient: torch.dtype, is_aligned: bool, large: bool, units: int, *numbers: float
) -> Plan:
    from anybatch.kernels import triton_parameter_kernels  # here, since Triton takes a while to import

    dtypes = (triton_type(weight), triton_type(gradient), weight.itemsize, gradient.itemsize)
    size, warps = block(LARGE + large)
    given = (*numbers, LEAST_NORM, *dtypes, is_aligned, size)
    return Plan(triton_parameter_kernels.clip_units, (units,), given, warps)


def _refusal(
    units: list[Units], clip_factor: float, eps: float, grad_scale: Tensor | None, wide: torch.dtype
) -> str | None:
    if reason := refused_device(units[0].parameter):
        return reason
    if wide != torch.float32:
        return f"norms are taken in {wide}"
    if any(u.across() for u in units):
        return "units are split among processes, which sum their norms in between"
    if units[0].parameter.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured, in which a table of addresses would stay what it is"
    return None


@clip_alike.kernel("triton", refusal=_refusal, first=True)
def triton_clip(
    units: list[Units], clip_factor: float, eps: float, grad_scale: Tensor | None, wide: torch.dtype
) -> Clipped:
    device = units[0].parameter.device
    classes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    sizes: list[int] = []
    others: list[tuple[Units, int]] = []  # and where their results belong
    at = 0
    for u in units:
        count = u.count
        if not _is_taken(u):
            others.append((u, at))
        else:
            p, grad = local(u.parameter), local(u.parameter.grad)  # pyright: ignore[reportArgumentType]
            size, places = p.numel() // count, (p.data_ptr(), grad.data_ptr())
            kind = (p.dtype, grad.dtype, aligned(size, *places), size > LARGE)
            classes.setdefault(kind, []).append((*places, size, count, at))
        sizes.append(count)
        at += count
    ratios = torch.empty(at, dtype=torch.float32, device=device)
    over = torch.empty(at, dtype=torch.bool, device=device)
    scale = None if grad_scale is None else grad_scale.to(device)
    with on(device):
        for kind, rows in classes.items():
            counts = tuple(row[3] for row in rows)
            firsts = itertools.accumulate(counts, initial=0)
            places = tuple((*row[:3], first, row[4]) for row, first in zip(rows, firsts, strict=False))
            plan = _plan(*kind, sum(counts), clip_factor, eps)
            plan(owners(device, counts), table(device, places), scale, ratios, over.view(torch.int8))
    if others:
        found = clip_alike.reference([u for u, _ in others], clip_factor, eps, grad_scale, wide)
        parts = zip(others, found.ratios.split(found.sizes), found.over.split(found.sizes), strict=True)
        for (_, start), some_ratios, some_over in parts:
            ratios[start : start + len(some_ratios)] = some_ratios
            over[start : start + len(some_over)] = some_over
    return Clipped(tuple(u.name for u in units), tuple(sizes), ratios, over)
