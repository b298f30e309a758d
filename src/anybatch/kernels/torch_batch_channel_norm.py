"""Batch-Channel Normalization whose second half is torch's group normalization, which keeps no more than its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anybatch.kernels.torch_group_norm import torch_group_norm
from anybatch.methods.batch_channel_norm import batch_channel_norm, batch_part, by_channel
from anybatch.methods.group_norm import group_norm


def _refusal(x: Tensor, groups: int, *_: Any, **__: Any) -> str | None:
    (torch_kernel,) = (kernel for kernel in group_norm.kernels if kernel.backend == "torch")
    return torch_kernel.refusal(x, groups)


@batch_channel_norm.kernel("torch", refusal=_refusal)
def torch_batch_channel_norm(
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
) -> Tensor:
    z = batch_part(x, mean, var, batch_weight, batch_bias, eps)
    weight, bias = (by_channel(values, x.shape[1], z.dtype) for values in (weight, bias))
    return torch_group_norm(z, groups, weight, bias, eps=eps)
