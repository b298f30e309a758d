"""KNConv's stages in C, for float32 on the CPU: two calls beside the convolution forward and three backward.

The gradient of ``x`` is taken through the weight as it is: with K values in a window that adds ``sum_o h_o s_o / K`` of
each window to all its values, which is what the mean's own gradient takes away where there is no dropout. So the
filters need not be centered again.
"""

from __future__ import annotations

import functools
import threading
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
    if (reason := refused_native(x)) or (reason := refused_by_formulas(x, weight, bias, *args, **options)):
        return reason
    if not 3 <= x.dim() <= 5:
        return f"x of shape {tuple(x.shape)} is no map of one to three dimensions"
    if bias is not None and bias.dtype != x.dtype:
        return f"bias is {bias.dtype}"
    if (seed := options.get("seed")) is not None and seed.device.type != "cpu":
        return f"seed is on {seed.device.type}"
    return None if passes(x) else "x is neither contiguous nor channels last"


@functools.lru_cache(4096)
def _windows(sizes: torch.Size, windows: torch.Size, at: Windows) -> Any:
    return numbers(*three(sizes), *three(windows), *places(at))


class _Scratch(threading.local):
    """Memory of a thread for filters that are convolved at once: what is fresh would cost more than centering them."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def like(self, weight: Tensor) -> Tensor:
        """A tensor laid out as a dense weight is, until the next is asked for."""
        if self.memory.numel() < weight.numel():
            self.memory = weight.new_empty(weight.numel())
        return self.memory.as_strided(weight.shape, weight.stride())


_scratch = _Scratch()


def _fields(like: Tensor, positions: torch.Size) -> Tensor:
    return like.new_empty((like.shape[0], 1, *positions))


class NativeStages(Stages):
    pulls_by_weight = True

    def pixels(self, x: Tensor, p: float, seed: Tensor | None) -> Pixels:
        mean, var = _fields(x, x.shape[2:]), _fields(x, x.shape[2:])
        own = None if seed is None else torch.empty_like(mean)
        to = (mean, var, own)
        function("kn_pixels", "pppippp")(as_map(x.shape, x.stride()), x, seed, dropout_threshold(p), *to)
        return Pixels(mean, var, own)

    def filters(self, weight: Tensor, dtype: torch.dtype) -> Filters:
        weight = filters_as_rows(weight)
        filters = weight.shape[0]
        centered, total = _scratch.like(weight), weight.new_empty(filters)
        function("kn_filters", "iippp")(filters, weight.numel() // filters, weight, centered, total)
        return Filters(centered, total, None)

    def normalized(
        self,
        z: Tensor,
        pixels: Pixels,
        filters: Filters,
        bias: Tensor | None,
        residual: Tensor | None,
        at: Windows,
        p: float,
        eps: float,
        relu: bool,
    ) -> Normalized:
        z = z if passes(z) else z.contiguous()
        mean, scale = _fields(z, z.shape[2:]), _fields(z, z.shape[2:])
        apart = None if pixels.own is None else torch.empty_like(mean)
        beside = None if residual is None else laid_out(residual, z)
        windows = _windows(pixels.mean.shape[2:], z.shape[2:], at)
        of_pixels = (pixels.mean, pixels.var, pixels.own)
        more = (filters.total, bias, beside, p, eps, relu)
        function("kn_normalized", "pppppppppddippp")(
            *(as_map(z.shape, z.stride()), windows, z, *of_pixels, *more),
            *(mean, scale, apart),
        )
        return Normalized(z, mean, scale, apart, None)

    def pulled(
        self,
        gradient: Tensor,
        done: Normalized,
        total: Tensor,
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
        g_bias, g_total = total.new_empty((2, total.shape[0])).unbind()
        drops = done.apart is not None
        given = (gradient, y, beside, bias, total)
        to = (h, masked, g_var, g_own, g_bias, g_total if drops else None)
        function("kn_pulled", "ppppppppipppppp")(
            *(as_map(y.shape, y.stride()), *given, done.scale, done.apart, relu),
            *to,
        )
        return Pulled(gradient if masked is None else masked, h, g_var, g_own, g_bias, g_total if drops else None)

    def through_filters(self, g_centered: Tensor, g_total: Tensor | None, dtype: torch.dtype) -> Tensor:
        g = filters_as_rows(g_centered)
        filters = g.shape[0]
        function("kn_through_filters", "iipp")(filters, g.numel() // filters, g, g_total)
        return g

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
