"""KNConv with its backward in closed form: of activations it keeps its input and its output, and no other tensor.

With r = 1 / sqrt(var u' + eps), z the convolution with centered filters, own = mean u and s = sum W:
y = r (z + (own - mean u') s) + b. For the gradient g of y, behind the activation, and h = r g:

    d z = h,  d b = sum g,  d own = sum_o h_o s_o,  d mean u' = -d own,  d s = sum h (own - mean u')
    d var u' = -r^2 / 2 sum_o g_o (y_o - b_o)

The last needs the output alone, and only where g is not 0: behind a ReLU its own output does, and behind a sum what the
sum gave less what was added. Window means and variances are averages over positions of means and variances over
channels, so their gradients are spread over the positions by the transposed average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.compiled import helper
from anybatch.kernels.recompute import recomputed_gradients
from anybatch.methods.common import activated, widened
from anybatch.methods.kernel_norm import dropout_mask
from anybatch.methods.kn_conv import check_residual, convolve, filter_windows, kn_conv
from anybatch.methods.windows import Padding, Sizes, Windows, channels_are_last, combined_moments, pad, window_means

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _refusal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    norm_groups: int = 1,
    p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
) -> str | None:
    if (reason := refused_tracing()) is not None:
        return reason
    if groups != 1:
        return f"groups={groups}: statistics of one group are all it takes"
    if activation not in ("none", "relu"):
        return f"activation={activation!r} cannot be undone from its output"
    if p and seed is None:
        return "moments expected over masks are for evaluation"
    if x.dim() != weight.dim() or (x.dtype != weight.dtype and x.dtype.itemsize >= 4):
        return "x and weight differ in their dimensions or dtypes"
    if not x.is_floating_point():
        return "x is not floating point"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype}, which makes the sum another dtype than x, {x.dtype}"
    if padding_mode != "zeros" or padding == "same" or not isinstance(padding, (int, str, tuple, list)):
        return f"padding={padding!r} in mode {padding_mode!r}: it adds zeros, as many on both sides"
    if isinstance(padding, (tuple, list)) and not all(isinstance(n, int) for n in padding):
        return "the sides are padded differently"
    return None


@helper
def _pixel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the channels of (N, C, *), (N, 1, *)."""
    x = widened(x)
    mean = x.mean(1, keepdim=True)
    apart = x - mean
    if channels_are_last(x):
        return mean, torch.linalg.vector_norm(apart, dim=1, keepdim=True).square_().div_(x.shape[1])
    return mean, apart.square_().mean(1, keepdim=True)


@helper
def _epilogue(
    z: Tensor, scale: Tensor, shift: Tensor | None, residual: Tensor | None, relu: bool, dtype: torch.dtype
) -> Tensor:
    """``relu(z * scale + shift + residual)``, rounded before the sum."""
    wide = z.to(scale.dtype)
    y = (wide * scale if shift is None else torch.addcmul(shift, wide, scale)).to(dtype)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


