"""Local context normalization in C, on the CPU: one call forward, one backward; ``x`` alone is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.local_windows import refused_windows
from anybatch.kernels.native_common import as_map, function, numbers
from anybatch.kernels.native_operator import NativeOperator, refused_norm
from anybatch.kernels.native_positional_norm import of_scales, scales
from anybatch.methods.local_context_norm import Window, local_context_norm, windows_within


def _normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, window: Sequence[int], channels: int, eps: float
) -> tuple[Tensor, None]:
    y = torch.empty_like(x)
    maps = (as_map(x.shape, x.stride()), as_map(y.shape, y.stride()))
    given = (_sizes(x, window), channels, x, *scales(x, weight, bias), eps)
    function("local_context_norm", "pppipppdp")(*maps, *given, y)
    return y, None


def _pulled_back(
    gradient: Tensor,
    x: Tensor,
    moments: None,
    weight: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    channels: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    gradient, g_x, made = laid_out(gradient, x), torch.empty_like(x), x.new_empty((2, x.shape[1]))
    maps = [as_map(t.shape, t.stride()) for t in (x, gradient, g_x)]
    given = (_sizes(x, window), channels, x, gradient, *scales(x, weight, bias), eps)
    function("local_context_norm_backward", "ppppippppdpp")(*maps, *given, g_x, made)
    return g_x, made


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, window: Sequence[int], channels: int, eps: float
) -> Tensor:
    return local_context_norm.reference(x, window, channels, weight, bias, eps=eps)


LOCAL_CONTEXT_NORM = NativeOperator(
    "local_context_norm",
    2,
    "int[] window, int channels_per_group, float eps",
    reference=_reference,
    forward=_normalized,
    backward=_pulled_back,
    gradients=of_scales,
    rows=2,
)


def _sizes(x: Tensor, window: Sequence[int]) -> Any:
    """Height, width, and the window's, which is at most as large; of one dimension as of one row."""
    sizes = x.shape[2:]
    return numbers(*(1,) * (2 - len(sizes)), *sizes, *(1,) * (2 - len(sizes)), *window)


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
    if reason := refused_norm(x, weight, bias) or refused_windows(x, window, channels_per_group, released):
        return reason
    if x.dim() > 4:
        return f"x of shape {tuple(x.shape)} is no map of one or two dimensions"
    if windows_within(window, x.shape[2:]) == tuple(x.shape[2:]):
        return "windows cover the map, so that it is group_norm's"
    if any(p is not None and p.numel() != x.shape[1] for p in (weight, bias)):
        return "weight or bias is not one number for each channel of x"
    return None


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
    window = windows_within(window, x.shape[2:])
    return LOCAL_CONTEXT_NORM(x, weight, bias, window, channels_per_group, eps)
