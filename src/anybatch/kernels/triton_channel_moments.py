"""Moments of channels over a batch as two launches of Triton kernels, on CUDA, for estimated and shared statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.kernels.triton_channel_plans import batch_moments
from anybatch.kernels.triton_common import on_its_device, refused_activations, refused_device
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
    partial = x.new_empty((len(x), plans.chunks, 2, x.shape[1]), dtype=torch.float32)
    found = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    plans.moments(x, partial)
    plans.joined(partial, found)
    mean, squares = found.unbind()
    return mean, squares
