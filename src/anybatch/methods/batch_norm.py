"""Batch normalization, the baseline: torch's own layers, one for many processes, and one of constants."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anybatch.dispatch import op
from anybatch.methods.common import ChannelNorm, check_has_channels, per_channel, widened
from anybatch.scheme import Scheme, check_count, check_number


@op
def frozen_batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Scale and shift each channel by given statistics: batch normalization in evaluation.

    ``y = x * scale + shift``, ``scale = weight / sqrt(var + eps)``, ``shift = bias - mean * scale``, computed in
    float32 or wider. Nothing of the size of ``x`` is kept for backward while ``x`` alone asks for a gradient.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        mean: (C,), of each channel.
        var: (C,), of each channel.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to the variance, so its unit is that of ``x`` squared.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, or another number of channels than ``mean``.

    Source:
        Ioffe and Szegedy 2015, "Batch Normalization", arXiv:1502.03167, algorithm 2, step 11.
    """
    check_has_channels(x)
    if x.shape[1] != mean.numel():
        raise ValueError(f"mean is of {mean.numel()} channels, x of shape {tuple(x.shape)} has {x.shape[1]}")
    x_wide = widened(x)
    scale = torch.rsqrt(var.to(x_wide.dtype) + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    scale, shift = (per_channel(values.to(x_wide.dtype), x.dim()) for values in (scale, shift))
    return torch.addcmul(shift, x_wide, scale).to(x.dtype)


class FrozenBatchNorm(ChannelNorm):
    """Batch normalization whose statistics, scale and shift are constants; see `anybatch.functional.frozen_batch_norm`.

    ``y = (x - running_mean) / sqrt(running_var + eps) * weight + bias`` in training and evaluation alike, so that no
    sample depends on another. All of them are buffers, under the names of torch's BatchNorm, whose state dicts load
    (``num_batches_tracked`` is passed over), as do those of ``torchvision.ops.FrozenBatchNorm2d``. It starts as the
    identity (up to ``eps``): without statistics from a trained network it normalizes nothing.

    Args:
        num_channels: C.
        eps: Added to the variance.
        device: Of the buffers.
        dtype: Of the buffers.

    Shape:
        (N, C, *) to (N, C, *).

    Raises:
        ValueError: If the input has another number of channels.

    Source:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2, step 11; as constants: He et al. 2016,
        "Deep Residual Learning", arXiv:1512.03385, appendix A, where detectors are fine-tuned.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine=False)
        del self.weight, self.bias  # as parameters, that they may be buffers
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_channels,), value, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the buffers to the values they start at, with which it is the identity up to ``eps``."""
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.get_buffer(name).fill_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def normalize(self, x: Tensor) -> Tensor:
        return frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}"


