"""Norms by each channel's moments as Triton kernels, on CUDA: three launches forward and three backward.

Group, layer and instance normalization and Batch-Channel Norm with their activation, and filter response normalization
with its threshold. The formulas are those of `anybatch.kernels.channel_moments`; what follows from the (N, C) moments
is computed by one kernel each way, and the last one adds up the parameters' gradients too. Kept are the input, the
parameters and a few numbers a channel.

Where one program holds groups whole it is one launch forward and two backward, which compute the moments anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.activations import refused_activation
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas
from anybatch.kernels.torch_group_norm import refused_groups
from anybatch.kernels.triton_channel_plans import Forward, Norm, backward, forward, whole_backward, whole_forward
from anybatch.kernels.triton_common import (
    dtypes_of,
    on_its_device,
    readable,
    refused_activations,
    refused_device,
    refused_parameters,
)
from anybatch.methods.batch_channel_norm import batch_channel_norm
from anybatch.methods.filter_response_norm import filter_response_norm
from anybatch.methods.group_norm import group_norm

_MOST_CHANNELS = 4096
"""Of a group, which one program joins."""
_FEW = 8
"""Positions up to which the numbers of channels are computed anew for backward, since they are as many as x has."""


def _numbers(plans: Forward, x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    n, channels = x.shape[:2]
    partial = x.new_empty((n, plans.chunks, 2, channels), dtype=torch.float32)
    plans.moments(x, partial)
    numbers = x.new_empty((plans.rows, n, channels), dtype=torch.float32)
    plans.numbers(partial, *parameters, numbers)
    return numbers


class _ChannelNorm(torch.autograd.Function):
    """Of ``x`` and parameters, the last of them a floor under the result, or None."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, norm: Norm, reference: Callable[..., Tensor], shared: int, x: Tensor, *given: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        *parameters, floor = given
        about = (norm, x.shape, x.stride(), y.stride(), shared, dtypes_of(x, *given))
        ctx.norm, ctx.reference, ctx.shared, ctx.about, ctx.count = norm, reference, shared, about, len(given)
        kept: tuple[Tensor, ...] = ()
        if (whole := whole_forward(*about)) is not None:
            whole(x, y, *parameters)
        else:
            plans = forward(*about)
            numbers = _numbers(plans, x, parameters)
            plans.applied(x, y, numbers, floor)
            kept = (numbers,) if math.prod(x.shape[2:]) > _FEW else ()
        ctx.save_for_backward(x, *given, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        norm, shared = ctx.norm, ctx.shared
        x, *saved = ctx.saved_tensors
        given, kept = saved[: ctx.count], saved[ctx.count :]
        if taken_in_formulas(gradient):  # for second derivatives
            return None, None, None, *recomputed_gradients(ctx.reference, (x, *given), gradient)
        *parameters, floor = given
        n, channels = x.shape[:2]
        g_x = torch.empty_like(x)
        g = readable(gradient, g_x)
        rows = 2 if norm.groups and parameters[3] is None else len(given) - (floor is None)
        about = (norm, x.shape, x.stride(), g.stride(), g_x.stride(), shared, rows, dtypes_of(x, g, *given))
        wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        own = torch.empty((n, rows, channels), **wide)
        if (whole := whole_backward(*about)) is not None:
            whole.plan(g, x, g_x, *parameters, own)
            sums = own[0] if n == 1 else torch.empty_like(own[0])
            if n > 1:
                whole.adding_up(own, sums)
        else:
            plans = backward(*about)
            numbers = kept[0] if kept else _numbers(forward(*ctx.about), x, parameters)
            partial = torch.empty((n, plans.chunks, 2 if floor is None else 3, channels), **wide)
            slopes, sums = torch.empty((2, n, channels), **wide), torch.empty((rows, channels), **wide)
            plans.sums(g, x, numbers, floor, partial)
            others = parameters[2:5] if norm.groups else (floor, parameters[2])
            plans.coefficients(partial, numbers, parameters[0], *others, slopes, own)
            plans.combined(g, x, numbers, floor, slopes, own, g_x, sums)
        wanted = zip(given, ctx.needs_input_grad[4:], strict=True)
        found = [_fitted(sums[i], p) if asked else None for i, (p, asked) in enumerate(wanted)]
        return None, None, None, g_x, *found


def _fitted(sums_c: Tensor, parameter: Tensor) -> Tensor:
    """The sums of channels as the gradient of a parameter, of which they have one value each, or share all."""
    if sums_c.shape != parameter.shape:
        count = parameter.numel()
        sums_c = (sums_c.sum() if count == 1 else sums_c[:count]).reshape(parameter.shape)
    return sums_c if sums_c.dtype == parameter.dtype else sums_c.to(parameter.dtype)


def _refused(x: Tensor, *parameters: Tensor | None) -> str | None:
    if reason := refused_device(x):
        return reason
    return refused_activations(x) or refused_parameters(x, *parameters)


def _refused_groups(x: Tensor, groups: int, activation: str) -> str | None:
    if reason := refused_groups(x, groups) or refused_activation(activation):
        return reason
    size = x.shape[1] // groups
    return f"a group has {size} channels, more than {_MOST_CHANNELS}" if size > _MOST_CHANNELS else None


def _refusal(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    if reason := _refused_groups(x, groups, activation) or _refused(x, weight, bias):
        return reason
    if any(p is not None and p.shape != x.shape[1:2] for p in (weight, bias)):
        return "weight or bias is not one number a channel of x"
    return None


@group_norm.kernel("triton", refusal=_refusal, first=True)
@on_its_device
def triton_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: None) -> Tensor:
        return group_norm.reference(x, groups, weight, bias, eps=eps, activation=activation)

    norm = Norm(groups, eps, activation)
    return _ChannelNorm.apply(norm, reference, 1, x, weight, bias, None, None, None, None, None)


def refused_batch_channel_norm(
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
    if reason := _refused_groups(x, groups, activation) or _refused(x, *of_channels, *of_either):
        return reason
    lengths = {p.shape for p in of_either if p is not None}
    if any(p is not None and p.shape != x.shape[1:2] for p in of_channels) or (
        len(lengths) > 1 or not lengths <= {x.shape[1:2], torch.Size((groups,))}
    ):
        return "statistics, scales or shifts are not one number a channel of x, or a group"
    return None


@batch_channel_norm.kernel("triton", refusal=refused_batch_channel_norm, first=True)
@on_its_device
def triton_batch_channel_norm(
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
    def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *batch: Any) -> Tensor:
        return batch_channel_norm.reference(x, groups, *batch[:-1], weight, bias, eps=eps, activation=activation)

    scale = bias if weight is None else weight
    shared = 1 if scale is None else x.shape[1] // scale.shape[0]
    batch = (mean, var, batch_weight, batch_bias)
    return _ChannelNorm.apply(Norm(groups, eps, activation), reference, shared, x, weight, bias, *batch, None)


def _response_refusal(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> str | None:
    if not x.is_floating_point() or x.dim() < 2:
        return "the arguments are none that the op takes"
    if reason := _refused(x, weight, bias, tau, eps_l):
        return reason
    if any(p is not None and p.shape != x.shape[1:2] for p in (weight, bias, tau)) or (
        eps_l is not None and eps_l.shape not in (x.shape[1:2], (1,))
    ):
        return "a parameter is not one number a channel of x"
    return None


@filter_response_norm.kernel("triton", refusal=_response_refusal, first=True)
@on_its_device
def triton_filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps_l: Any, tau: Any) -> Tensor:
        return filter_response_norm.reference(x, weight, bias, tau, eps_l, eps=eps)

    shared = 1 if eps_l is None else x.shape[1] // len(eps_l)
    return _ChannelNorm.apply(Norm(0, eps, "none"), reference, shared, x, weight, bias, eps_l, tau)
