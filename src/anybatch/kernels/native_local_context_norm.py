"""Local context normalization in C, on the CPU: one call forward, one backward; ``x`` alone is kept.

A ReLU is part of both. Other activations follow in place; backward calls forward again to know what these were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.activations import activated_in_place, activation_gradient, refused_activation
from anybatch.kernels.layouts import laid_out
from anybatch.kernels.local_windows import refused_whole, refused_windows
from anybatch.kernels.native_common import as_map, function, numbers
from anybatch.kernels.native_operator import NativeOperator, refused_norm
from anybatch.kernels.native_positional_norm import of_scales, scales
from anybatch.methods.local_context_norm import Window, local_context_norm, windows_within


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    channels: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, None]:
    y = torch.empty_like(x)
    maps = (as_map(x.shape, x.stride()), as_map(y.shape, y.stride()))
    given = (_sizes(x, window), channels, x, *scales(x, weight, bias), eps, activation == "relu")
    function("local_context_norm", "pppipppdip")(*maps, *given, y)
    return y if activation == "relu" else activated_in_place(y, activation), None


def _pulled_back(
    gradient: Tensor,
    x: Tensor,
    moments: None,
    weight: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    channels: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    if activation not in ("none", "relu"):
        y, _ = _normalized(x, weight, bias, window, channels, eps, "none")
        gradient = activation_gradient(gradient, y, activation)
    gradient, g_x, made = laid_out(gradient, x), torch.empty_like(x), x.new_empty((2, x.shape[1]))
    maps = [as_map(t.shape, t.stride()) for t in (x, gradient, g_x)]
    given = (_sizes(x, window), channels, x, gradient, *scales(x, weight, bias), eps, activation == "relu")
    function("local_context_norm_backward", "ppppippppdipp")(*maps, *given, g_x, made)
    return g_x, made


def _reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    channels: int,
    eps: float,
    activation: str,
) -> Tensor:
    return local_context_norm.reference(x, window, channels, weight, bias, eps=eps, activation=activation)


LOCAL_CONTEXT_NORM = NativeOperator(
    "local_context_norm",
    2,
    "int[] window, int channels_per_group, float eps, str activation",
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
    activation: str = "none",
) -> str | None:
    if reason := refused_norm(x, weight, bias) or refused_activation(activation):
        return reason
    if reason := refused_windows(x, window, channels_per_group, released):
        return reason
    if x.dim() > 4:
        return f"x of shape {tuple(x.shape)} is no map of one or two dimensions"
    if reason := refused_whole(x, window, channels_per_group):
        return reason
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
    activation: str = "none",
) -> Tensor:
    window = windows_within(window, x.shape[2:])
    return LOCAL_CONTEXT_NORM(x, weight, bias, window, channels_per_group, eps, activation)
