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
from torch import Tensor

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.kn_stages import Filters, Normalized, Stages
from anybatch.kernels.recompute import recomputed_gradients
from anybatch.methods.kn_conv import check_residual, convolve, filter_windows, kn_conv
from anybatch.methods.windows import Padding, Sizes, Windows


def refusal(
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


class _KNConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stages: Stages,
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
        pixels = stages.pixels(x, p, seed)
        filters = stages.filters(weight, x.dtype)
        z = convolve(x, filters.centered, at, 1)
        if residual is not None:
            check_residual(residual, z.shape)
        done = stages.normalized(z, pixels, filters, bias, residual, at, p, eps, relu)
        ctx.stages, ctx.call, ctx.at, ctx.p, ctx.relu = stages, call, at, p, relu
        kept = filters if stages.keeps_filters else (None, filters.total if stages.pulls_by_weight else None, None)
        ctx.save_for_backward(x, weight, bias, residual, seed, *kept, *done)
        return done.y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            x, weight, bias, residual, seed, centered, total, rest, *kept = ctx.saved_tensors
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
            return None, None, None, *recomputed_gradients(ctx.call, tensors, gradient), None, None, None
        at, stages, done = ctx.at, ctx.stages, Normalized(*kept)
        if gradient.stride() != done.y.stride():  # expanded, say
            gradient = torch.empty_like(done.y).copy_(gradient)
        if centered is None and not stages.pulls_by_weight:
            centered, total, rest = stages.filters(weight, x.dtype)
        filters = Filters(weight if centered is None else centered, total, rest)
        back = stages.pulled(gradient, done, filters.total, bias, residual, at, ctx.relu)
        needed = (*ctx.needs_input_grad[3:5], False)
        geometry = (at.stride, at.symmetric, at.dilation, False, [0] * len(at.kernel), 1)
        g_x, g_centered, _ = torch.ops.aten.convolution_backward(back.z, x, filters.centered, None, *geometry, needed)
        g_weight = None if g_centered is None else stages.through_filters(g_centered, back.total, weight.dtype)
        if g_x is not None:
            g_x = stages.through_moments(g_x, x, done, back, at, ctx.p, seed)
        g_bias = None if bias is None else back.bias.to(bias.dtype)
        return None, None, None, g_x, g_weight, g_bias, None if residual is None else back.residual, *[None] * 4


@kn_conv.kernel("fused", refusal=refusal)
def fused_kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    **options: Any,
) -> Tensor:
    return kn_conv_in_stages(Stages(), x, weight, bias, stride, padding, dilation, groups, **options)


def kn_conv_in_stages(
    stages: Stages,
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
    """`anybatch.functional.kn_conv` of arguments that `refusal` does not refuse, by some backend's stages."""
    at = filter_windows(x, weight, stride, padding, dilation, groups, padding_mode, norm_groups, p, seed)
    options = {"p": p, "eps": eps, "activation": activation}

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None) -> Tensor:
        more = {**options, "seed": seed, "residual": residual}
        return kn_conv.reference(x, weight, bias, stride, padding, dilation, **more)

    relu = activation == "relu"
    return _KNConv.apply(stages, call, at, x, weight, bias, residual, seed, p, eps, relu)  # pyright: ignore[reportReturnType]
