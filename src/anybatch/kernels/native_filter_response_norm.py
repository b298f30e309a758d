"""Filter response normalization and its threshold in C, for float32 on the CPU: one call forward and one backward.

Kept are ``x``, the parameters, and a number a channel of each sample.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_common import as_map, function, passes, refused_native
from anybatch.kernels.native_positional_norm import scales
from anybatch.kernels.recompute import recomputed_gradients
from anybatch.methods.filter_response_norm import filter_response_norm


class _FilterResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tau: Tensor | None,
        eps_l: Tensor | None,
        eps: float,
    ) -> Tensor:
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:2])
        maps = (as_map(t.shape, t.stride()) for t in (x, y))
        one = eps_l is not None and len(eps_l) == 1
        given = (*scales(x, weight, bias), _threshold(x, tau), eps_l)
        function("filter_response_norm", "pppppppidpp")(*maps, x, *given, one, eps, y, rstd)
        ctx.save_for_backward(x, weight, bias, tau, eps_l, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, tau, eps_l, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives
            reference = partial(filter_response_norm.reference, eps=ctx.eps)
            return *recomputed_gradients(reference, (x, weight, bias, tau, eps_l), gradient), None
        gradient, g_x, made = laid_out(gradient, x), torch.empty_like(x), x.new_empty((4, x.shape[1]))
        maps = (as_map(t.shape, t.stride()) for t in (x, gradient, g_x))
        given = (*scales(x, weight, bias), _threshold(x, tau), rstd)
        function("filter_response_norm_backward", "ppppppppppp")(*maps, x, gradient, *given, g_x, made)
        *found, g_eps = made.unbind()
        learned = (None if t is None else g for t, g in zip((weight, bias, tau), found, strict=True))
        to_eps_l = None if eps_l is None else eps_l.sign() * (g_eps.sum() if len(eps_l) == 1 else g_eps)
        return g_x, *learned, to_eps_l, None


def _threshold(x: Tensor, tau: Tensor | None) -> Tensor:
    return x.new_full((x.shape[1],), -math.inf) if tau is None else tau


def _refusal(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> str | None:
    if reason := refused_native(x):
        return reason
    given = [p for p in (weight, bias, tau, eps_l) if p is not None]
    if any(p.dtype != x.dtype or p.device != x.device or not p.is_contiguous() for p in given):
        return "a parameter has another dtype than x or is not contiguous"
    if any(p.shape != x.shape[1:2] and not (p is eps_l and p.shape == (1,)) for p in given):
        return "a parameter is not one number a channel of x"
    return None if passes(x) else "x is neither contiguous nor channels last"


@filter_response_norm.kernel("native", refusal=_refusal, first=True)
def native_filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    return _FilterResponseNorm.apply(x, weight, bias, tau, eps_l, eps)
