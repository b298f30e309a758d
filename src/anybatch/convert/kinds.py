"""BatchNorm of whatever library, and what it computes with constant statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.methods.batch_channel_norm import _BatchChannelNorm
from anybatch.methods.batch_norm import FrozenBatchNorm
from anybatch.methods.common import per_channel

_CONSTANT = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
"""Of torchvision and timm, which are no BatchNorm of torch's."""
_HOMES = ("torch.nn.modules.batchnorm", "anybatch.methods.", "torchvision.ops.misc", "timm.layers.norm_act")


def is_batchnorm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of torch, timm, torchvision or ours, frozen ones included."""
    return isinstance(module, _BatchNorm | FrozenBatchNorm) or type(module).__name__ in _CONSTANT


def is_constant(module: nn.Module) -> bool:
    """Whether it is a BatchNorm, or begins with one."""
    return is_batchnorm(module) or isinstance(module, _BatchChannelNorm)


def changed(module: nn.Module) -> str | None:
    """Why a layer does more than its class says, or None."""
    if any(getattr(module, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        return "it has hooks"
    if "forward" in module.__dict__:
        return "its forward was exchanged"
    return "it is parametrized" if hasattr(module, "parametrizations") else None


def own_forward(norm: nn.Module) -> str | None:
    """Why nothing is known of what a subclass computes, or None."""
    known = type(norm).forward.__module__.startswith(_HOMES)
    return None if known else f"{type(norm).__name__} has a forward of its own"


def has_averages(norm: nn.Module) -> bool:
    """Whether a BatchNorm keeps running averages, and so is a constant scale and shift in evaluation."""
    return all(getattr(norm, name, None) is not None for name in ("running_mean", "running_var"))


def channels_of(norm: Any) -> int:
    """C of a BatchNorm."""
    known = getattr(norm, "num_features", None) or getattr(norm, "num_channels", None)
    return int(known or norm.running_mean.numel())


def wide(values: Tensor) -> Tensor:
    """In float64, on a device that has it."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def as_affine(norm: Any, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm with running averages, (C,) each, in float64, by its own eps or another."""
    scale = torch.rsqrt(wide(norm.running_var) + (norm.eps if eps is None else eps))
    if norm.weight is not None:
        scale = scale * wide(norm.weight)
    shift = -wide(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + wide(norm.bias)


@torch.no_grad()
def evaluated(norm: Any, x: Tensor) -> Tensor:
    """What a BatchNorm computes of (N, C, *) in evaluation, without the activation that timm's holds."""
    if not has_averages(norm):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
        return nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=norm.eps)
    scale, shift = (per_channel(values.to(x.device, x.dtype), x.dim()) for values in as_affine(norm))
    return torch.addcmul(shift, x, scale)
