"""Group normalization by torch's own operator, where that is exact."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.kernels.activations import activated_in_place, activation_gradient, refused_activation, refused_tracing
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas
from anybatch.methods.common import activated
from anybatch.methods.group_norm import group_norm


def refusal(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    # On the CPU torch's operator for channels_last takes var as E[x²] - E[x]²: at |mean| / std of 100 it is 2 % off, at
    # 1000 it returns 1e3 where 1 is right (torch 2.15). For contiguous inputs it takes two passes.
    if not x.is_contiguous():
        return "x is not contiguous"
    if x.dtype.itemsize < 4:
        # Torch keeps mean and 1/std for backward in half precision: with |mean| / std of 100 no digit of a gradient
        # would be right.
        return f"x is {x.dtype}"
    if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        return "weight or bias has another dtype than x"
    return refused_groups(x, groups) or refused_activation(activation)


def refused_groups(x: Tensor, groups: int) -> str | None:
    """Why the input and its groups are none that the op takes, or None."""
    if (
        not x.is_floating_point()
        or isinstance(groups, Tensor)
        or x.dim() < 2
        or groups < 1
        or x.shape[1] % groups
        or x.shape[1] // groups * math.prod(x.shape[2:]) <= 1
    ):
        return "the arguments are none that the op takes"
    return None


class _Activated(torch.autograd.Function):
    """Group normalization and an activation that keep ``x`` alone: both are computed anew for backward."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
    ) -> Tensor:
        ctx.groups, ctx.eps, ctx.activation = groups, eps, activation
        ctx.save_for_backward(x, weight, bias)
        return activated_in_place(_native(x, groups, weight, bias, eps)[0], activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        if taken_in_formulas(gradient):  # for second derivatives, which torch's backward kernel has not
            call = partial(group_norm.reference, eps=ctx.eps, activation=ctx.activation)
            return *recomputed_gradients(call, (x, ctx.groups, weight, bias), gradient), None, None
        y, mean, rstd = _native(x, ctx.groups, weight, bias, ctx.eps)
        g = activation_gradient(gradient.contiguous(), y, ctx.activation)
        (n, c), positions = x.shape[:2], math.prod(x.shape[2:])
        wanted = [ctx.needs_input_grad[0], weight is not None, bias is not None]
        found = torch.ops.aten.native_group_norm_backward(g, x, mean, rstd, weight, n, c, positions, ctx.groups, wanted)
        g_x, g_weight, g_bias = (t if wants else None for t, wants in zip(found, wanted, strict=True))
        return g_x, None, g_weight, g_bias, None, None


def _native(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, c = x.shape[:2]
    return torch.native_group_norm(x, weight, bias, n, c, math.prod(x.shape[2:]), groups, eps)


@group_norm.kernel("torch", refusal=refusal)
def torch_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    if activation == "none":
        return F.group_norm(x, groups, weight, bias, eps)
    if activation == "relu":
        # What it gives is kept, as by the convolution behind it anyway: to compute it anew would save nothing there.
        return F.group_norm(x, groups, weight, bias, eps).relu_()
    if refused_tracing() is not None:
        return activated(F.group_norm(x, groups, weight, bias, eps), activation)
    return _Activated.apply(x, groups, weight, bias, eps, activation)
