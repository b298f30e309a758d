"""Group normalization, with layer and instance normalization as its two limits."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from anybatch.dispatch import op
from anybatch.methods.common import (
    ChannelNorm,
    TakesActivation,
    activated,
    check_has_channels,
    scaled_and_shifted,
    widened,
)
from anybatch.scheme import Scheme, check_count, check_flag, check_number

Groups = int | Literal["auto"]


@op
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Normalize each sample over groups of channels and all positions.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias)``, with the biased variance.
    Statistics are taken in float32 or wider, and the activation of what is not yet rounded to the dtype of ``x``.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        groups: G, a divisor of C; 1 is layer norm over (C, *), C is instance norm.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to the variance, so its unit is that of ``x`` squared.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"``. As part of the op it keeps no tensor for backward,
            but for ReLU where torch's own kernel serves, which keeps its output as torch's ReLU does.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, ``groups`` does not divide C, a group holds one value, which
            normalizing would erase, or there is no such activation.

    Source:
        Wu and He 2018, "Group Normalization", arXiv:1803.08494, eq. 1-2, 6-7.
    """
    check_has_channels(x)
    c = x.shape[1]
    check_group_values(x, groups)
    # Splitting the channels is a view in every memory format, so that the result keeps the format of x.
    x_ngc = widened(x.unflatten(1, (groups, c // groups)))
    var, mean = torch.var_mean(x_ngc, dim=tuple(range(2, x_ngc.dim())), correction=0, keepdim=True)
    y = ((x_ngc - mean) * torch.rsqrt(var + eps)).flatten(1, 2)
    return activated(scaled_and_shifted(y, weight, bias), activation).to(x.dtype)


def check_group_values(x: Tensor, groups: int) -> None:
    """Raise a `ValueError` unless this many groups divide the channels of (N, C, *) and hold two values or more."""
    c = x.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(f"groups={groups} does not divide the {c} channels of x")
    if c // groups * math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"groups={groups} leaves one value in each group of x of shape {tuple(x.shape)}, which would erase it; "
            f"use fewer groups"
        )


def resolve_groups(channels: int, groups: Groups = 32, group_size: int | None = None) -> int:
    """The number of groups for this many channels.

    Args:
        channels: C.
        groups: A divisor of C, or ``"auto"`` for the divisor nearest to 32 that leaves at least two channels
            in each group (the lower of two that are as near), and 1 where C has no such divisor.
        group_size: Channels in each group, instead of ``groups``.

    Returns:
        G, a divisor of C.

    Raises:
        ValueError: If ``groups`` or ``group_size`` does not divide C, or ``groups`` is another word.

    >>> resolve_groups(64), resolve_groups(72, "auto"), resolve_groups(16, "auto"), resolve_groups(96, group_size=16)
    (32, 36, 8, 6)
    """
    if group_size is not None:
        if group_size < 1 or channels % group_size:
            raise ValueError(f"group_size={group_size} does not divide {channels} channels")
        return channels // group_size
    if groups == "auto":
        divisors = [g for g in range(1, channels // 2 + 1) if channels % g == 0]
        return min(divisors, key=lambda g: abs(g - 32), default=1)
    if not isinstance(groups, int):
        raise ValueError(f"groups={groups!r} is neither a number nor 'auto'")
    if groups < 1 or channels % groups:
        raise ValueError(
            f"groups={groups} does not divide {channels} channels; use groups='auto' (in a scheme :auto as in gn:auto; "
            f"here {resolve_groups(channels, 'auto')}) or group_size= (/8)"
        )
    return groups


class GroupNorm(TakesActivation, ChannelNorm):
    """Group normalization with a scale and a shift for each channel; see `anybatch.functional.group_norm`.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C, or ``"auto"`` for the divisor nearest to 32 with two channels or more a group.
        eps: Added to the variance.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        group_size: Channels in each group, instead of ``num_groups``.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *) to (N, C, *).

    Raises:
        ValueError: If the groups do not divide C.

    Source:
        Wu and He 2018, "Group Normalization", arXiv:1803.08494, eq. 1-2, 6-7.

    >>> GroupNorm(64)(torch.randn(1, 64, 7, 7)).shape
    torch.Size([1, 64, 7, 7])
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: Groups = 32,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)
        self.num_groups = resolve_groups(num_channels, num_groups, group_size)

    def normalize(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        shown = f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}"
        return shown + self.shown_activation()


def check_groups(groups: Groups, group_size: int | None) -> None:
    """Raise a `ValueError` unless a part's options name the groups in one way: by their number, or by their size."""
    if group_size is not None and groups != 32:
        raise ValueError(f"groups={groups!r} and group_size={group_size!r} exclude each other; give one")
    if groups != "auto" and not (isinstance(groups, int) and not isinstance(groups, bool) and groups > 0):
        raise ValueError(f"groups={groups!r} is neither a number above 0 nor 'auto'")
    if group_size is not None:
        check_count("group_size", group_size)


def gn(groups: Groups = 32, *, group_size: int | None = None, eps: float = 1e-5, affine: bool = True) -> Scheme:
    """Group normalization after plain convolutions."""
    check_groups(groups, group_size)
    return _scheme("gn", eps, affine, "arXiv:1803.08494", num_groups=groups, group_size=group_size)


def ln(*, eps: float = 1e-5, affine: bool = True) -> Scheme:
    """Layer normalization over (C, *) with a scale for each channel, as the GroupNorm paper compares it."""
    return _scheme("ln", eps, affine, "arXiv:1607.06450", "arXiv:1803.08494", num_groups=1)


def in_(*, eps: float = 1e-5, affine: bool = True) -> Scheme:
    """Instance normalization with a scale for each channel; refuses 1 x 1 maps, which it would erase."""
    return _scheme("in", eps, affine, "arXiv:1607.08022", group_size=1)


def _scheme(name: str, eps: float, affine: bool, *sources: str, **groups: Groups | None) -> Scheme:
    check_number("eps", eps)
    check_flag("affine", affine)
    return Scheme(name=name, norm=partial(GroupNorm, eps=eps, affine=affine, **groups), sources=sources)
