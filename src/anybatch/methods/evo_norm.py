"""EvoNorm-S0 and EvoNorm-B0: a norm and its activation found together by search."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.dispatch import op
from anybatch.methods.batch_norm import recomputing
from anybatch.methods.common import ChannelNorm, check_has_channels, per_channel, scaled_and_shifted, widened
from anybatch.methods.group_norm import Groups, check_group_values, check_groups, resolve_groups
from anybatch.scheme import Scheme, check_flag, check_number


def _variance(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The biased variance over some dimensions, which stay with size 1."""
    # Two passes by hand: torch.var over dimensions that are not the last costs dozens of copies on a CPU.
    return (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True)


@op
def evo_norm_s0(
    x: Tensor,
    groups: int,
    v: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """``x * sigmoid(v * x)``, divided by the standard deviation of ``x`` over groups of channels and all positions.

    ``y = x * sigmoid(v * x) / sqrt(var + eps) * weight + bias``, with the biased variance of each sample and group. No
    mean is subtracted from ``x`` itself. Statistics are taken in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        groups: G, a divisor of C.
        v: (C,), or None for 1.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to the variance, so its unit is that of ``x`` squared.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, ``groups`` does not divide C, or a group holds one value, whose
            variance is 0.

    Source:
        Liu et al. 2020, "Evolving Normalization-Activation Layers", arXiv:2004.02967 (EvoNorm-S0 and B0).
    """
    check_has_channels(x)
    check_group_values(x, groups)
    c = x.shape[1]
    wide = widened(x)
    x_ngc = wide.unflatten(1, (groups, c // groups))
    var = _variance(x_ngc, tuple(range(2, x_ngc.dim())))
    gated = wide if v is None else wide * per_channel(v, x.dim())
    gated = wide * torch.sigmoid(gated)
    y = (gated.unflatten(1, (groups, c // groups)) * torch.rsqrt(var + eps)).flatten(1, 2)
    return scaled_and_shifted(y, weight, bias).to(x.dtype)


@op
def batch_variance(x: Tensor) -> Tensor:
    """The biased variance of each channel over the batch and all positions, (C,), in float32 or wider.

    Args:
        x: (N, C, *), floating point.

    Returns:
        (C,).

    Raises:
        ValueError: If ``x`` has no channel dimension, or one value in each channel, which has no variance.

    Source:
        Ioffe and Szegedy 2015, "Batch Normalization", arXiv:1502.03167, algorithm 1.
    """
    check_has_channels(x)
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has one value in each channel, which has no variance; "
            f"train with more images or larger maps"
        )
    return _variance(widened(x), (0, *range(2, x.dim()))).flatten()


@op
def evo_norm_b0(
    x: Tensor,
    var: Tensor,
    v: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """``x`` over the larger of its deviation in the batch and a line in ``x`` through its deviation in the sample.

    ``y = x / max(sqrt(var + eps), v * x + sqrt(var_i + eps)) * weight + bias``, with the given variance of each channel
    and the biased variance ``var_i`` of each channel of each sample over positions, taken in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        var: (C,), the batch's variance in training (`batch_variance`), its running average in evaluation.
        v: (C,), or None for 1.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to both variances, so its unit is that of ``x`` squared.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension.

    Source:
        Liu et al. 2020, "Evolving Normalization-Activation Layers", arXiv:2004.02967 (EvoNorm-S0 and B0).
    """
    check_has_channels(x)
    wide = widened(x)
    line = wide if v is None else wide * per_channel(v, x.dim())
    # The variance of a map of one position is 0.
    positions = tuple(range(2, x.dim()))
    inside = _variance(wide, positions) if positions else torch.zeros_like(wide)
    line = line + torch.sqrt(inside + eps)
    y = wide / torch.maximum(torch.sqrt(per_channel(widened(var), x.dim()) + eps), line)
    return scaled_and_shifted(y, weight, bias).to(x.dtype)


class EvoNormS0(ChannelNorm):
    """EvoNorm-S0, a norm and its activation in one; see `anybatch.functional.evo_norm_s0`.

    ``y = x * sigmoid(v * x) / sqrt(var + eps) * weight + bias``, with the biased variance over groups of channels and
    all positions of a sample. It takes the place of a norm and the ReLU behind it. Where a block has no activation
    behind a norm, as before its join, ``apply_act=False`` leaves the scale and shift alone, with no normalization, as
    the authors' code does.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C, or ``"auto"`` for the divisor nearest to 32 with two channels or more a group.
            The authors' code takes the largest divisor up to 32.
        eps: Added to the variance.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        group_size: Channels in each group, instead of ``num_groups``.
        apply_act: Whether to normalize and activate, with a learned ``v`` (C,), first 1.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *) to (N, C, *).

    Raises:
        ValueError: If the groups do not divide C; in `forward`, if a group holds one value (as with one channel a group
            and maps of 1 x 1).

    Source:
        Liu et al. 2020, "Evolving Normalization-Activation Layers", arXiv:2004.02967 (EvoNorm-S0 and B0).
    """

    scales_activation = True
    """Whether scale and shift act on what is activated already."""

    v: Tensor | None

    def __init__(
        self,
        num_channels: int,
        num_groups: Groups = 32,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        group_size: int | None = None,
        apply_act: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)
        self.num_groups = resolve_groups(num_channels, num_groups, group_size)
        self.apply_act = apply_act
        self.learn("v", 1.0 if apply_act else None, device=device, dtype=dtype)

    def normalize(self, x: Tensor) -> Tensor:
        if not self.apply_act:
            return scaled_and_shifted(x, self.weight, self.bias).to(x.dtype)
        return evo_norm_s0(x, self.num_groups, self.v, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}, "
            f"apply_act={self.apply_act}"
        )


class EvoNormB0(ChannelNorm):
    """EvoNorm-B0, a norm and its activation in one, of the batch; see `anybatch.functional.evo_norm_b0`.

    ``y = x / max(sqrt(var + eps), v * x + sqrt(var_i + eps)) * weight + bias``. ``var`` is the biased variance of a
    channel over the batch and all positions in training, and its running average in evaluation; ``var_i`` that of one
    sample. Not batch-free. Where a block has no activation behind a norm, ``apply_act=False`` leaves the scale and
    shift alone, with no normalization, as the authors' code does.

    Args:
        num_channels: C.
        eps: Added to both variances. The authors' code has 1e-5, timm's layer 1e-3.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        momentum: Share of the new variance in ``running_var`` (C,), which starts at 1.
        unbiased: Whether ``running_var`` averages unbiased variances, as torch's BatchNorm and timm's layer do; the
            authors' code averages the biased ones it normalizes with.
        apply_act: Whether to normalize and activate, with a learned ``v`` (C,), first 1.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *) to (N, C, *).

    Raises:
        ValueError: If ``momentum`` is not from 0 to 1; in training, if a channel holds one value.

    Source:
        Liu et al. 2020, "Evolving Normalization-Activation Layers", arXiv:2004.02967 (EvoNorm-S0 and B0).
    """

    v: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        momentum: float = 0.1,
        unbiased: bool = False,
        apply_act: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)
        check_number("momentum", momentum, at_most=1)
        self.momentum = momentum
        self.unbiased = unbiased
        self.apply_act = apply_act
        self.learn("v", 1.0 if apply_act else None, device=device, dtype=dtype)
        self.register_buffer("running_var", torch.ones(num_channels, device=device, dtype=dtype) if apply_act else None)

    def reset_parameters(self) -> None:
        """Set every parameter to the value it starts at, and the running variance to 1."""
        super().reset_parameters()
        if self.running_var is not None:
            self.running_var.fill_(1)

    def normalize(self, x: Tensor) -> Tensor:
        if self.running_var is None:
            return scaled_and_shifted(x, self.weight, self.bias).to(x.dtype)
        var = self.running_var
        if self.training and x.numel():
            var = batch_variance(x)
            if not recomputing():
                with torch.no_grad():
                    values = x.numel() // self.num_channels
                    new = var * (values / (values - 1)) if self.unbiased else var
                    self.running_var.lerp_(new.to(self.running_var.dtype), self.momentum)
        return evo_norm_b0(x, var, self.v, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, unbiased={self.unbiased}, apply_act={self.apply_act}"


def evos0(groups: Groups = 32, *, group_size: int | None = None, eps: float = 1e-5, affine: bool = True) -> Scheme:
    """EvoNorm-S0, a norm and its activation found together by search."""
    check_groups(groups, group_size)
    check_number("eps", eps)
    check_flag("affine", affine)
    options: dict[str, Any] = {"num_groups": groups, "group_size": group_size, "eps": eps, "affine": affine}
    return Scheme(name="evos0", norm_act=partial(EvoNormS0, **options), sources=("arXiv:2004.02967",))


def evob0(*, momentum: float = 0.1, eps: float = 1e-5, affine: bool = True) -> Scheme:
    """EvoNorm-B0, a norm and its activation found together by search, with a statistic of the batch."""
    check_number("momentum", momentum, at_most=1)
    check_number("eps", eps)
    check_flag("affine", affine)
    return Scheme(
        name="evob0",
        norm_act=partial(EvoNormB0, momentum=momentum, eps=eps, affine=affine),
        batch_independent=False,
        sources=("arXiv:2004.02967",),
    )
