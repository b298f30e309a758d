"""KNConv as the operator ``torch.ops.anybatch.kn_conv``, for tools that know operators: torch.compile before all.

Compiled code calls it in place of the formulas, and so keeps and launches what eager code does; exported programs hold
formulas, which run anywhere. What the operator gives beside the result is for its backward, an operator too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.activations import refused_export
from anybatch.kernels.fused_kn_conv import STAGES, normalized_conv, pulled_back, refusal
from anybatch.kernels.kn_stages import Normalized, Stages, rounds
from anybatch.kernels.layouts import laid_out
from anybatch.methods.kn_conv import check_centered, convolve, filter_windows, kn_conv
from anybatch.methods.windows import Padding, Sizes, Windows


def _stages(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any, **options: Any) -> Stages:
    """Those of the first kernel that takes the arguments."""
    for kernel in kn_conv.kernels:
        if kernel.backend in STAGES and kernel.refusal(x, weight, bias, *geometry, **options) is None:
            return STAGES[kernel.backend]()
    return Stages()  # under transforms, which the kernels refuse


def _windows(weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Windows:
    pads = tuple((n, n) for n in padding)
    return Windows(tuple(weight.shape[2:]), tuple(stride), tuple(dilation), pads, "zeros")


def _or_none(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


@torch.library.custom_op("anybatch::kn_conv", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    p: float,
    eps: float,
    relu: bool,
    centered: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and the fields of `Normalized`, of no values where those are None.

    With dropout `Normalized.apart` is 0 where stages need none, since the shapes of results may not depend on them.
    """
    activation = "relu" if relu else "none"
    options = {"p": p, "seed": seed, "eps": eps, "activation": activation, "residual": residual}
    stages = _stages(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups, **options)
    at = _windows(weight, stride, padding, dilation)
    _, done = normalized_conv(stages, at, groups, x, weight, bias, residual, seed, p, eps, relu, centered)
    mean, scale = done.mean.contiguous(), done.scale.contiguous()
    if done.apart is None:
        apart = x.new_empty(0) if seed is None else torch.zeros_like(mean)
    else:
        apart = done.apart.contiguous()
    own = x.new_empty(0) if done.own is None else done.own
    y = done.y if done.own is None else laid_out(done.y, done.own)
    return y, mean, scale, apart, own


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    p: float,
    eps: float,
    relu: bool,
    centered: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = convolve(x, weight.to(x.dtype), _windows(weight, stride, padding, dilation), groups)
    field = x.new_empty((len(y), 1, *y.shape[2:]), dtype=torch.promote_types(x.dtype, torch.float32))
    apart = x.new_empty(0) if seed is None else torch.empty_like(field)
    alone = torch.empty_like(y) if residual is not None and rounds(x.dtype) else x.new_empty(0)
    return y, field, torch.empty_like(field), apart, alone


@torch.library.custom_op("anybatch::kn_conv_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    apart: Tensor,
    own: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    p: float,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``x``, weight, bias and residual, of no values where none is asked for."""
    options = {"p": p, "seed": seed, "activation": "relu" if relu else "none", "residual": residual}
    stages = _stages(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups, **options)
    at = _windows(weight, stride, padding, dilation)
    done = Normalized(y, mean, scale, _or_none(apart), _or_none(own))
    found = pulled_back(stages, at, groups, gradient, x, weight, bias, residual, seed, None, done, p, relu, needs)
    g_x = x.new_empty(0) if found.x is None else laid_out(found.x, x)
    g_weight = x.new_empty(0) if found.weight is None else laid_out(found.weight, weight)
    g_bias = x.new_empty(0) if found.bias is None else found.bias.clone()  # a part of several sums
    if found.residual is None:
        return g_x, g_weight, g_bias, x.new_empty(0)
    fresh = found.residual is not gradient  # which an operator may not return
    return g_x, g_weight, g_bias, laid_out(found.residual, y) if fresh else laid_out(gradient, y).clone()


@_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    apart: Tensor,
    own: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    p: float,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (x if needs[0] else None, weight if needs[1] else None, bias, None if residual is None else y)
    g_x, g_weight, g_bias, g_residual = (x.new_empty(0) if t is None else torch.empty_like(t) for t in wanted)
    return g_x, g_weight, g_bias, g_residual


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, seed, *geometry, p, _, relu, _ = inputs
    ctx.save_for_backward(x, weight, bias, residual, seed, *output)
    ctx.geometry, ctx.p, ctx.relu = geometry, p, relu


def _pull(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    needs = [*ctx.needs_input_grad[:2]]
    found = torch.ops.anybatch.kn_conv_backward(gradient, *ctx.saved_tensors, *ctx.geometry, ctx.p, ctx.relu, needs)
    asked = (*needs, ctx.needs_input_grad[2], ctx.needs_input_grad[3])
    return *(g if wants else None for g, wants in zip(found, asked, strict=True)), *[None] * 9


_forward.register_autograd(_pull, setup_context=_keep)


def _one_by_one(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The rule of ``vmap``: a call for each, so that parameters may differ and masks are those of the loop."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def of(i: int, given: Any, dim: Any) -> Any:
            return given if dim is None or not isinstance(given, Tensor) else given.select(dim, i)

        pairs = list(zip(args, in_dims, strict=True))
        each = [operator(*(of(i, given, dim) for given, dim in pairs)) for i in range(info.batch_size)]
        made = tuple(torch.stack(some) for some in zip(*each, strict=True))
        return made, (0,) * len(made)

    return rule


_forward.register_vmap(_one_by_one(torch.ops.anybatch.kn_conv))
_backward.register_vmap(_one_by_one(torch.ops.anybatch.kn_conv_backward))

_library = torch.library.Library("anybatch", "FRAGMENT")


def _autocast(device: str, key: str) -> None:
    """Values are rounded as autocast rounds a convolution's; filters and biases by the stages, once centered."""

    def rule(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *more: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64:
            x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return torch.ops.anybatch.kn_conv(x, weight, bias, residual, *more)

    _library.impl("kn_conv", rule, key, allow_override=True)  # by this module, imported again


_autocast("cpu", "AutocastCPU")
_autocast("cuda", "AutocastCUDA")


def _refusal(x: Tensor, *args: Any, **options: Any) -> str | None:
    if not torch.compiler.is_compiling():
        return "nothing is compiled"
    if (reason := refused_export()) is not None:
        return reason
    return refusal(x, *args, traced=True, **options)


@kn_conv.kernel("library", refusal=_refusal, first=True)
def library_kn_conv(
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
    check_centered(weight, centered)
    at = filter_windows(x, weight, stride, padding, dilation, groups, padding_mode, norm_groups, p, seed)
    geometry = (at.stride, at.symmetric, at.dilation, groups)
    how = (p, eps, activation == "relu", centered)
    return torch.ops.anybatch.kn_conv(x, weight, bias, residual, seed, *geometry, *how)[0]
