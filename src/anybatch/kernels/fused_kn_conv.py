"""KNConv with its backward in closed form: of activations it keeps its input and its output, and no other tensor.

With r = 1 / sqrt(var u' + eps), z the convolution with centered filters, own = mean u and s = sum W:
y = r (z + (own - mean u') s) + b. For the gradient g of y, behind the activation, and h = r g:

    d z = h,  d b = sum g,  d own = sum_o h_o s_o,  d mean u' = -d own,  d s = sum h (own - mean u')
    d var u' = -r^2 / 2 sum_o g_o (y_o - b_o)

The last needs the output alone, and only where g is not 0: behind a ReLU its own output does, and behind a sum what the
sum gave less what was added. Window means and variances are averages over positions of means and variances over
channels, so their gradients are spread over the positions by the transposed average.

In groups of channels each group reads a mean of its own, so that ``own`` is one map a group, which backward makes anew.
The gradient of ``x`` goes through z + own s as through the convolution with filters as they are, which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.kn_stages import Filters, Normalized, Stages
from anybatch.kernels.layouts import laid_out
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas
from anybatch.methods.kn_conv import check_bias, check_centered, check_residual, convolve, filter_windows, kn_conv
from anybatch.methods.windows import Padding, Sizes, Windows

convolution_backward = torch.ops.aten.convolution_backward

STAGES: dict[str, type[Stages]] = {"fused": Stages}
"""By backend, what its kernel strings together."""


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
    centered: bool = False,
    traced: bool = False,
) -> str | None:
    """Why the stages cannot take the arguments, ``traced`` where what traces them sees one operator."""
    if not traced and (reason := refused_tracing()) is not None:
        return reason
    if norm_groups != 1:
        return f"norm_groups={norm_groups}: statistics of one group are all it takes"
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


def normalized_conv(
    stages: Stages,
    at: Windows,
    groups: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    relu: bool,
    centered: bool = False,
) -> tuple[Filters, Normalized]:
    """The filters as backward convolves them, and the result with what backward needs of how it came about."""
    pixels = stages.pixels(x, p, seed, grouped=groups > 1)
    # Half precision rounds what was centered, and its sum is needed.
    constant = centered and weight.dtype == x.dtype and x.dtype.itemsize >= 4
    filters = Filters(weight, weight.new_zeros(len(weight)), None) if constant else stages.filters(weight, x.dtype)
    z = convolve(x, filters.convolved, at, groups)
    if residual is not None:
        check_residual(residual, z.shape)
    own = None
    if stages.centers and groups > 1 and not constant:
        own = stages.group_means(x, at, groups, z)
    done = stages.normalized(z, pixels, filters, own, bias, residual, at, p, eps, relu)
    return _of_backward(filters, stages, groups, weight), done


def _of_backward(filters: Filters, stages: Stages, groups: int, weight: Tensor) -> Filters:
    """What backward convolves, before it is rounded as the activations are."""
    return filters._replace(convolved=weight, rest=None) if groups > 1 or not stages.centers else filters


class Gradients(NamedTuple):
    """None where none is asked for."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def pulled_back(
    stages: Stages,
    at: Windows,
    groups: int,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    filters: Filters | None,
    done: Normalized,
    p: float,
    relu: bool,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients, of the input and the weight as ``needs`` says.

    Args:
        filters: Those of `normalized_conv`; None to make them anew.
    """
    if filters is None:
        filters = _of_backward(stages.filters(weight, x.dtype), stages, groups, weight)
    gradient = laid_out(gradient, done.y)  # an expanded one, say
    own = stages.group_means(x, at, groups, done.y) if stages.centers and groups > 1 else None
    back = stages.pulled(gradient, done, filters.total, own, bias, residual, at, relu)
    geometry = (at.stride, at.symmetric, at.dilation, False, [0] * len(at.kernel), groups)
    wanted = (*needs, False)
    g_x, g_convolved, _ = convolution_backward(back.z, x, filters.convolved.to(x.dtype), None, *geometry, wanted)
    g_weight = None if g_convolved is None else stages.through_filters(g_convolved, back.total, weight.dtype)
    if g_x is not None:
        g_x = stages.through_moments(g_x, x, done, back, at, p, seed)
    g_bias = None if bias is None else back.bias.to(bias.dtype)
    return Gradients(g_x, g_weight, g_bias, None if residual is None else back.residual)


class _KNConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stages: Stages,
        call: Callable[..., Tensor],
        at: Windows,
        groups: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: float,
        eps: float,
        relu: bool,
        centered: bool,
    ) -> Tensor:
        filters, done = normalized_conv(stages, at, groups, x, weight, bias, residual, seed, p, eps, relu, centered)
        ctx.stages, ctx.call, ctx.at, ctx.groups, ctx.p, ctx.relu = stages, call, at, groups, p, relu
        kept = filters if stages.keeps_filters else (None, None, None)
        ctx.save_for_backward(x, weight, bias, residual, seed, *kept, *done)
        return done.y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            x, weight, bias, residual, seed, convolved, total, rest, *kept = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                "what a KNConv gave, took or added was overwritten before backward, as nn.ReLU(inplace=True) behind it "
                "does, or out += skip; let these give new tensors, or the layer do them: "
                "layer.take_activation(nn.ReLU()), layer(x, skip)"
            ) from error
        tensors = (x, weight, bias, residual, seed)
        if taken_in_formulas(gradient):  # second derivatives
            again = recomputed_gradients(ctx.call, tensors, gradient, ctx.needs_input_grad[4:9])
            return *[None] * 4, *again, *[None] * 4
        filters = None if convolved is None else Filters(convolved, total, rest)
        options = (filters, Normalized(*kept), ctx.p, ctx.relu, ctx.needs_input_grad[4:6])
        found = pulled_back(ctx.stages, ctx.at, ctx.groups, gradient, *tensors, *options)
        return *[None] * 4, *found, *[None] * 5


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
    centered: bool = False,
) -> Tensor:
    """`anybatch.functional.kn_conv` of arguments that `refusal` does not refuse, by some backend's stages."""
    at = filter_windows(x, weight, stride, padding, dilation, groups, padding_mode, norm_groups, p, seed)
    check_centered(weight, centered)
    check_bias(bias, weight)
    options = {"p": p, "eps": eps, "activation": activation, "centered": centered}

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None) -> Tensor:
        more = {**options, "seed": seed, "residual": residual}
        return kn_conv.reference(x, weight, bias, stride, padding, dilation, groups, **more)

    relu = activation == "relu"
    return _KNConv.apply(stages, call, at, groups, x, weight, bias, residual, seed, p, eps, relu, centered)  # pyright: ignore[reportReturnType]
