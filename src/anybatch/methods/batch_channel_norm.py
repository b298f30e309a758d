"""Batch-Channel Normalization: channels by statistics over many batches, then groups of them within each sample."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.batch_norm import SyncBatchNorm, recomputing, shared_moments, sharing
from anybatch.methods.common import ChannelNorm, TakesActivation, check_has_channels, per_channel, widened
from anybatch.methods.group_norm import GroupNorm, Groups, check_group_values, gn, group_norm, resolve_groups
from anybatch.scheme import Scheme, check_number

HALF_LIFE = 200
"""Images after which a batch counts for half in estimated statistics, unless a rate is given."""


@op
def batch_channel_norm(
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
    """Normalize channels by given statistics, then each sample over groups of channels and all positions.

    ``z = (x - mean) / sqrt(var + eps) * batch_weight + batch_bias``, ``y = act(group_norm(z) * weight + bias)``, the
    group norm with its sample's own mean and biased variance. Computed in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        groups: G, a divisor of C.
        mean: (C,), of each channel over many batches.
        var: (C,), of each channel over many batches.
        batch_weight: (C,), or None for 1.
        batch_bias: (C,), or None for 0.
        weight: (G,) or (C,), or None for 1.
        bias: (G,) or (C,), or None for 0.
        eps: Added to both variances; in the first its unit is that of ``x`` squared.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"``. As part of the op it keeps no tensor for backward.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, or another number of channels than ``mean``; if ``groups`` does
            not divide C, or a group holds one value, which normalizing would erase; if there is no such activation.

    Source:
        Qiao et al. 2019, "Rethinking Normalization and Elimination Singularity in Neural Networks", arXiv:1911.09738.
    """
    z = batch_part(x, mean, var, batch_weight, batch_bias, eps)
    weight, bias = (by_channel(values, x.shape[1], z.dtype) for values in (weight, bias))
    return group_norm.reference(z, groups, weight, bias, eps=eps, activation=activation).to(x.dtype)


def batch_part(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` in float32 or wider."""
    check_has_channels(x)
    if x.shape[1] != mean.numel():
        raise ValueError(f"mean is of {mean.numel()} channels, x of shape {tuple(x.shape)} has {x.shape[1]}")
    x_wide = widened(x)
    scale = torch.rsqrt(widened(var) + eps)
    if weight is not None:
        scale = scale * weight
    # Centred first: multiplied out, the gradient of the scale would be a difference of large sums.
    z = (x_wide - per_channel(mean, x.dim())) * per_channel(scale, x.dim())
    if bias is not None:
        z = z + per_channel(bias, x.dim())
    return z.to(x_wide.dtype)


