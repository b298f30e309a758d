"""Batch Renormalization: batch normalization, corrected towards the running averages that evaluation uses."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.batch_norm import channel_moments, check_norm, recomputing, update_running_averages
from anybatch.methods.common import check_has_channels, per_channel, scaled_and_shifted, widened
from anybatch.scheme import Scheme, check_number


@op
def batch_renorm(
    x: Tensor, r: Tensor, d: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Normalize each channel over the batch, then correct it by a given scale and shift.

    ``y = ((x - mean) / sqrt(var + eps) * r + d) * weight + bias`` with the batch's mean and biased variance. With r 1
    and d 0 it is batch normalization. Statistics are taken in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        r: (C,), see `renorm_correction`.
        d: (C,), see `renorm_correction`.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to the variance, so its unit is that of ``x`` squared.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, another number of channels than ``r``, or one value in each
            channel, which normalizing would erase.

    Source:
        Ioffe 2017, "Batch Renormalization", arXiv:1702.03275, algorithm 1.
    """
    check_input(x, r)
    mean, squares = channel_moments(x)
    rstd = torch.rsqrt(squares / (x.numel() // x.shape[1]) + eps)
    normalized = (widened(x) - per_channel(mean, x.dim())) * per_channel(rstd, x.dim())
    return scaled_and_shifted(normalized, *corrected_affine(r, d, weight, bias)).to(x.dtype)


def check_input(x: Tensor, values: Tensor) -> None:
    """Raise a `ValueError` unless x has the channels of (C,) and two values or more in each."""
    check_has_channels(x)
    if x.shape[1] != values.numel():
        raise ValueError(f"r and d are of {values.numel()} channels, x of shape {tuple(x.shape)} has {x.shape[1]}")
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"batch renormalization needs two values or more in each channel in training, got x of shape "
            f"{tuple(x.shape)}; use a larger batch, or a norm that takes no statistics of the batch, such as gn"
        )


def corrected_affine(r: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One scale and one shift for a correction and the learned scale and shift behind it."""
    r, d = widened(r), widened(d)
    scale, shift = (r, d) if weight is None else (r * weight, d * weight)
    return scale, shift if bias is None else shift + bias


@torch.no_grad()
def renorm_correction(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """What turns normalization by a batch's statistics into normalization by running averages, within bounds.

    ``r = clip(std / running_std, 1 / r_max, r_max)``, ``d = clip((mean - running_mean) / running_std, -d_max, d_max)``,
    both standard deviations ``sqrt(var + eps)``. While nothing is clipped, `batch_renorm` gives what evaluation does.

    Args:
        mean: (C,), of the batch.
        var: (C,), of the batch, biased.
        running_mean: (C,).
        running_var: (C,).
        r_max: 1 or more.
        d_max: 0 or more.
        eps: Added to both variances.

    Returns:
        r and d, (C,), through which no gradient flows.

    Source:
        Ioffe 2017, arXiv:1702.03275, algorithm 1.
    """
    running_std = (running_var + eps).sqrt()
    r_max, d_max = (torch.as_tensor(bound, dtype=mean.dtype, device=mean.device) for bound in (r_max, d_max))
    r = ((var + eps).sqrt() / running_std).clamp(1 / r_max, r_max)
    return r, ((mean - running_mean) / running_std).clamp(-d_max, d_max)


class _BatchRenorm(nn.modules.batchnorm._BatchNorm):
    dims: ClassVar[int]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: int = 5_000,
        r_end: int = 40_000,
        d_end: int = 25_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_norm(num_features, eps, momentum)
        _check_options(r_max, d_max, start, r_end, d_end)
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.r_max, self.d_max, self.start, self.r_end, self.d_end = r_max, d_max, start, r_end, d_end

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != self.dims + 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} takes (N, C, *) or (C, *) with {self.num_features} channels and {self.dims} "
                f"spatial dimensions, got shape {tuple(input.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == self.dims + 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        check_input(input, running_mean)
        count = input.numel() // self.num_features
        with torch.no_grad():
            mean, squares = channel_moments(input)
            var = squares / count
            r_max = 1 + (self.r_max - 1) * self._progress(self.r_end)
            d_max = self.d_max * self._progress(self.d_end)
            r, d = renorm_correction(mean, var, running_mean, running_var, r_max, d_max, eps=self.eps)
            if count and not recomputing():  # an empty batch has no statistics
                update_running_averages(self, mean.new_tensor(count), mean, var)
        return batch_renorm(input, r, d, self.weight, self.bias, eps=self.eps)

    def _progress(self, end: int) -> Tensor:
        """0 for the first ``start`` batches, from there evenly to 1, which is reached when ``end`` have been seen."""
        seen = cast(Tensor, self.num_batches_tracked)
        return ((seen + 1 - self.start) / (end + 1 - self.start)).clamp(0, 1)

    def extra_repr(self) -> str:
        bounds = f"r_max={self.r_max}, d_max={self.d_max}, start={self.start}, r_end={self.r_end}, d_end={self.d_end}"
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, {bounds}"


def _check_options(r_max: float, d_max: float, start: int, r_end: int, d_end: int) -> None:
    if isinstance(r_max, bool) or not isinstance(r_max, (int, float)) or not 1 <= r_max < math.inf:
        raise ValueError(f"r_max={r_max!r} is not a number of 1 or more")
    check_number("d_max", d_max)
    for name, end in (("r_end", r_end), ("d_end", d_end)):
        numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in (start, end))
        if not numbers or not 0 <= start <= end < math.inf:
            raise ValueError(
                f"start={start!r} and {name}={end!r} are not batches in this order; give 0 <= start <= end"
            )


_DOC = """Batch Renormalization of {shape}; see `anybatch.functional.batch_renorm`.

    Training normalizes as batch normalization does, ``z = (x - mean) / sqrt(var + eps)`` with the batch's mean and
    biased variance, and corrects each channel towards what the running averages give, which evaluation uses:
    ``y = (z * r + d) * weight + bias`` with ``r = clip(std / running_std, 1 / r_max, r_max)`` and
    ``d = clip((mean - running_mean) / running_std, -d_max, d_max)``, through which no gradient flows. The averages take
    in a batch after r and d are found. For the first ``start`` batches it is batch normalization (r = 1, d = 0); the
    bounds then grow evenly to ``r_max`` and ``d_max`` when ``r_end`` and ``d_end`` batches have been seen, counted by
    the buffer ``num_batches_tracked`` (one for each forward in training). The defaults are the paper's, for ImageNet at
    50 x 32 images a step; shorter training needs a shorter schedule. Batches are those of one process.

    Buffers and state dict are those of torch's BatchNorm, and like it this averages the unbiased variance; the paper
    averages the standard deviation instead. Under ``torch.utils.checkpoint`` a batch enters the averages once, but the
    forward that runs again takes r and d from averages it has entered already.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running averages (the paper's alpha); None for the plain average.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        r_max: Final bound of r, 1 or more.
        d_max: Final bound of d.
        start: Batches before the bounds grow.
        r_end: Batches after which r's bound is ``r_max``.
        d_end: Batches after which d's bound is ``d_max``.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.

    Shape:
        {shape} to the same; one sample without N too.

    Raises:
        ValueError: If the bounds or their schedule are none; in `forward` in training, if a channel holds one value.

    Source:
        Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv:1702.03275, algorithm 1; schedule: section 4.
    """


class BatchRenorm1d(_BatchRenorm):
    __doc__ = _DOC.format(shape="(N, C, L)")
    dims = 1


class BatchRenorm2d(_BatchRenorm):
    __doc__ = _DOC.format(shape="(N, C, H, W)")
    dims = 2


class BatchRenorm3d(_BatchRenorm):
    __doc__ = _DOC.format(shape="(N, C, D, H, W)")
    dims = 3


def brn(
    *,
    momentum: float = 0.01,
    r_max: float = 3.0,
    d_max: float = 5.0,
    start: int = 5_000,
    r_end: int = 40_000,
    d_end: int = 25_000,
    eps: float = 1e-5,
) -> Scheme:
    """Batch Renormalization: batch normalization, corrected towards the running averages that evaluation uses."""
    check_number("momentum", momentum, at_most=1)
    check_number("eps", eps)
    _check_options(r_max, d_max, start, r_end, d_end)
    options: dict[str, Any] = {"momentum": momentum, "eps": eps, "r_max": r_max, "d_max": d_max}
    options |= {"start": start, "r_end": r_end, "d_end": d_end}
    one_d, two_d, three_d = (partial(layer, **options) for layer in (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d))
    return Scheme(name="brn", norm=(one_d, two_d, three_d), batch_independent=False, sources=("arXiv:1702.03275",))
