"""Moments of channels over a batch as two launches of Triton kernels, on CUDA, for estimated and shared statistics.

Batch-Channel Norm by estimates lets its batch in with these two, and one for the number of batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.channel_moments import refused_estimates
from anybatch.kernels.triton_channel_norm import refused_batch_channel_norm, triton_batch_channel_norm
from anybatch.kernels.triton_channel_plans import BatchMoments, batch_moments, letting_in
from anybatch.kernels.triton_common import on_its_device, refused_activations, refused_device
from anybatch.methods.batch_channel_norm import estimated_batch_channel_norm, image_rate
from anybatch.methods.batch_norm import channel_moments


def _refusal(x: Tensor) -> str | None:
    if torch.is_grad_enabled() and x.requires_grad:
        return "x asks for a gradient, which formulas give"
    if reason := refused_device(x):
        return reason
    return "x has no channels" if x.dim() < 2 else refused_activations(x)


@channel_moments.kernel("triton", refusal=_refusal, first=True)
@on_its_device
def triton_channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    plans = batch_moments(x.shape, x.stride(), x.dtype)
    found = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    plans.joined(_partial(x, plans), found)
    mean, squares = found.unbind()
    return mean, squares


def _partial(x: Tensor, plans: BatchMoments) -> Tensor:
    """Moments of channels over the chunks of each sample."""
    partial = x.new_empty((x.shape[0], plans.chunks, 2, x.shape[1]), dtype=torch.float32)
    plans.moments(x, partial)
    return partial


def _estimated_refusal(
    x: Tensor,
    groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    *scales: Tensor | None,
    activation: str = "none",
    **_: Any,
) -> str | None:
    if reason := refused_batch_channel_norm(x, groups, running_mean, running_var, *scales, activation=activation):
        return reason
    if reason := refused_estimates(running_mean, running_var, batches):
        return reason
    return None if batches.device == x.device else f"the number of batches is on {batches.device.type}"


@estimated_batch_channel_norm.kernel("triton", refusal=_estimated_refusal, first=True)
@on_its_device
def triton_estimated_batch_channel_norm(
    x: Tensor,
    groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    *scales: Tensor | None,
    rate: float | None = None,
    warm_start: bool = True,
    **options: Any,
) -> Tensor:
    weight = image_rate(x.shape[0]) if rate is None else float(rate)
    plans = letting_in(x.shape, x.stride(), x.dtype, weight, warm_start)
    mean, var = torch.empty_like(running_mean), torch.empty_like(running_var)
    plans.joined(_partial(x, plans), running_mean, running_var, batches, mean, var)
    batches.add_(1)
    torch.autograd.graph.increment_version((running_mean, running_var))
    return triton_batch_channel_norm(x, groups, mean, var, *scales, **options)
