"""Group normalization and Batch-Channel Norm in C, on the CPU, with a ReLU or without.

One call forward and one backward. Kept are ``x``, the parameters, and two numbers a group of each sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.channel_moments import refused_estimates
from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_common import as_map, function, passes, refused_native
from anybatch.kernels.native_operator import NativeOperator, refused_norm
from anybatch.kernels.torch_group_norm import refused_groups
from anybatch.methods.batch_channel_norm import batch_channel_norm, estimated_batch_channel_norm, image_rate
from anybatch.methods.batch_norm import channel_moments
from anybatch.methods.group_norm import group_norm


def _normalized(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
    update: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The result, and the groups' means and 1 / std, (2, N, G).

    ``update`` is for estimates that let the batch in first: rate, whether they start warm, and the estimates, of which
    ``mean`` and ``var`` become copies.
    """
    y, moments = torch.empty_like(x), x.new_empty((2, x.shape[0], groups))
    maps = (as_map(x.shape, x.stride()), as_map(y.shape, y.stride()))
    parameters = (mean, var, batch_weight, batch_bias, weight, bias, _scales(x, weight, bias))
    given = (*maps, groups, x, *parameters, eps, relu, y, moments)
    if update:
        function("estimated_channel_norm", "ppipppppppidippdippp")(*given, *update)
    else:
        function("channel_norm", "ppipppppppidipp")(*given)
    return y, moments


def _pulled_back(
    gradient: Tensor,
    x: Tensor,
    moments: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
    update: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]:
    gradient, g_x, made = laid_out(gradient, x), torch.empty_like(x), x.new_empty((6, x.shape[1]))
    maps = [as_map(t.shape, t.stride()) for t in (x, gradient, g_x)]
    parameters = (mean, var, batch_weight, batch_bias, weight, bias, _scales(x, weight, bias))
    given = (*parameters, eps, moments, relu, gradient, g_x, made)
    function("channel_norm_backward", "pppipppppppidpippp")(*maps, groups, x, *given)
    return g_x, made


def _of_parameters(made: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else made[i, : t.shape[0]] for i, t in enumerate(parameters)]


def _scales(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    """How many there are of weights and biases: one a channel or one a group."""
    one = bias if weight is None else weight
    return x.shape[1] if one is None else one.shape[0]


def _reference(x: Tensor, *rest: Any) -> Tensor:
    *batch, weight, bias = rest[:6]
    groups, eps, relu = rest[6:9]
    options = {"eps": eps, "activation": "relu" if relu else "none"}
    if batch[0] is None:
        return group_norm.reference(x, groups, weight, bias, **options)
    return batch_channel_norm.reference(x, groups, *batch, weight, bias, **options)


CHANNEL_NORM = NativeOperator(
    "channel_norm",
    6,
    "int groups, float eps, bool relu",
    reference=_reference,
    forward=_normalized,
    backward=_pulled_back,
    gradients=_of_parameters,
    rows=6,
    moments=lambda x, *rest: (2, x.shape[0], rest[6]),
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
    channels = x.shape[1:2]
    if (weight is not None and weight.shape != channels) or (bias is not None and bias.shape != channels):
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
    return CHANNEL_NORM(x, None, None, None, None, weight, bias, groups, eps, activation == "relu")


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
    return CHANNEL_NORM(x, mean, var, batch_weight, batch_bias, weight, bias, groups, eps, activation == "relu")


def _estimated_refusal(
    x: Tensor,
    groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    *scales: Tensor | None,
    rate: float | None = None,
    warm_start: bool = True,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    if torch.compiler.is_compiling():
        return "compiled code lets batches in by formulas"
    if reason := refused_estimates(running_mean, running_var, batches):
        return reason
    return _batch_refusal(x, groups, running_mean, running_var, *scales, eps=eps, activation=activation)


@estimated_batch_channel_norm.kernel("native", refusal=_estimated_refusal)
def native_estimated_batch_channel_norm(
    x: Tensor,
    groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    batch_weight: Tensor | None = None,
    batch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rate: float | None = None,
    warm_start: bool = True,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Reads ``x`` once less than letting it in and normalizing it apart."""
    mean, var = torch.empty_like(running_mean), torch.empty_like(running_var)
    update = (image_rate(len(x)) if rate is None else rate, warm_start, running_mean, running_var, batches)
    scales = (batch_weight, batch_bias, weight, bias)
    y = CHANNEL_NORM(x, mean, var, *scales, groups, eps, activation == "relu", update)
    torch.autograd.graph.increment_version((running_mean, running_var, batches))
    return y


def _refusal_of_moments(x: Tensor) -> str | None:
    if torch.is_grad_enabled() and x.requires_grad:
        return "x asks for a gradient"
    return refused_native(x) or (None if passes(x) else "x is neither contiguous nor channels last")


@channel_moments.kernel("native", refusal=_refusal_of_moments)
def native_channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, squares = x.new_empty((2, x.shape[1])).unbind()
    function("channel_moments", "pppp")(as_map(x.shape, x.stride()), x, mean, squares)
    return mean, squares
