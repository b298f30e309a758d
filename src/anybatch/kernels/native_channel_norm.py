"""Group normalization and Batch-Channel Norm in C, for float32 on the CPU, with a ReLU or without.

One call forward and one backward. Kept are ``x``, the parameters, and two numbers a group of each sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_common import as_map, function, passes, refused_native
from anybatch.kernels.native_operator import NativeOperator, refused_norm
from anybatch.kernels.torch_group_norm import refused_groups
from anybatch.methods.batch_channel_norm import batch_channel_norm, image_rate, updated_estimates
from anybatch.methods.batch_norm import channel_moments, sharing
from anybatch.methods.group_norm import group_norm


def _normalized(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the groups' means and 1 / std, (N, G)."""
    y = torch.empty_like(x)
    mean, rstd = x.new_empty((2, len(x), groups)).unbind()
    maps = (as_map(t.shape, t.stride()) for t in (x, y))
    batch = (batch_mean, batch_var, batch_weight, batch_bias)
    given = (*batch, weight, bias, _scales(x, weight, bias), eps, relu)
    function("channel_norm", "ppipppppppidippp")(*maps, groups, x, *given, y, mean, rstd)
    return y, mean, rstd


def _pulled_back(
    gradient: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    eps: float,
    relu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    gradient, g_x, made = laid_out(gradient, x), torch.empty_like(x), x.new_empty((6, x.shape[1]))
    maps = (as_map(t.shape, t.stride()) for t in (x, gradient, g_x))
    batch = (batch_mean, batch_var, batch_weight, batch_bias)
    given = (*batch, weight, bias, _scales(x, weight, bias), eps, mean, rstd, relu)
    function("channel_norm_backward", "pppippppppp" + "idppippp")(*maps, groups, x, *given, gradient, g_x, made)
    return g_x, made


def _of_parameters(
    made: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, *more: Any
) -> list[Tensor | None]:
    g_bias, g_weight, g_batch_bias, g_batch_weight, g_mean, g_var = made.unbind()
    of_scales = (None if t is None else g[: len(t)] for t, g in ((weight, g_weight), (bias, g_bias)))
    of_batch = zip(more[:4], (g_mean, g_var, g_batch_weight, g_batch_bias), strict=True)
    return [None, *of_scales, *(None if t is None else g for t, g in of_batch), None, None]


def _scales(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    """How many there are of weights and biases: one a channel or one a group."""
    return next((len(t) for t in (weight, bias) if t is not None), x.shape[1])


def _reference(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, *more: Any) -> Tensor:
    *batch, eps, relu = more
    options = {"eps": eps, "activation": "relu" if relu else "none"}
    if batch[0] is None:
        return group_norm.reference(x, groups, weight, bias, **options)
    return batch_channel_norm.reference(x, groups, *batch, weight, bias, **options)


CHANNEL_NORM = NativeOperator(
    "channel_norm",
    "int groups, Tensor? weight, Tensor? bias, Tensor? batch_mean, Tensor? batch_var, Tensor? batch_weight, "
    "Tensor? batch_bias, float eps, bool relu",
    forward=_normalized,
    backward=_pulled_back,
    gradients=_of_parameters,
    rows=6,
    kept=2,
    shape=lambda x, groups, *_: (x.shape[0], groups),
)


def _refused(x: Tensor, groups: int, activation: str, *tensors: Tensor | None) -> str | None:
    return refused_norm(x, *tensors, activation=activation) or refused_groups(x, groups)


def _refusal(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    if any(p is not None and p.shape != x.shape[1:2] for p in (weight, bias)):
        return "weight or bias is not one number a channel of x"
    return _refused(x, groups, activation, weight, bias)


@group_norm.kernel("native", refusal=_refusal, first=True)
def native_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    return CHANNEL_NORM(_reference, x, groups, weight, bias, *[None] * 4, eps, activation == "relu")


def _batch_refusal(
    x: Tensor,
    groups: int,
    mean: Tensor,
    var: Tensor,
    batch_weight: Tensor | None = None,
    batch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    of_channels, of_either = (mean, var, batch_weight, batch_bias), (weight, bias)
    if any(p is not None and p.shape != x.shape[1:2] for p in of_channels) or any(
        p is not None and (p.dim() != 1 or len(p) not in (x.shape[1], groups)) for p in of_either
    ):
        return "statistics, scales or shifts are not one number a channel of x, or a group"
    if weight is not None and bias is not None and len(weight) != len(bias):
        return "there are not as many scales as shifts"
    return _refused(x, groups, activation, *of_channels, *of_either)


@batch_channel_norm.kernel("native", refusal=_batch_refusal, first=True)
def native_batch_channel_norm(
    x: Tensor,
    groups: int,
    mean: Tensor,
    var: Tensor,
    batch_weight: Tensor | None = None,
    batch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    batch = (mean, var, batch_weight, batch_bias)
    return CHANNEL_NORM(_reference, x, groups, weight, bias, *batch, eps, activation == "relu")


def _refusal_of_moments(x: Tensor) -> str | None:
    if torch.is_grad_enabled() and x.requires_grad:
        return "x asks for a gradient"
    return refused_native(x) or (None if passes(x) else "x is neither contiguous nor channels last")


@channel_moments.kernel("native", refusal=_refusal_of_moments)
def native_channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, squares = x.new_empty((2, x.shape[1])).unbind()
    function("channel_moments", "pppp")(as_map(x.shape, x.stride()), x, mean, squares)
    return mean, squares


def _refusal_of_estimates(
    x: Tensor, mean: Tensor, var: Tensor, batches: Tensor, *, rate: float | None, warm_start: bool
) -> str | None:
    if reason := _refusal_of_moments(x):
        return reason
    if sharing():
        return "processes share their statistics"
    if any(t.dtype != x.dtype or t.device != x.device or not t.is_contiguous() for t in (mean, var)):
        return "estimates have another dtype than x or are not contiguous"
    return None if mean.shape == var.shape == x.shape[1:2] else "estimates are not one number a channel of x"


@updated_estimates.kernel("native", refusal=_refusal_of_estimates)
def native_updated_estimates(
    x: Tensor, mean: Tensor, var: Tensor, batches: Tensor, *, rate: float | None, warm_start: bool
) -> tuple[Tensor, Tensor]:
    mean_now, var_now = x.new_empty((2, x.shape[1])).unbind()
    share = image_rate(len(x)) if rate is None else rate
    function("updated_estimates", "ppdippppp")(
        *(as_map(x.shape, x.stride()), x, share, warm_start, mean, var, batches, mean_now, var_now)
    )
    torch.autograd.graph.increment_version((mean, var, batches))
    return mean_now, var_now
