"""Filter response normalization and its threshold in C, on the CPU: one call forward and one backward.

Kept are ``x``, the parameters, and a number a channel of each sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_common import as_map, function
from anybatch.kernels.native_operator import NativeOperator, refused_norm
from anybatch.kernels.native_positional_norm import scales
from anybatch.methods.filter_response_norm import filter_response_norm


def _normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, tau: Tensor | None, eps_l: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The result, and 1 / root mean square of each channel, (N, C)."""
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:2])
    maps = (as_map(x.shape, x.stride()), as_map(y.shape, y.stride()))
    given = (*scales(x, weight, bias), _threshold(x, tau), eps_l, eps_l is not None and len(eps_l) == 1, eps)
    function("filter_response_norm", "pppppppidpp")(*maps, x, *given, y, rstd)
    return y, rstd


def _pulled_back(
    gradient: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tau: Tensor | None,
    eps_l: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    gradient, g_x, made = laid_out(gradient, x), torch.empty_like(x), x.new_empty((4, x.shape[1]))
    maps = [as_map(t.shape, t.stride()) for t in (x, gradient, g_x)]
    given = (*scales(x, weight, bias), _threshold(x, tau), rstd)
    function("filter_response_norm_backward", "ppppppppppp")(*maps, x, gradient, *given, g_x, made)
    return g_x, made


def _of_parameters(
    made: Tensor, weight: Tensor | None, bias: Tensor | None, tau: Tensor | None, eps_l: Tensor | None
) -> list[Tensor | None]:
    learned = [None if t is None else made[i] for i, t in enumerate((weight, bias, tau))]
    return [*learned, None if eps_l is None else eps_l.sign() * (made[3].sum() if len(eps_l) == 1 else made[3])]


def _threshold(x: Tensor, tau: Tensor | None) -> Tensor:
    return x.new_full((x.shape[1],), -math.inf) if tau is None else tau


def _reference(x: Tensor, *parameters: Any) -> Tensor:
    *tensors, eps = parameters
    return filter_response_norm.reference(x, *tensors, eps=eps)


FILTER_RESPONSE_NORM = NativeOperator(
    "filter_response_norm",
    4,
    "float eps",
    reference=_reference,
    forward=_normalized,
    backward=_pulled_back,
    gradients=_of_parameters,
    rows=4,
    moments=lambda x, *_: x.shape[:2],
)


def _refusal(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> str | None:
    if reason := refused_norm(x, weight, bias, tau, eps_l):
        return reason
    if x.dim() < 3:
        return f"x of shape {tuple(x.shape)} has no positions"
    if x.dtype != torch.float32 and math.prod(x.shape[2:]) == 1:
        return "of one position as many roots as values would be kept, in float32"
    of_channels = (weight, bias, tau, None if eps_l is None or eps_l.shape == (1,) else eps_l)
    if any(p is not None and p.shape != x.shape[1:2] for p in of_channels):
        return "a parameter is not one number a channel of x"
    return None


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
    return FILTER_RESPONSE_NORM(x, weight, bias, tau, eps_l, eps)