@op
def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel of (N, C, *), in two passes, in float32 or wider."""
    x = widened(x)
    dims = (0, *range(2, x.dim()))
    mean = x.sum(dims) / max(x.numel() // x.shape[1], 1)  # a rank may have no sample
    return mean, (x - per_channel(mean, x.dim())).square().sum(dims)


def shared_moments(x: Tensor, group: Any = None) -> tuple[int | Tensor, int | Tensor, Tensor, Tensor]:
    """Number of samples, values in a channel, mean (C,) and biased variance (C,), over all ranks of a process group.

    The first two are tensors only where ranks exchanged them.

    Means and squared deviations of the ranks are joined as Chan, Golub and LeVeque join them, which cancels nothing
    where means are large, and weighs each rank by its number of values. The ranks exchange one table.
    """
    mean, squares = channel_moments(x)
    n, c = x.shape[:2]
    count = x.numel() // c
    if not sharing(group):
        return n, count, mean, squares / max(count, 1)
    row = torch.cat([mean.new_tensor([n, count]), mean, squares])
    table = row.new_zeros(dist.get_world_size(group), row.numel())
    table[dist.get_rank(group)] = row
    dist.all_reduce(table, group=group)  # of one row each: every backend has this, and few can gather
    samples, counts, means, squares = table[:, :1], table[:, 1:2], table[:, 2 : c + 2], table[:, c + 2 :]
    count = counts.sum().clamp_min(1)
    mean = (counts * means).sum(0) / count
    squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    return samples.sum(), count, mean, squares / count


def check_norm(num_features: int, eps: float, momentum: float | None) -> None:
    """Raise a `ValueError` unless these make a batch normalization."""
    check_count("num_features", num_features)
    check_number("eps", eps)
    if momentum is not None:
        check_number("momentum", momentum, at_most=1)


def sharing(group: Any = None) -> bool:
    """Whether there are other processes to share statistics with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def recomputing() -> bool:
    """Whether autograd runs this forward a second time within backward, as ``torch.utils.checkpoint`` makes it.

    Running statistics have taken in the batch by then.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _NormalizeByShared(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with moments of x over all ranks, through which gradients flow.

    As with torch's layer, each rank gets the gradient of the sum of all ranks' losses by its own x, and of its own loss
    by weight and bias, which DistributedDataParallel averages.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        count: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        group: Any,
    ) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, count, mean, rstd)
        ctx.group = group
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = (widened(x) - per_channel(mean, x.dim())) * per_channel(rstd if weight is None else rstd * weight, x.dim())
        if bias is not None:
            y = y + per_channel(bias, x.dim())
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, count, mean, rstd = ctx.saved_tensors
        dims = (0, *range(2, x.dim()))
        g = widened(gradient)
        normalized = (widened(x) - per_channel(mean, x.dim())) * per_channel(rstd, x.dim())
        along, total = (g * normalized).sum(dims), g.sum(dims)
        sums = torch.cat([along, total])
        g_weight = None if weight is None else along.to(weight.dtype)
        g_bias = None if ctx.bias_dtype is None else total.to(ctx.bias_dtype)
        dist.all_reduce(sums, group=ctx.group)
        along, total = (per_channel(part, x.dim()) for part in (sums / count).chunk(2))
        scale = rstd if weight is None else rstd * weight
        g_x = (g - total - normalized * along) * per_channel(scale, x.dim())
        return g_x.to(x.dtype), g_weight, g_bias, None, None, None, None, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over the batches of all processes: two ranks with one image each do as one with two.

    Without a process group, in evaluation and alone in its group it is torch's BatchNorm. Unlike
    ``torch.nn.SyncBatchNorm`` it takes CPU tensors too (gloo), and joins the ranks' moments without rounding the
    variance through ``1 / sqrt(var + eps)``. Ranks may have batches of different sizes, or none. Training normalizes
    with the biased variance and averages the unbiased one, as torch does; statistics are taken in float32 or wider.
    State dicts are those of torch's BatchNorm.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running averages; None for the plain average of all batches.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        track_running_stats: Whether to keep running averages; without them evaluation takes statistics of its batch.
        process_group: Processes that share statistics; None for all.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.

    Shape:
        (N, C, *) to (N, C, *).

    Raises:
        ValueError: If the input has another number of channels, or in training there is one value in each channel.

    Source:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1; across devices: Peng et al. 2018, "MegDet",
        arXiv:1711.07240, section 3.3. Joining moments: Chan, Golub and LeVeque 1983, "Algorithms for Computing the
        Sample Variance", eq. 2.1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_norm(num_features, eps, momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        check_has_channels(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"SyncBatchNorm is made for {self.num_features} channels, got x of shape {tuple(input.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, process_group={self.process_group}"

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and sharing(self.process_group)):
            return super().forward(input)
        self._check_input_dim(input)
        with torch.no_grad():
            _, values, mean, var = shared_moments(input, self.process_group)
            count = torch.as_tensor(values)  # exchanged by ranks
            if not recomputing():
                update_running_averages(self, count, mean, var)
        return _NormalizeByShared.apply(input, self.weight, self.bias, count, mean, var, self.eps, self.process_group)


def update_running_averages(norm: nn.modules.batchnorm._BatchNorm, count: Tensor, mean: Tensor, var: Tensor) -> None:
    """Let a batch into the running averages as torch does: the unbiased variance, by ``momentum``."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    if not norm.track_running_stats:
        return
    norm.num_batches_tracked.add_(1)
    weight = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    unbiased = var * (count / (count - 1).clamp_min(1))
    for average, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        average.copy_(average + weight * (value - average))


def bn(*, momentum: float = 0.1, eps: float = 1e-5) -> Scheme:
    """Batch normalization: statistics of the batch in training, running averages in evaluation.

    Training normalizes with the biased variance and averages the unbiased one, as torch does. The population
    statistics of the paper's algorithm 2 are `anybatch.convert.precise_batchnorm`.

    Source:
        Ioffe and Szegedy 2015, "Batch Normalization", arXiv:1502.03167, algorithm 1.
    """
    check_number("momentum", momentum, at_most=1)
    check_number("eps", eps)
    layers = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    one_d, two_d, three_d = (partial(layer, momentum=momentum, eps=eps) for layer in layers)
    return Scheme(name="bn", norm=(one_d, two_d, three_d), batch_independent=False, sources=("arXiv:1502.03167",))


def syncbn(*, momentum: float = 0.1, eps: float = 1e-5) -> Scheme:
    """Batch normalization over the batches of all processes; in one process the same as bn."""
    check_number("momentum", momentum, at_most=1)
    check_number("eps", eps)
    return Scheme(
        name="syncbn",
        norm=partial(SyncBatchNorm, momentum=momentum, eps=eps),
        batch_independent=False,
        sources=("arXiv:1502.03167", "arXiv:1711.07240"),
    )


def frozenbn(*, eps: float = 1e-5) -> Scheme:
    """Batch normalization as constants, to load a trained network into; from scratch it normalizes nothing."""
    check_number("eps", eps)
    return Scheme(
        name="frozenbn", norm=partial(FrozenBatchNorm, eps=eps), sources=("arXiv:1502.03167", "arXiv:1512.03385")
    )
