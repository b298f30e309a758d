"""KNConv's stages in C, for float32 on the CPU: three calls beside the convolution forward and two backward.

They convolve with the filters as they are, and take ``mean u' sum W_o`` off behind: with r = 1 / sqrt(var u' + eps) and
s = sum W, ``y = r (conv(x, W) - mean u' s) + b``. Centered filters would have to be written and read once more, which
at few and small images costs as much as all else here; in float32 what cancels is what a convolution and BatchNorm
cancel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.fused_kn_conv import STAGES, kn_conv_in_stages
from anybatch.kernels.fused_kn_conv import refusal as refused_by_formulas
from anybatch.kernels.kn_stages import Filters, Normalized, Pixels, Pulled, Stages
from anybatch.kernels.layouts import filters_as_rows, laid_out, places, three
from anybatch.kernels.native_common import as_map, function, numbers, passes, refused_native
from anybatch.methods.kernel_norm import dropout_threshold
from anybatch.methods.kn_conv import kn_conv
from anybatch.methods.windows import Windows


def _refusal(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> str | None:
    if reason := refused_native(x):
        return reason
    if reason := refused_by_formulas(x, weight, bias, *args, **options):
        return reason
    if not 3 <= x.dim() <= 5:
        return f"x of shape {tuple(x.shape)} is no map of one to three dimensions"
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return "bias is not one number of the dtype of x for each filter, one behind the other"
    if not weight.numel():
        return "there are no filters"
    if (seed := options.get("seed")) is not None and seed.device.type != "cpu":
        return f"seed is on {seed.device.type}"
    return None if passes(x) else "x is neither contiguous nor channels last"


@functools.lru_cache(4096)
def _windows(sizes: torch.Size, windows: torch.Size, at: Windows) -> Any:
    return numbers(*three(sizes), *three(windows), *places(at))


def _fields(like: Tensor, positions: torch.Size) -> Tensor:
    return like.new_empty((like.shape[0], 1, *positions))


class NativeStages(Stages):
    centers = False
    keeps_filters = True  # of which the weight itself is one and their sums are few

    def pixels(self, x: Tensor, p: float, seed: Tensor | None, grouped: bool) -> Pixels:
        mean, var = _fields(x, x.shape[2:]), _fields(x, x.shape[2:])
        function("kn_pixels", "pppipp")(as_map(x.shape, x.stride()), x, seed, dropout_threshold(p), mean, var)
        return Pixels(mean, var, None)

    def filters(self, weight: Tensor, dtype: torch.dtype) -> Filters:
        rows, total = filters_as_rows(weight), weight.new_empty(len(weight))
        function("kn_sums", "iipp")(len(rows), rows.numel() // len(rows), rows, total)
        return Filters(weight, total, None)

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
        z = z if passes(z) else z.contiguous()
        mean, scale = _fields(z, z.shape[2:]), _fields(z, z.shape[2:])
        beside = None if residual is None else laid_out(residual, z)
        windows = _windows(pixels.mean.shape[2:], z.shape[2:], at)
        given = (z, pixels.mean, pixels.var, filters.total, bias, beside, p, eps, relu)
        function("kn_normalized", "ppppppppddipp")(as_map(z.shape, z.stride()), windows, *given, mean, scale)
        return Normalized(z, mean, scale, None, None)

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
        y = done.y
        beside = None if residual is None else laid_out(residual, y)
        h = torch.empty_like(y)
        masked = torch.empty_like(y) if relu and residual is not None else None
        g_var, g_own = torch.empty_like(done.mean), torch.empty_like(done.mean)
        g_bias, g_total = torch.empty_like(total), torch.empty_like(total)
        given = (gradient, y, beside, bias, total, done.scale, done.mean, relu)
        to = (h, masked, g_var, g_own, g_bias, g_total)
        function("kn_pulled", "ppppppppipppppp")(as_map(y.shape, y.stride()), *given, *to)
        return Pulled(gradient if masked is None else masked, h, g_var, g_own, g_bias, g_total, True)

    def through_filters(self, g_convolved: Tensor, g_total: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert g_total is not None
        return g_convolved.add_(g_total.view(-1, *[1] * (g_convolved.dim() - 1)))

    def through_moments(
        self, g_x: Tensor, x: Tensor, done: Normalized, back: Pulled, at: Windows, p: float, seed: Tensor | None
    ) -> Tensor:
        g_x = laid_out(g_x, x)
        windows = _windows(x.shape[2:], done.mean.shape[2:], at)
        function("kn_through_moments", "ppppppppdpi")(
            *(as_map(g_x.shape, g_x.stride()), as_map(x.shape, x.stride()), windows, g_x, x),
            *(done.mean, back.var, back.own, p, seed, dropout_threshold(p)),
        )
        return g_x


STAGES["native"] = NativeStages


@kn_conv.kernel("native", refusal=_refusal, first=True)
def native_kn_conv(x: Tensor, *args: Any, **options: Any) -> Tensor:
    return kn_conv_in_stages(NativeStages(), x, *args, **options)
