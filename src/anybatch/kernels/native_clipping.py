"""Adaptive gradient clipping of a whole network in one call in C, for float32 on the CPU.

It reads weights and gradients once, and writes the gradients that it clips while they are in the cache. Its norms are
to the last bit those of torch, as a look at a few tells once; where torch adds in another order, torch's are taken.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor, nn

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.layouts import are_rows
from anybatch.kernels.native_common import function, refused_c
from anybatch.methods.adaptive_gradient_clipping import LEAST_NORM, Clipped, Units, clip_alike

_SPLIT = 32768
"""Values from which on torch splits the norm of one unit among threads."""


def _refusal(
    units: list[Units], clip_factor: float, eps: float, grad_scale: Tensor | None, wide: torch.dtype
) -> str | None:
    if reason := refused_tracing() or refused_c():
        return reason
    for u in units:
        p, grad = u.parameter, u.parameter.grad
        if (type(p) is not nn.Parameter and type(p) is not Tensor) or type(grad) is not Tensor:
            return f"{u.name} is a {type(p).__name__} with a gradient that is a {type(grad).__name__}"
        if not (p.device.type == grad.device.type == "cpu" and p.dtype == grad.dtype == torch.float32):
            return f"{u.name} or its gradient is not float32 on the CPU"
        if u.groups or not (_are_rows(p) and _are_rows(grad)):
            return f"the units of {u.name} or of its gradient are no rows in memory"
        if not 0 < p.numel() < (_SPLIT if u.count == 1 else torch.inf):
            return f"{u.name} of shape {tuple(p.shape)} is empty, or one unit that torch splits among threads"
    if _overlap(units):
        return "gradients share memory, so that clipping one changes the norm of another"
    return None if _adds_as_torch() else "torch adds in another order here"


def _are_rows(t: Tensor) -> bool:
    return t.is_contiguous() or are_rows(t.shape, t.stride())


def _overlap(units: list[Units]) -> bool:
    """Whether what is written lies where something else is read or written."""
    grads = ((u.parameter.grad, True) for u in units)
    ranges = [(t.data_ptr(), 4 * t.numel(), written) for t, written in (*grads, *((u.parameter, False) for u in units))]  # pyright: ignore[reportOptionalMemberAccess] (there are gradients)
    end = end_of_written = 0
    for start, size, written in sorted(ranges):
        if start < (end if written else end_of_written):
            return True
        end = max(end, start + size)
        end_of_written = max(end_of_written, start + size) if written else end_of_written
    return False


@functools.cache
@torch.no_grad()
def _adds_as_torch() -> bool:
    """Whether norms of some filters and vectors, with all that eights may leave of a row, are those of torch.

    Asked once a process.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for size in (*range(1, 17), 27, 147, 576, 2304):
        drawn = torch.randn(64, size, 3, 3, generator=generator, dtype=torch.float32, device="cpu")
        rows = drawn[:, :, 0, 0].contiguous()
        for filters in (rows, drawn, drawn.contiguous(memory_format=torch.channels_last)):
            truth = torch.linalg.vector_norm(filters, dim=tuple(range(1, filters.dim())))
            if not torch.equal(_norms([filters], 64), truth):
                return False
        vectors = list(rows.unbind())
        if not torch.equal(_norms(vectors, 1), torch.stack(torch._foreach_norm(vectors))):  # pyright: ignore[reportPrivateImportUsage]
            return False
    return True


def _norms(tensors: list[Tensor], units: int) -> Tensor:
    """Of the units of each, as the ratios to weights of 0 whose norm is raised to 1."""
    return _clip([(torch.zeros_like(t), t, units) for t in tensors], torch.inf, 1.0, 1.0)[0]


def _clip(
    parameters: list[tuple[Tensor, Tensor, int]], clip_factor: float, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Clip the gradients of weights, gradients and numbers of units: the ratios and what was over."""
    table = [n for w, g, units in parameters for n in (w.data_ptr(), g.data_ptr(), units, w.numel() // units)]
    ratios = torch.empty(sum(units for _, _, units in parameters), dtype=torch.float32, device="cpu")
    over = torch.empty(ratios.shape, dtype=torch.bool, device="cpu")
    given = (clip_factor, eps, LEAST_NORM, scale, ratios, over)
    function("clip_units", "ipddddpp")(len(parameters), (ctypes.c_int64 * len(table))(*table), *given)
    return ratios, over


@clip_alike.kernel("native", refusal=_refusal)
def native_clip(
    units: list[Units], clip_factor: float, eps: float, grad_scale: Tensor | None, wide: torch.dtype
) -> Clipped:
    counts = [u.count for u in units]
    grads = [u.parameter.grad for u in units]
    parameters = [(u.parameter, grad, count) for u, grad, count in zip(units, grads, counts, strict=True)]
    scale = 1.0 if grad_scale is None else float(grad_scale)
    ratios, over = _clip(parameters, clip_factor, eps, scale)  # pyright: ignore[reportArgumentType] (there are gradients)
    torch.autograd.graph.increment_version(grads)  # pyright: ignore[reportArgumentType]
    return Clipped(tuple(u.name for u in units), tuple(counts), ratios, over)