@helper
def _through_epilogue(
    gradient: Tensor, y: Tensor, residual: Tensor | None, bias: Tensor | None, scale: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients g in front of the activation and ``g * scale``, and ``sum_o g_o (y_o - residual_o - b_o)``."""
    g = torch.ops.aten.threshold_backward(gradient, y, 0) if relu else gradient
    wide = g.to(scale.dtype)
    own = y.to(scale.dtype, copy=residual is None and bias is None)
    if residual is not None:
        own = own - residual
    if bias is not None:
        own = own - bias if residual is None else own.sub_(bias)
    return g, (wide * scale).to(g.dtype), own.mul_(wide).sum(1, keepdim=True)


@helper
def _with_statistics(g_x: Tensor, x: Tensor, mask: Tensor | None, slope: Tensor, offset: Tensor) -> Tensor:
    """``g_x + mask * (slope * x + offset)``."""
    through = torch.addcmul(offset, x.to(slope.dtype), slope)
    if mask is not None:
        through = through.mul_(mask)
    return through.add_(g_x).to(x.dtype)


def _centered(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The centered filters, and their means in float32 or wider."""
    w = widened(weight).to(torch.promote_types(dtype, torch.float32))
    w_mean = w.mean(tuple(range(1, w.dim())), keepdim=True)
    return (w - w_mean).to(dtype), w_mean


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


class _KNConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Tensor],
        at: Windows,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        pixels = _pixel_moments(x)
        mask = None if seed is None else dropout_mask(x, p, seed)
        mean, var = _moments(*(pixels if mask is None else _pixel_moments(x * mask)), at)
        if p:
            mean, var = mean / (1 - p), var / (1 - p) ** 2
        scale = torch.rsqrt(var + eps)
        filters, w_mean = _centered(weight, x.dtype)
        z = convolve(x, filters, at, 1)
        # What is added to z, a map of one value a position for each filter: nothing in float32 without dropout.
        beside = [1, -1] + [1] * len(at.kernel)
        own = mean if mask is None else _mean_over(pixels[0], at)
        if filters.dtype != wide:
            rest = filters.to(wide).flatten(1).sum(1)
            z = torch.addcmul(z.to(wide), own, rest.reshape(beside), value=-1)
        total = w_mean.flatten() * weight[0].numel()
        if mask is not None:
            z = torch.addcmul(z.to(wide), own - mean, total.reshape(beside))
        shift = None if bias is None else bias.to(wide).reshape(beside)
        if residual is not None:
            check_residual(residual, z.shape)
        y = _epilogue(z, scale, shift, residual, relu, x.dtype)
        ctx.call, ctx.at, ctx.p, ctx.relu = call, at, p, relu
        ctx.save_for_backward(x, weight, bias, residual, seed, mean, scale, y, None if mask is None else own - mean)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            x, weight, bias, residual, seed, mean, scale, y, apart = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                "what a KNConv gave, took or added was overwritten before backward, as nn.ReLU(inplace=True) behind it "
                "does, or out += skip; let these give new tensors, or the layer do them: "
                "layer.take_activation(nn.ReLU()), layer(x, skip)"
            ) from error
        if torch.is_grad_enabled():  # second derivatives
            tensors = (x, weight, bias, residual, seed)
            return None, None, *recomputed_gradients(ctx.call, tensors, gradient), None, None, None
        at, wide = ctx.at, scale.dtype
        shift = None if bias is None else bias.to(wide).reshape([1, -1] + [1] * len(at.kernel))
        if gradient.stride() != y.stride():  # expanded, say
            gradient = torch.empty_like(y).copy_(gradient)
        g, h, along = _through_epilogue(gradient, y, residual, shift, scale, ctx.relu)
        over = (0, *range(2, g.dim()))
        g_bias = None if bias is None or not ctx.needs_input_grad[4] else g.sum(over, dtype=wide).to(bias.dtype)
        filters, w_mean = _centered(weight, x.dtype)
        needed = (*ctx.needs_input_grad[2:4], False)
        geometry = (at.stride, at.symmetric, at.dilation, False, [0] * len(at.kernel), 1)
        g_x, g_filters, _ = torch.ops.aten.convolution_backward(h, x, filters, None, *geometry, needed)
        g_weight = None if g_filters is None else g_filters.to(wide)
        if g_weight is not None:
            g_weight -= g_weight.mean(tuple(range(1, weight.dim())), keepdim=True)
        g_var = -0.5 * scale.square() * along
        g_own = None
        if apart is not None:
            h = h.to(wide)
            if g_weight is not None:
                g_weight += (h * apart).sum(over).reshape(-1, *[1] * (weight.dim() - 1))
            total = w_mean.flatten() * weight[0].numel()
            g_own = (h * total.reshape([1, -1] + [1] * len(at.kernel))).sum(1, keepdim=True)
        if g_x is not None:
            channels = x.shape[1]
            g_mean = 0 if g_own is None else -g_own / (1 - ctx.p)
            g_var, mean = g_var / (1 - ctx.p) ** 2, mean * (1 - ctx.p)
            fields = [g_var, g_mean - 2 * g_var * mean]
            if g_own is not None:
                fields.append(g_own)
            spread = _spread(torch.cat(fields, 1), at, x.shape[2:]) / channels
            slope, offset = 2 * spread[:, :1], spread[:, 1:2]
            mask = None if seed is None else dropout_mask(x, ctx.p, seed)
            g_x = _with_statistics(g_x, x, mask, slope, offset)
            if g_own is not None:
                g_x += spread[:, 2:]
        g_weight = None if g_weight is None else g_weight.to(weight.dtype)
        return None, None, g_x, g_weight, g_bias, None if residual is None else g, *[None] * 4


@kn_conv.kernel("fused", refusal=_refusal)
def fused_kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    norm_groups: int = 1,
    p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    at = filter_windows(x, weight, stride, padding, dilation, groups, padding_mode, norm_groups, p, seed)
    if residual is not None and x.dtype.itemsize < 4:
        # A rounded sum does not tell what the convolution gave where that is the smaller part.
        y = fused_kn_conv(x, weight, bias, stride, padding, dilation, p=p, seed=seed, eps=eps)
        check_residual(residual, y.shape)
        return activated(y + residual, activation)
    options = {"p": p, "eps": eps, "activation": activation}

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None) -> Tensor:
        more = {**options, "seed": seed, "residual": residual}
        return kn_conv.reference(x, weight, bias, stride, padding, dilation, **more)

    return _KNConv.apply(call, at, x, weight, bias, residual, seed, p, eps, activation == "relu")  # pyright: ignore[reportReturnType]
