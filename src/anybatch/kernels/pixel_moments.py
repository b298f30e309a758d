"""Positional normalization, activation included, that keeps its input and two numbers a position for backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.activations import activated_in_place, activation_gradient, refused_activation, refused_tracing
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas
from anybatch.methods.common import per_channel, widened
from anybatch.methods.positional_norm import positional_norm


def _refusal(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, activation: str = "none", **_: Any
) -> str | None:
    if reason := refused_tracing():
        return reason
    if not x.is_floating_point() or x.dim() < 2 or x.shape[1] < 2:
        return "the arguments are none that positional_norm takes"
    if any(p is not None and p.numel() != x.shape[1] for p in (weight, bias)):
        return "weight or bias is of other channels than x"
    return refused_activation(activation)


def _normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, correction: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and 1 / std of each position, (N, 1, *)."""
    mean = x.mean(1, keepdim=True)
    y = x - mean
    if y.stride(1) == 1:
        squares = torch.linalg.vector_norm(y, dim=1, keepdim=True).square()
    else:  # over strides torch's norm takes ten times as long
        squares = y.square().sum(1, keepdim=True)
    rstd = torch.rsqrt(squares / (x.shape[1] - correction) + eps)
    y = y.mul_(rstd)
    y = y if weight is None else y.mul_(weight)
    y = y if bias is None else y.add_(bias)
    return activated_in_place(y, activation), mean, rstd


def _pulled_back(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    correction: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, of the weight and of the bias."""
    normalized = (x - mean).mul_(rstd)
    scaled = normalized if weight is None else normalized * weight
    if activation != "none":
        g = activation_gradient(g, scaled if bias is None else scaled + bias, activation)
    rest = [d for d in range(x.dim()) if d != 1]
    along = g * normalized
    g_weight, g_bias = along.sum(rest), g.sum(rest)
    if weight is not None:
        g, along = g * weight, along.mul_(weight)
    slope = along.sum(1, keepdim=True) / (x.shape[1] - correction)
    g_x = (g - g.mean(1, keepdim=True)).sub_(normalized.mul_(slope)).mul_(rstd)
    return g_x, g_weight, g_bias


class _PositionalNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        unbiased: bool,
        activation: str,
    ) -> Tensor:
        wide = widened(x)
        scales = _wide_per_channel(weight, wide), _wide_per_channel(bias, wide)
        y, mean, rstd = _normalized(wide, *scales, eps, int(unbiased), activation)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = {"eps": eps, "unbiased": unbiased, "activation": activation}
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        given = (x, weight, bias)
        if taken_in_formulas(gradient):  # for second derivatives
            reference = partial(positional_norm.reference, **ctx.options)
            return *recomputed_gradients(reference, given, gradient), None, None, None
        wide = widened(x)
        scales = _wide_per_channel(weight, wide), _wide_per_channel(bias, wide)
        options = (int(ctx.options["unbiased"]), ctx.options["activation"])
        found = _pulled_back(widened(gradient), wide, mean, rstd, *scales, *options)
        pairs = zip(given, found, strict=True)
        return *(None if t is None else g.to(t.dtype) for t, g in pairs), None, None, None


def _wide_per_channel(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else per_channel(values, x.dim()).to(x.dtype)


@positional_norm.kernel("moments", refusal=_refusal)
def positional_norm_by_moments(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unbiased: bool = False,
    activation: str = "none",
) -> Tensor:
    return _PositionalNorm.apply(x, weight, bias, eps, unbiased, activation)
