"""Group normalization that keeps its input for backward and nothing else of that size, in every memory format."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anybatch.methods.group_norm import group_norm


def _refusal(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> str | None:
    if x.dtype.itemsize >= 4 and x.is_contiguous():
        return f"x is contiguous {x.dtype}, of which torch's kernel keeps no more"
    if (
        not x.is_floating_point()
        or x.dim() < 2
        or groups < 1
        or x.shape[1] % groups
        or x.shape[1] // groups * math.prod(x.shape[2:]) <= 1
    ):
        return "the arguments are none that group_norm takes"
    return None


class _GroupNorm(torch.autograd.Function):
    generate_vmap_rule = True  # gradients of each sample, for differential privacy

    @staticmethod
    def forward(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return group_norm.reference(x, groups, weight, bias, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.groups, weight, bias, ctx.eps = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        positions = tuple(range(3, x.dim() + 1))
        wide = torch.promote_types(x.dtype, torch.float32)
        x_ngc = x.unflatten(1, (ctx.groups, -1)).to(wide)
        g_ngc = gradient.unflatten(1, (ctx.groups, -1)).to(wide)
        var, mean = torch.var_mean(x_ngc, dim=(2, *positions), correction=0, keepdim=True)
        rstd = torch.rsqrt(var + ctx.eps)
        x_ngc = (x_ngc - mean) * rstd
        g_weight = g_bias = None
        if weight is not None:
            g_weight = (g_ngc * x_ngc).sum((0, *positions)).flatten().to(weight.dtype)
        if ctx.bias_dtype is not None:
            g_bias = g_ngc.sum((0, *positions)).flatten().to(ctx.bias_dtype)
        if weight is not None:
            g_ngc = g_ngc * weight.to(wide).reshape(1, ctx.groups, -1, *(1 for _ in positions))
        within = g_ngc.mean((2, *positions), keepdim=True)
        along = (g_ngc * x_ngc).mean((2, *positions), keepdim=True)
        g_x = (rstd * (g_ngc - within - x_ngc * along)).flatten(1, 2).to(x.dtype)
        return g_x, None, g_weight, g_bias, None


@group_norm.kernel("recompute", refusal=_refusal)
def recompute_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    return _GroupNorm.apply(x, groups, weight, bias, eps)
