"""Local context normalization in C, for float32 on the CPU: one call forward, one backward; ``x`` alone is kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.local_windows import refused_windows
from anybatch.kernels.native_common import as_map, function, numbers, passes, refused_native
from anybatch.kernels.native_positional_norm import scales
from anybatch.kernels.recompute import recomputed_gradients
from anybatch.methods.local_context_norm import Window, local_context_norm, windows_within


class _LocalContextNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        window: Window,
        channels: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        y = torch.empty_like(x)
        ctx.sizes, ctx.channels, ctx.eps, ctx.window = _sizes(x, window), channels, eps, window
        maps = (as_map(t.shape, t.stride()) for t in (x, y))
        tensors = (x, *scales(x, weight, bias))
        function("local_context_norm", "pppipppdp")(*maps, ctx.sizes, channels, *tensors, eps, y)
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives
            reference = partial(local_context_norm.reference, eps=ctx.eps)
            return *recomputed_gradients(reference, (x, ctx.window, ctx.channels, weight, bias), gradient), None
        gradient, g_x, sums = laid_out(gradient, x), torch.empty_like(x), x.new_empty((2, x.shape[1]))
        maps = (as_map(t.shape, t.stride()) for t in (x, gradient, g_x))
        tensors = (x, gradient, *scales(x, weight, bias))
        function("local_context_norm_backward", "ppppippppdpp")(
            *(*maps, ctx.sizes, ctx.channels, *tensors, ctx.eps, g_x, sums)
        )
        given = (None if t is None else g.view_as(t) for t, g in zip((weight, bias), sums, strict=True))
        return g_x, None, None, *given, None


def _sizes(x: Tensor, window: Window) -> Any:
    """Height, width, and the window's, which is at most as large; of one dimension as of one row."""
    sizes = x.shape[2:]
    return numbers(*(1,) * (2 - len(sizes)), *sizes, *(1,) * (2 - len(sizes)), *windows_within(window, sizes))


def _refusal(
    x: Tensor,
    window: Window,
    channels_per_group: int = 2,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    released: bool = False,
) -> str | None:
    if reason := refused_native(x) or refused_windows(x, window, channels_per_group, released):
        return reason
    if x.dim() > 4:
        return f"x of shape {tuple(x.shape)} is no map of one or two dimensions"
    if windows_within(window, x.shape[2:]) == tuple(x.shape[2:]):
        return "windows cover the map, so that it is group_norm's"
    if any(
        p is not None and (p.numel() != x.shape[1] or p.dtype != x.dtype or not p.is_contiguous())
        for p in (weight, bias)
    ):
        return "weight or bias is not one number of the dtype of x for each of its channels"
    return None if passes(x) else "x is neither contiguous nor channels last"


@local_context_norm.kernel("native", refusal=_refusal, first=True)
def native_local_context_norm(
    x: Tensor,
    window: Window,
    channels_per_group: int = 2,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    released: bool = False,
) -> Tensor:
    return _LocalContextNorm.apply(x, window, channels_per_group, weight, bias, eps)
