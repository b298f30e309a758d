"""The stages of a KNConv's forward and backward around torch's convolution, in formulas that every device takes.

Backends derive from `Stages` and replace what they do faster; `fused_kn_conv` strings the stages together. Maps of
one channel, (N, 1, *), are in float32 or wider.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.methods.common import widened
from anybatch.methods.kernel_norm import dropout_mask
from anybatch.methods.windows import Windows, channels_are_last, combined_moments, pad, pixel_means, window_means

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Pixels(NamedTuple):
    """Moments over the channels of each position, (N, 1, *)."""

    mean: Tensor
    """Of what dropout leaves, not scaled up; so is the variance."""
    var: Tensor
    own: Tensor | None
    """The mean of all values; None without dropout, in groups, and where filters are convolved as they are."""


class Filters(NamedTuple):
    """The filters as they are convolved, and what the epilogue adds for them."""

    convolved: Tensor
    """(O, C / groups, *), with the dtype of the activations: centered, where a backend does not say otherwise."""
    total: Tensor
    """(O,): the sum of each filter of the weight."""
    rest: Tensor | None
    """(O,): what rounding left of the sum of the centered ones; None where nothing is rounded."""


class Normalized(NamedTuple):
    """The result, and what backward needs of how it came about."""

    y: Tensor
    mean: Tensor
    """Mean of each window after dropout, (N, 1, *), as `scale` and `apart`."""
    scale: Tensor
    """1 / sqrt(var + eps)."""
    apart: Tensor | None
    """A window's mean less that after dropout; None where `Pixels.own` is."""
    own: Tensor | None
    """What the convolution gave, where its rounded sum with the skip connection does not tell it."""


class Pulled(NamedTuple):
    """Gradients behind the convolution."""

    residual: Tensor
    """In front of the activation: that of what was added."""
    z: Tensor
    """Of the convolution's output."""
    var: Tensor
    """Of each window's variance after dropout, (N, 1, *)."""
    own: Tensor | None
    """Of each window's mean, (N, 1, *), and the opposite of that of the mean after dropout; None where it is 0."""
    bias: Tensor
    """(O,)."""
    total: Tensor | None
    """Of the sums of the filters, (O,); None where it is 0."""
    plain: bool
    """Whether the gradient of ``x`` goes through filters as they are, and so ``own`` through the latter mean alone."""


