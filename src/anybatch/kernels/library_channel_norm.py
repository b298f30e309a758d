"""Group normalization and Batch-Channel Norm as ``torch.ops.anybatch.channel_norm``, for torch.compile on the CPU.

Compiled code calls the kernel in C in place of the formulas, of which the compiler's own passes take longer where
channels are last (docs/log.md). Exported programs hold formulas, which run anywhere; so does what is compiled for
GPUs, where the compiler fuses them well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.native_channel_norm import normalized, of_parameters, pulled_back
from anybatch.kernels.native_common import passes, refused_c
from anybatch.methods.batch_channel_norm import batch_channel_norm
from anybatch.methods.group_norm import check_group_values, group_norm


@torch.library.custom_op("anybatch::channel_norm", mutates_args=())
def _forward(
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
    weight, bias, *batch = _dense(weight, bias, batch_mean, batch_var, batch_weight, batch_bias)
    if not x.numel():
        return torch.empty_like(x), x.new_zeros((len(x), groups)), x.new_zeros((len(x), groups))
    y, mean, rstd = normalized(x if passes(x) else x.contiguous(), groups, weight, bias, batch, eps, relu)
    return laid_out(y, torch.empty_like(x)), mean.clone(), rstd.clone()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@_forward.register_fake
def _(x: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], groups))
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("anybatch::channel_norm_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, and those of the parameters as `of_parameters` takes them, (6, C)."""
    weight, bias, *batch = _dense(weight, bias, batch_mean, batch_var, batch_weight, batch_bias)
    if not x.numel():
        return torch.empty_like(x), x.new_zeros((6, x.shape[1]))
    dense = x if passes(x) else x.contiguous()
    g_x, made = pulled_back(gradient, dense, groups, weight, bias, batch, mean, rstd, eps, relu)
    return laid_out(g_x, torch.empty_like(x)), made


@_backward.register_fake
def _(gradient: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((6, x.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.groups, weight, bias, *batch, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(x, weight, bias, *batch, *output[1:])


def _pull(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, weight, bias, *batch, mean, rstd = ctx.saved_tensors
    given = (x, ctx.groups, weight, bias, *batch, mean, rstd, ctx.eps, ctx.relu)
    g_x, made = torch.ops.anybatch.channel_norm_backward(gradient, *given)
    return g_x, None, *of_parameters(made, weight, bias, batch), None, None


_forward.register_autograd(_pull, setup_context=_keep)


@torch.compiler.assume_constant_result
def _refused_c() -> str | None:
    return refused_c()


def _refused(x: Tensor, activation: str, *tensors: Tensor | None) -> str | None:
    if not torch.compiler.is_compiling():
        return "nothing is compiled"
    if torch.compiler.is_exporting():
        return "exported programs are to run anywhere"
    if torch._C._are_functorch_transforms_active():
        return "torch.func takes derivatives of formulas"
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if (reason := _refused_c()) is not None:
        return reason
    if x.dtype != torch.float32 or any(t is not None and t.dtype != x.dtype for t in tensors):
        return "something is not float32"
    if activation not in ("none", "relu") or x.dim() < 2:
        return "the arguments are none that the kernel in C takes"
    return None


def _refusal(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    if reason := _refused(x, activation, weight, bias):
        return reason
    return None if _of_channels(x, weight, bias) else "weight or bias is not one number a channel of x"


def _of_channels(x: Tensor, *tensors: Tensor | None) -> bool:
    return all(t is None or t.shape == x.shape[1:2] for t in tensors)


@group_norm.kernel("library", refusal=_refusal, first=True)
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
    return torch.ops.anybatch.channel_norm(x, groups, weight, bias, None, None, None, None, eps, activation == "relu")[
        0
    ]


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
    batch = (mean, var, batch_weight, batch_bias)
    if reason := _refused(x, activation, weight, bias, *batch):
        return reason
    of_groups = all(t is None or t.shape == (groups,) for t in (weight, bias))
    if not _of_channels(x, *batch) or not (of_groups or _of_channels(x, weight, bias)):
        return "statistics, scales or shifts are not one number a channel of x, or a group"
    return None


@batch_channel_norm.kernel("library", refusal=_batch_refusal, first=True)
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
    return torch.ops.anybatch.channel_norm(x, groups, weight, bias, *batch, eps, activation == "relu")[0]