def by_channel(values: Tensor | None, channels: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """(G,) or (C,) as (C,)."""
    if values is None:
        return None
    wide = values.to(dtype or values.dtype)
    return wide if len(wide) == channels else wide.unsqueeze(1).expand(-1, channels // len(wide)).reshape(-1)


@op
def estimated_batch_channel_norm(
    x: Tensor,
    groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    batch_weight: Tensor | None = None,
    batch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rate: float | None = None,
    warm_start: bool = True,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """`batch_channel_norm` by estimates that let the batch in first, in place: `updated_estimates`.

    No gradient flows through the estimates. Arguments and errors are those of the two.
    """
    with torch.no_grad():
        batch = updated_estimates(x, running_mean, running_var, batches, rate=rate, warm_start=warm_start)
    scales = (batch_weight, batch_bias, weight, bias)
    return batch_channel_norm(x, groups, *batch, *scales, eps=eps, activation=activation)


def updated_estimates(
    x: Tensor, mean: Tensor, var: Tensor, batches: Tensor, *, rate: float | None, warm_start: bool
) -> tuple[Tensor, Tensor]:
    """Let a batch into estimates, which change in place, as `EstimatedStatistics` says; copies of them.

    Args:
        x: (N, C, *).
        mean: (C,).
        var: (C,).
        batches: One number, int64: how many were let in before.
        rate: r, or None.
        warm_start: Whether the first updates weigh more.
    """
    images, count, now_mean, now_var = shared_moments(x)
    before = mean.to(now_mean.dtype)
    drift = now_mean - before
    weight = image_rate(images) if rate is None else rate
    if warm_start:
        share = 1 / (batches.to(now_mean.dtype) + 1 + 1 / count)
        weight = torch.maximum(share, weight) if isinstance(weight, Tensor) else share.clamp_min(weight)
        # The mean of before is no estimate at the first update, and the variance around it none of a variance.
        spread = drift * (batches != 0)
    else:
        spread = drift
    now = before + weight * drift
    around = var.to(now_mean.dtype)
    now_var = around + weight * (torch.addcmul(now_var, spread, spread) - around)
    mean.copy_(now)
    var.copy_(now_var)
    batches.add_(1)
    return mean.clone(), var.clone()  # as they are kept, rounded


def image_rate(images: int | Tensor) -> Any:
    """r for which so many images count for a half after `HALF_LIFE` of them."""
    halvings = images / HALF_LIFE
    return 1 - (torch.exp2(-halvings) if isinstance(halvings, Tensor) else 2.0**-halvings)


class EstimatedStatistics(nn.Module):
    """Channel statistics over many batches, brought up to date before they are used, and their scale and shift.

    In training each call, and each of a `BatchChannelNorm2d` around it, which makes none unless it is `watched`, first
    lets its batch in, without gradients, and then returns the new values:
    ``var = (1 - r) var + r mean((x - mean)²)`` around the mean of before, biased; ``mean = (1 - r) mean + r mean(x)``.
    In evaluation the same values are used as they stand.

    Under an initialized process group the batch is that of all ranks. A forward that autograd runs again
    (``torch.utils.checkpoint``) lets nothing in a second time.

    Args:
        num_channels: C.
        rate: r; None for ``1 - 2 ** (-images / 200)``, whatever the batch size.
        warm_start: Whether the first updates weigh more, see `BatchChannelNorm2d`.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_channels: int,
        rate: float | None = None,
        warm_start: bool = True,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.rate, self.warm_start, self.affine = num_channels, rate, warm_start, affine
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            start = torch.full((num_channels,), value, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(start) if affine else None)
        self.register_buffer("running_mean", torch.zeros(num_channels, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_channels, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set scale, shift and statistics to the values they start at."""
        for name, values in (*self.named_parameters(), *self.named_buffers()):
            values.fill_(1 if name in ("weight", "running_var") else 0)

    def takes_in(self, x: Tensor) -> bool:
        """Whether a batch (N, C, *) is let in."""
        return self.training and not recomputing() and (x.numel() > 0 or sharing())

    @property
    def watched(self) -> bool:
        """Whether somebody would notice if `forward` was not called: by hooks, or a forward of a class of their own."""
        hooks = self._forward_hooks or self._forward_pre_hooks or nn.modules.module._has_any_global_hook()
        return bool(hooks) or type(self) is not EstimatedStatistics

    @property
    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance, (C,), and how many batches were let in."""
        return self.running_mean, self.running_var, self.num_batches_tracked

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(C,) and (C,): the mean and the variance to normalize (N, C, *) by."""
        if self.takes_in(x):
            return updated_estimates(x, *self.estimates, rate=self.rate, warm_start=self.warm_start)
        # Copies, since the next batch may come before this one's backward.
        return self.running_mean.clone(), self.running_var.clone()

    def extra_repr(self) -> str:
        return f"{self.num_channels}, rate={self.rate}, warm_start={self.warm_start}, affine={self.affine}"


def _check_options(statistics: str, rate: float | None, channel_affine: str) -> None:
    if statistics not in ("estimate", "batch"):
        raise ValueError(f"statistics={statistics!r} is neither 'estimate' nor 'batch'")
    if channel_affine not in ("group", "channel"):
        raise ValueError(f"channel_affine={channel_affine!r} is neither 'group' nor 'channel'")
    if rate is not None:
        check_number("rate", rate, at_most=1)


class _BatchChannelNorm(TakesActivation, ChannelNorm):
    def __init__(
        self,
        num_channels: int,
        num_groups: Groups = 32,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        group_size: int | None = None,
        statistics: Literal["estimate", "batch"] = "estimate",
        rate: float | None = None,
        warm_start: bool = True,
        channel_affine: Literal["group", "channel"] = "group",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine=False)
        self.num_groups = resolve_groups(num_channels, num_groups, group_size)
        _check_options(statistics, rate, channel_affine)
        self.affine, self.statistics, self.rate, self.warm_start = affine, statistics, rate, warm_start
        self.channel_affine = channel_affine
        if affine:
            scales = self.num_groups if channel_affine == "group" else num_channels
            self.learn("weight", 1.0, scales, device=device, dtype=dtype)
            self.learn("bias", 0.0, scales, device=device, dtype=dtype)
        if statistics == "estimate":
            self.bn = EstimatedStatistics(num_channels, rate, warm_start, affine, device=device, dtype=dtype)
        else:
            momentum = 0.1 if rate is None else rate
            self.bn = SyncBatchNorm(num_channels, eps, momentum, affine, device=device, dtype=dtype)

    def normalize(self, x: Tensor) -> Tensor:
        check_group_values(x, self.num_groups)  # before the batch enters the statistics
        if isinstance(self.bn, EstimatedStatistics):
            scales = (self.bn.weight, self.bn.bias, self.weight, self.bias)
            options: dict[str, Any] = {"eps": self.eps, "activation": self.activation}
            if self.bn.takes_in(x) and not self.bn.watched:
                options |= {"rate": self.bn.rate, "warm_start": self.bn.warm_start}
                return estimated_batch_channel_norm(x, self.num_groups, *self.bn.estimates, *scales, **options)
            return batch_channel_norm(x, self.num_groups, *self.bn(x), *scales, **options)
        if self.bn.training and x.numel() == self.num_channels and not sharing():
            raise ValueError(
                f"{type(self).__name__}(statistics='batch') needs two values or more in each channel in training, got "
                f"x of shape {tuple(x.shape)}; use a larger batch, or statistics='estimate'"
            )
        z = self.bn(x)
        weight, bias = (by_channel(p, self.num_channels) for p in (self.weight, self.bias))
        return group_norm(z, self.num_groups, weight, bias, eps=self.eps, activation=self.activation)

    def group_part(self) -> GroupNorm:
        """A layer of its own for what stands behind the batch part, with a scale and a shift for each channel."""
        with torch.device("meta"):
            made = GroupNorm(self.num_channels, self.num_groups, self.eps, self.affine)
        if self.affine:
            for name in ("weight", "bias"):
                values = by_channel(self.get_parameter(name).detach(), self.num_channels)
                setattr(made, name, nn.Parameter(values))  # pyright: ignore[reportArgumentType] (there are some)
        made.activation = self.activation
        return made

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}, "
            f"statistics={self.statistics}, rate={self.rate}, warm_start={self.warm_start}, "
            f"channel_affine={self.channel_affine}{self.shown_activation()}"
        )


_DOC = """Batch-Channel Normalization of {shape}: channels over many batches, then groups within each sample.

    ``z = (x - mean) / sqrt(var + eps) * bn.weight + bn.bias`` with channel statistics, then
    ``y = group_norm(z) * weight + bias`` with a scale and a shift for each group of channels. The batch part lives in
    the submodule ``bn``, as in the released code. Groups are to have two channels or more: one by itself would undo the
    batch part.

    With ``statistics="estimate"``, for small batches, the statistics are running estimates, used in training and
    evaluation alike, through which no gradient flows. In training each batch enters them before they are used, in the
    published order: ``var = (1 - r) var + r mean((x - mean)²)``, biased and around the mean of before, which thereby
    counts drift as variance, and ``mean = (1 - r) mean + r mean(x)``. With ``statistics="batch"`` the batch part is
    `SyncBatchNorm`: statistics of the batch in training, running averages in evaluation. Either way the batch is that
    of all ranks under an initialized process group, so that 2 ranks with one image each do as one with two. A sample
    depends on others in training, through the estimates: this is a norm for small batches, not a batch-free one.

    No release sets the rate r. The default is ours: ``r = 1 - 2 ** (-images / 200)``, images being those of the batch
    (on all ranks). What counts is how many images the estimates span, since a learning rate that is proportional to the
    batch size moves the weights by images, not by steps: after 200 images a batch counts for half, so that the
    estimates average (2 - r) / r batches, about 577 images where batches are small, and a channel's mean errs by 4 %
    of its spread from image to image; at 256 images r is 0.59, near to the batch statistics that serve there. The warm
    start is ours too: ``max(r, 1 / (t + 1 + 1 / n))`` at the update behind t others, n the values in a channel, weighs
    the first batches alike and counts the initial mean 0 and variance 1 as one value more; its first update takes the
    variance around the batch's own mean. ``warm_start=False`` with a rate is the released code to the letter.

    Buffers in half precision would lose updates smaller than their steps: train in autocast, not with ``model.half()``.

    Args:
        num_channels: C.
        num_groups: G, a divisor of C, or ``"auto"`` for the divisor nearest to 32 with two channels or more a group.
        eps: Added to both variances.
        affine: Whether both parts learn a scale, first 1, and a shift, first 0.
        group_size: Channels in each group, instead of ``num_groups``.
        statistics: ``"estimate"`` or ``"batch"``.
        rate: Weight of a new batch in the running statistics; None for the default above, and for 0.1, torch's
            momentum, with ``statistics="batch"``.
        warm_start: Whether the first updates of estimates weigh more.
        channel_affine: ``"group"`` for ``weight`` and ``bias`` of shape (G,), as published; ``"channel"`` for (C,).
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.

    Shape:
        {shape} to the same; one sample without N too.

    Raises:
        ValueError: If the groups do not divide C; in `forward`, if a group holds one value, which normalizing would
            erase, and with ``statistics="batch"`` in training, if a channel does.

    Source:
        Qiao et al. 2019, "Rethinking Normalization and Elimination Singularity in Neural Networks", arXiv:1911.09738;
        order of the update and a scale for each group as in the released code.
    """


class BatchChannelNorm1d(_BatchChannelNorm):
    __doc__ = _DOC.format(shape="(N, C, L)")
    dims = 1


class BatchChannelNorm2d(_BatchChannelNorm):
    __doc__ = _DOC.format(shape="(N, C, H, W)")
    dims = 2


class BatchChannelNorm3d(_BatchChannelNorm):
    __doc__ = _DOC.format(shape="(N, C, D, H, W)")
    dims = 3


def bcn(
    groups: Groups = 32,
    *,
    group_size: int | None = None,
    statistics: Literal["estimate", "batch"] = "estimate",
    rate: float | None = None,
    channel_affine: Literal["group", "channel"] = "group",
    eps: float = 1e-5,
) -> Scheme:
    """Batch-Channel Norm: channels by statistics estimated over many batches, then groups within each sample."""
    gn(groups, group_size=group_size, eps=eps)  # refuses what no group norm takes
    _check_options(statistics, rate, channel_affine)
    one_d, two_d, three_d = (
        partial(
            layer,
            num_groups=groups,
            group_size=group_size,
            eps=eps,
            statistics=statistics,
            rate=rate,
            channel_affine=channel_affine,
        )
        for layer in (BatchChannelNorm1d, BatchChannelNorm2d, BatchChannelNorm3d)
    )
    return Scheme(name="bcn", norm=(one_d, two_d, three_d), batch_independent=False, sources=("arXiv:1911.09738",))
