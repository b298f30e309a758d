"""Norms that code which torch.compile makes for the CPU calls in C: the operators of `native_operator`, in float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anybatch.kernels.local_windows import refused_windows
from anybatch.kernels.native_channel_norm import CHANNEL_NORM
from anybatch.kernels.native_filter_response_norm import FILTER_RESPONSE_NORM
from anybatch.kernels.native_local_context_norm import LOCAL_CONTEXT_NORM
from anybatch.kernels.native_operator import refused_compiled
from anybatch.kernels.native_positional_norm import POSITIONAL_NORM
from anybatch.methods.batch_channel_norm import batch_channel_norm
from anybatch.methods.filter_response_norm import filter_response_norm
from anybatch.methods.group_norm import check_group_values, group_norm
from anybatch.methods.local_context_norm import Window, local_context_norm, windows_within
from anybatch.methods.positional_norm import positional_norm


def _not_of_channels(x: Tensor, *tensors: Tensor | None) -> str | None:
    if all(t is None or t.shape == x.shape[1:2] for t in tensors):
        return None
    return "a parameter is not one number a channel of x"


def _refused_activation(activation: str) -> str | None:
    return None if activation in ("none", "relu") else f"activation={activation!r} is none of none, relu"


def _refusal_of_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    tensors = (weight, bias)
    return refused_compiled(x, *tensors) or _refused_activation(activation) or _not_of_channels(x, *tensors)


@group_norm.kernel("library", refusal=_refusal_of_group_norm, first=True)
def library_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    check_group_values(x, groups)
    return CHANNEL_NORM.compiled(x, groups, weight, bias, *[None] * 4, eps, activation == "relu")


def _refusal_of_batch_channel_norm(
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
    batch = (mean, var, batch_weight, batch_bias)
    if reason := refused_compiled(x, weight, bias, *batch) or _refused_activation(activation):
        return reason
    if all(t is None or t.shape == (groups,) for t in (weight, bias)):
        return _not_of_channels(x, *batch)
    return _not_of_channels(x, weight, bias, *batch)


@batch_channel_norm.kernel("library", refusal=_refusal_of_batch_channel_norm, first=True)
def library_batch_channel_norm(
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
    check_group_values(x, groups)
    batch = (mean, var, batch_weight, batch_bias)
    return CHANNEL_NORM.compiled(x, groups, weight, bias, *batch, eps, activation == "relu")


def _refusal_of_positional_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, activation: str = "none", **_: Any
) -> str | None:
    if reason := refused_compiled(x, weight, bias) or _refused_activation(activation):
        return reason
    if x.shape[1] < 2:
        return "the arguments are none that positional_norm takes"
    if any(t is not None and t.numel() != x.shape[1] for t in (weight, bias)):
        return "weight or bias is of other channels than x"
    return None


@positional_norm.kernel("library", refusal=_refusal_of_positional_norm, first=True)
def library_positional_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unbiased: bool = False,
    activation: str = "none",
) -> Tensor:
    return POSITIONAL_NORM.compiled(x, weight, bias, eps, unbiased, activation == "relu")


def _refusal_of_filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> str | None:
    if reason := refused_compiled(x, weight, bias, tau, eps_l) or _not_of_channels(x, weight, bias, tau):
        return reason
    return None if eps_l is None or eps_l.shape == (1,) else _not_of_channels(x, eps_l)


@filter_response_norm.kernel("library", refusal=_refusal_of_filter_response_norm, first=True)
def library_filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    return FILTER_RESPONSE_NORM.compiled(x, weight, bias, tau, eps_l, eps)


def _refusal_of_local_context_norm(
    x: Tensor,
    window: Window,
    channels_per_group: int = 2,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    released: bool = False,
) -> str | None:
    if reason := refused_compiled(x, weight, bias) or refused_windows(x, window, channels_per_group, released):
        return reason
    if x.dim() > 4:
        return f"x of shape {tuple(x.shape)} is no map of one or two dimensions"
    if windows_within(window, x.shape[2:]) == tuple(x.shape[2:]):
        return "windows cover the map, so that it is group_norm's"
    if any(t is not None and t.numel() != x.shape[1] for t in (weight, bias)):
        return "weight or bias is of other channels than x"
    return None


@local_context_norm.kernel("library", refusal=_refusal_of_local_context_norm, first=True)
def library_local_context_norm(
    x: Tensor,
    window: Window,
    channels_per_group: int = 2,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    released: bool = False,
) -> Tensor:
    sizes = windows_within(window, x.shape[2:])
    return LOCAL_CONTEXT_NORM.compiled(x, sizes, channels_per_group, weight, bias, eps)
