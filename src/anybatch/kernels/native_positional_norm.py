"""Positional normalization in C, for float32 on the CPU, with a ReLU or without: one call forward and one backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_common import as_map, function, passes, refused_native
from anybatch.kernels.recompute import recomputed_gradients
from anybatch.methods.positional_norm import positional_norm


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
        y = torch.empty_like(x)
        mean, rstd = x.new_empty((2, len(x), x[0, 0].numel())).unbind()
        maps = (as_map(t.shape, t.stride()) for t in (x, y))
        tensors = (x, *scales(x, weight, bias))
        to = (y, mean, rstd)
        function("positional_norm", "pppppdiippp")(
            *maps, *tensors, eps, x.shape[1] - unbiased, activation == "relu", *to
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = {"eps": eps, "unbiased": unbiased, "activation": activation}
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives
            reference = partial(positional_norm.reference, **ctx.options)
            return *recomputed_gradients(reference, (x, weight, bias), gradient), None, None, None
        gradient, g_x, sums = laid_out(gradient, x), torch.empty_like(x), x.new_empty((2, x.shape[1]))
        maps = (as_map(t.shape, t.stride()) for t in (x, gradient, g_x))
        tensors = (x, gradient, *scales(x, weight, bias), mean, rstd)
        function("positional_norm_backward", "pppppppppiipp")(
            *(*maps, *tensors, x.shape[1] - ctx.options["unbiased"], ctx.options["activation"] == "relu"),
            *(g_x, sums),
        )
        given = (None if t is None else g.view_as(t) for t, g in zip((weight, bias), sums, strict=True))
        return g_x, *given, None, None, None


def scales(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight and the bias, or the ones and zeros that they stand for."""
    c = x.shape[1]
    return x.new_ones(c) if weight is None else weight, x.new_zeros(c) if bias is None else bias


def _refusal(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, activation: str = "none", **_: Any
) -> str | None:
    if reason := refused_native(x):
        return reason
    if x.shape[1] < 2:
        return "the arguments are none that positional_norm takes"
    if activation not in ("none", "relu"):
        return f"activation={activation!r} is none of none, relu"
    if any(
        p is not None and (p.numel() != x.shape[1] or p.dtype != x.dtype or not p.is_contiguous())
        for p in (weight, bias)
    ):
        return "weight or bias is not one number of the dtype of x for each of its channels"
    return None if passes(x) else "x is neither contiguous nor channels last"


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
    return _PositionalNorm.apply(x, weight, bias, eps, unbiased, activation)
