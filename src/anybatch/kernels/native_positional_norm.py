"""Positional normalization in C, on the CPU, with a ReLU or without: one call forward and one backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_common import as_map, function
from anybatch.kernels.native_operator import NativeOperator, refused_norm
from anybatch.methods.positional_norm import positional_norm


def _normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, unbiased: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    """The result, and mean and 1 / std of each position, (2, N, S)."""
    y, moments = torch.empty_like(x), x.new_empty((2, x.shape[0], math.prod(x.shape[2:])))
    maps = (as_map(x.shape, x.stride()), as_map(y.shape, y.stride()))
    given = (x, *scales(x, weight, bias), eps, x.shape[1] - unbiased, relu)
    function("positional_norm", "pppppdiipp")(*maps, *given, y, moments)
    return y, moments


def _pulled_back(
    gradient: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    unbiased: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    gradient, g_x, made = laid_out(gradient, x), torch.empty_like(x), x.new_empty((2, x.shape[1]))
    maps = [as_map(t.shape, t.stride()) for t in (x, gradient, g_x)]
    given = (x, gradient, *scales(x, weight, bias), moments, x.shape[1] - unbiased, relu)
    function("positional_norm_backward", "ppppppppiipp")(*maps, *given, g_x, made)
    return g_x, made


def of_scales(made: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """The gradients of weight and bias, in their shapes, of (2, C)."""
    return [None if t is None else made[i].view_as(t) for i, t in enumerate((weight, bias))]


def scales(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight and the bias, or the ones and zeros that they stand for."""
    c = x.shape[1]
    return x.new_ones(c) if weight is None else weight, x.new_zeros(c) if bias is None else bias


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, unbiased: bool, relu: bool) -> Tensor:
    options = {"eps": eps, "unbiased": unbiased, "activation": "relu" if relu else "none"}
    return positional_norm.reference(x, weight, bias, **options)


POSITIONAL_NORM = NativeOperator(
    "positional_norm",
    2,
    "float eps, bool unbiased, bool relu",
    reference=_reference,
    forward=_normalized,
    backward=_pulled_back,
    gradients=of_scales,
    rows=2,
    moments=lambda x, *_: (2, x.shape[0], math.prod(x.shape[2:])),
)


def _refusal(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, activation: str = "none", **_: Any
) -> str | None:
    if reason := refused_norm(x, weight, bias, activation=activation):
        return reason
    if x.shape[1] < 2:
        return "the arguments are none that positional_norm takes"
    if any(p is not None and p.numel() != x.shape[1] for p in (weight, bias)):
        return "weight or bias is not one number for each channel of x"
    return None


@positional_norm.kernel("native", refusal=_refusal, first=True)
def native_positional_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unbiased: bool = False,
    activation: str = "none",
) -> Tensor:
    return POSITIONAL_NORM(x, weight, bias, eps, unbiased, activation == "relu")