class Stages:
    """Stages without state; each takes and gives tensors in the memory format of the activations."""

    centers: ClassVar[bool] = True
    """Whether forward convolves with centered filters."""
    keeps_filters: ClassVar[bool] = False
    """Whether `Filters` are kept for backward in place of being made anew there."""

    def pixels(self, x: Tensor, p: float, seed: Tensor | None, grouped: bool) -> Pixels:
        """The moments over channels, after dropout and, where they are not grouped, without."""
        if seed is None:
            return Pixels(*_pixel_moments(x), None)
        own = None if grouped else widened(x).mean(1, keepdim=True)
        return Pixels(*_pixel_moments(x * dropout_mask(x, p, seed)), own)

    def filters(self, weight: Tensor, dtype: torch.dtype) -> Filters:
        """Each filter less its mean, rounded to the activations' dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        w = widened(weight).to(wide)
        w_mean = w.mean(tuple(range(1, w.dim())), keepdim=True)
        centered = (w - w_mean).to(dtype)
        rest = None if dtype == wide else centered.to(wide).flatten(1).sum(1)
        return Filters(centered, w_mean.flatten() * weight[0].numel(), rest)

    def group_means(self, x: Tensor, at: Windows, groups: int, like: Tensor) -> Tensor:
        """The mean of what each group of filters reads of a window, (N, groups, *), ``like`` what was convolved."""
        return _mean_over(pixel_means(x, groups), at)

    def normalized(
        self,
        z: Tensor,
        pixels: Pixels,
        filters: Filters,
        own: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        at: Windows,
        p: float,
        eps: float,
        relu: bool,
    ) -> Normalized:
        """``relu((z + (own - mean) total - own rest) / sqrt(var + eps) + bias + residual)``; may overwrite ``z``.

        Args:
            own: Of `group_means`; None where all filters read all channels or sum to 0, or `centers` is False.
        """
        wide, dtype = pixels.mean.dtype, z.dtype
        mean, var = _moments(pixels.mean, pixels.var, at)
        if p:
            mean, var = mean / (1 - p), var / (1 - p) ** 2
        scale = torch.rsqrt(var + eps)
        z = z.to(wide)
        if own is None:
            own = mean if pixels.own is None else _mean_over(pixels.own, at)
        if own is not mean:
            z = _added(z, own - mean, filters.total)
        if filters.rest is not None:
            z = _added(z, own, filters.rest, sign=-1)
        apart = None if pixels.own is None else own - mean
        y = z * scale if bias is None else torch.addcmul(per_filter(bias.to(wide), at), z, scale)
        y, alone = y.to(dtype), None
        if residual is not None:
            if rounds(dtype):
                y, alone = y + residual, y
            else:
                y = y.add_(residual)
        return Normalized(y.relu_() if relu else y, mean, scale, apart, alone)

    def pulled(
        self,
        gradient: Tensor,
        done: Normalized,
        total: Tensor,
        own: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        at: Windows,
        relu: bool,
    ) -> Pulled:
        """Through the activation and the epilogue; ``total`` is that of `Filters`, ``own`` of `group_means`."""
        wide, over = done.scale.dtype, (0, *range(2, gradient.dim()))
        g = torch.ops.aten.threshold_backward(gradient, done.y, 0) if relu else gradient
        g_wide = g.to(wide)
        alone = done.y if done.own is None else done.own
        alone = alone.to(wide) - residual if residual is not None and done.own is None else alone.to(wide, copy=True)
        if bias is not None:
            alone = alone.sub_(per_filter(bias.to(wide), at))
        along = alone.mul_(g_wide).sum(1, keepdim=True)
        h = g_wide * done.scale
        g_own = g_total = None
        apart = done.apart if own is None else own - done.mean
        if apart is not None:
            g_total = (h.unflatten(1, (apart.shape[1], -1)) * apart.unsqueeze(2)).flatten(1, 2).sum(over)
            g_own = (h * per_filter(total, at)).sum(1, keepdim=True)
        g_bias = g.sum(over, dtype=wide)
        return Pulled(g, h.to(g.dtype), -0.5 * done.scale.square() * along, g_own, g_bias, g_total, own is not None)

    def through_filters(self, g_convolved: Tensor, g_total: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight's gradient from those of what was convolved, which it may overwrite, and of the filters' sums."""
        g = widened(g_convolved)
        g -= g.mean(tuple(range(1, g.dim())), keepdim=True)
        if g_total is not None:
            g += g_total.reshape(-1, *[1] * (g.dim() - 1))
        return g.to(dtype)

    def through_moments(
        self, g_x: Tensor, x: Tensor, done: Normalized, back: Pulled, at: Windows, p: float, seed: Tensor | None
    ) -> Tensor:
        """The gradient of ``x`` from that through the convolution, which it may overwrite, and those of the moments."""
        g_var, mean, g_own = back.var / (1 - p) ** 2, done.mean * (1 - p), back.own
        fields = [g_var, -2 * g_var * mean]  # which cancel at a large mean, before what else there is counts
        if g_own is not None:
            fields += [-g_own / (1 - p)] if back.plain else [-g_own / (1 - p), g_own]
        spread = _spread(torch.cat(fields, 1), at, x.shape[2:]) / x.shape[1]
        through = torch.addcmul(spread[:, 1:2], x.to(spread.dtype), 2 * spread[:, :1])
        if g_own is not None:
            through += spread[:, 2:3]
        if seed is not None:
            through = through.mul_(dropout_mask(x, p, seed))
        through = through.add_(g_x)
        if g_own is not None and not back.plain:
            through += spread[:, 3:]
        return through.to(x.dtype)


