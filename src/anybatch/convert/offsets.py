"""Constants in front of a group norm that keep its statistics from varying with the sample.

A group norm takes away what BatchNorm keeps: how bright and how contrasted each sample is. Constants o that are added
to its channels x, k standard deviations in size and of either sign in equal numbers, are most of what it sees. To first
order in x / k it then computes ``(x - (1 . m) 1 / C - (o . m) o / |o|²) / k`` of channels with means m in the sample:
an affine map, but for two sums of the m. Both hardly vary where channels are turned over so that they cancel: their
signs are free, since the scale behind the norm turns them back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anybatch.convert.kinds import wide
from anybatch.methods.common import widened
from anybatch.methods.filters import StandardizedFilter
from anybatch.methods.group_norm import GroupNorm

OFFSET = 4.0
"""k. With 2 a little less is kept, with 1 much less (docs/studies/conversion)."""
_LEAST = 4  # channels of a group, of which two sums are lost
_ROUNDS = 300  # of a search for signs


def can_have(layer: nn.Module) -> bool:
    """Whether constants in front of a norm can do this: a group norm of so many channels a group."""
    return isinstance(layer, GroupNorm) and layer.num_channels // layer.num_groups >= _LEAST


class Moments:
    """Of channels: mean and variance over samples and positions, and the covariance of samples' means, in float64."""

    def __init__(self) -> None:
        self.samples = 0
        self.sums: Any = 0.0
        self.squares: Any = 0.0
        self.products: Any = 0.0

    def add(self, x: Tensor) -> None:
        """Let in a map, (N, C, *)."""
        rows = widened(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2))
        means = wide(rows.mean(2))
        self.samples += len(means)
        self.sums = self.sums + means.sum(0)
        self.squares = self.squares + wide(rows.square().mean(2)).sum(0)
        self.products = self.products + means.T @ means

    def taken(self) -> tuple[Tensor, Tensor, Tensor]:
        """(C,), (C,) and (C, C)."""
        mean = self.sums / self.samples
        var = (self.squares / self.samples - mean.square()).clamp_min(0)
        return mean, var, self.products / self.samples - torch.outer(mean, mean)


@torch.no_grad()
def add_offsets(conv: Any, groups: int, moments: Moments, size: float) -> None:
    """Scale a convolution's filters to outputs of variance 1, turn some over, and add constants by its biases.

    Args:
        conv: Whose output the norm takes.
        groups: Of the norm.
        moments: Of that output.
        size: k.
    """
    mean, var, cov = moments.taken()
    std = torch.where(var > 1e-12 * mean.square(), var.sqrt(), 1.0).clamp_min(1e-6)
    scale, offset = 1 / std, torch.zeros_like(std)
    cov = cov * torch.outer(scale, scale)
    each = len(std) // groups
    for start in range(0, len(std), each):
        part = slice(start, start + each)
        turned = _free_signs(cov[part, part])
        scale[part] *= turned
        offset[part] = _balanced_signs(cov[part, part] * torch.outer(turned, turned))
    shift = size * offset - mean * scale
    weight: Tensor = conv.weight
    weight.mul_(scale.to(weight).reshape(-1, *(1 for _ in weight.shape[1:])))
    if isinstance(conv, StandardizedFilter):
        conv.restore_filters()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    if conv.bias is None:
        conv.bias = nn.Parameter(shift.to(weight))
    else:
        conv.bias.copy_(conv.bias * scale.to(weight) + shift.to(weight))


def _alternating(count: int, like: Tensor) -> Tensor:
    signs = torch.ones(count, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    return signs


def _free_signs(cov: Tensor) -> Tensor:
    """Signs w with a small ``w' cov w``, from turning over one at a time."""
    signs = _alternating(len(cov), cov)
    for _ in range(_ROUNDS):
        gain = 4 * (cov.diagonal() - signs * (cov @ signs))
        best = int(gain.argmin())
        if gain[best] >= -1e-9:
            break
        signs[best] = -signs[best]
    return signs


def _balanced_signs(cov: Tensor) -> Tensor:
    """The same, half of them of each sign, from exchanging two at a time."""
    signs = _alternating(len(cov), cov)
    for _ in range(_ROUNDS):
        up, down = (signs > 0).nonzero().flatten(), (signs < 0).nonzero().flatten()
        slope, own = cov @ signs, cov.diagonal()
        gain = 4 * ((own - slope)[up, None] + (own + slope)[None, down] - 2 * cov[up][:, down])
        best = int(gain.argmin())
        if gain.flatten()[best] >= -1e-9:
            break
        signs[up[best // len(down)]], signs[down[best % len(down)]] = -1.0, 1.0
    return signs