def _added(z: Tensor, values: Tensor, factors_o: Tensor, sign: int = 1) -> Tensor:
    """``z``, (N, O, *), and maps of one value a group, (N, G, *), times a number for each filter."""
    groups = values.shape[1]
    factors = factors_o.reshape([groups, -1] + [1] * (values.dim() - 2))
    return torch.addcmul(z.unflatten(1, (groups, -1)), values.unsqueeze(2), factors, value=sign).flatten(1, 2)


def per_filter(values_o: Tensor, at: Windows) -> Tensor:
    """(O,), shaped to go with (N, O, *)."""
    return values_o.reshape([1, -1] + [1] * len(at.kernel))


def rounds(dtype: torch.dtype) -> bool:
    """Whether results are rounded to less than statistics are taken in, so that a sum does not tell its parts."""
    return dtype.itemsize < 4


def _pixel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the channels of (N, C, *), (N, 1, *)."""
    x = widened(x)
    mean = x.mean(1, keepdim=True)
    apart = x - mean
    if channels_are_last(x):
        return mean, torch.linalg.vector_norm(apart, dim=1, keepdim=True).square_().div_(x.shape[1])
    return mean, apart.square_().mean(1, keepdim=True)


def _pools(at: Windows) -> bool:
    """Whether torch's average pooling in two dimensions has these windows."""
    pads = zip(at.kernel, at.pads, strict=True)
    return len(at.kernel) == 2 and at.dilation == (1, 1) and all(2 * pad <= k for k, (pad, _) in pads)


def _mean_over(fields: Tensor, at: Windows) -> Tensor:
    """The mean of (N, K, positions) over each window, (N, K, windows)."""
    if at.untouched:
        return fields
    if _pools(at):
        return F.avg_pool2d(fields, at.kernel, at.stride, at.symmetric or 0)
    return window_means(fields, at)


def _moments(mean: Tensor, var: Tensor, at: Windows) -> tuple[Tensor, Tensor]:
    """`combined_moments` in fewer operations where there are."""
    if at.untouched:
        return mean, var
    if not _pools(at):
        return combined_moments(mean, var, at)
    over = F.avg_pool2d(torch.cat([mean, var], 1), at.kernel, at.stride, at.symmetric or 0)
    if at.positions == 1:
        return over[:, :1], over[:, 1:]
    parts = pad(mean, at).unfold(2, at.kernel[0], at.stride[0]).unfold(3, at.kernel[1], at.stride[1])
    return over[:, :1], over[:, 1:] + (parts - over[:, :1, ..., None, None]).square_().mean((4, 5))


def _spread(fields: Tensor, at: Windows, positions: torch.Size) -> Tensor:
    """The transpose of `_mean_over`: (N, K, windows) to (N, K, positions)."""
    if at.untouched:
        return fields
    if _pools(at):
        like = fields.new_empty(()).expand(*fields.shape[:2], *positions)
        geometry = (at.kernel, at.stride, at.symmetric or (0, 0), False, True, None)
        return torch.ops.aten.avg_pool2d_backward(fields, like, *geometry)
    fields = fields / at.positions
    flat = fields.reshape(-1, 1, *fields.shape[2:])
    taps = torch.ones(1, 1, *at.kernel, dtype=fields.dtype, device=fields.device)
    pads = [before for before, _ in at.pads]
    whole = zip(positions, fields.shape[2:], at.stride, pads, at.spans, strict=True)
    rest = [size - ((windows - 1) * stride - 2 * pad + span) for size, windows, stride, pad, span in whole]
    spread = _TRANSPOSED[len(at.kernel) - 1](flat, taps, None, at.stride, pads, rest, 1, at.dilation)
    return spread.reshape(*fields.shape[:2], *positions)
