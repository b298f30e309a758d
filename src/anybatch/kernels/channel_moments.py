"""Norms by each channel's moments: group, layer and instance normalization and Batch-Channel Norm, activation included.

All of them are ``y = act((x - mean) * scale + shift)`` with (N, C) numbers, from the mean and the variance of each
channel of each sample; they differ in how the scale and the shift follow from those. Backward takes the sums of
``g``, the gradient in front of the activation, and of ``g * (x - mean)``, and is ``a * g + p * (x - mean) + q`` with
(N, C) numbers again. Kept are ``x``, the parameters and the moments; the activation's input is computed anew.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch.kernels.activations import activated_in_place, activation_gradient, refused_activation, refused_tracing
from anybatch.kernels.recompute import recomputed_gradients, several_at_once
from anybatch.kernels.torch_group_norm import refusal as torch_refusal
from anybatch.kernels.torch_group_norm import refused_groups
from anybatch.methods.batch_channel_norm import batch_channel_norm, by_channel
from anybatch.methods.batch_norm import sharing
from anybatch.methods.common import widened
from anybatch.methods.group_norm import group_norm


class _Passes:
    """Passes over (N, C, *) in formulas that every device and derivative takes."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.size = math.prod(x.shape[2:])

    def moments(self) -> tuple[Tensor, Tensor]:
        """(N, C) and (N, C): mean and biased variance."""
        mean = self.total(self.x) / self.size
        return mean, self.total((self.x - self.spread(mean)).square()) / self.size

    def affine(self, mean_nc: Tensor, scale_nc: Tensor, shift_nc: Tensor) -> Tensor:
        return (self.x - self.spread(mean_nc)) * self.spread(scale_nc) + self.spread(shift_nc)

    def sums(self, g: Tensor, mean_nc: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) and (N, C): of ``g``, and of ``g * (x - mean)``."""
        return self.total(g), self.total(g * (self.x - self.spread(mean_nc)))

    def combined(self, g: Tensor, mean_nc: Tensor, a_nc: Tensor, p_nc: Tensor, q_nc: Tensor) -> Tensor:
        """``a * g + p * (x - mean) + q``."""
        centered = self.x - self.spread(mean_nc)
        return self.spread(a_nc) * g + self.spread(p_nc) * centered + self.spread(q_nc)

    def output(self, mean_nc: Tensor, scale_nc: Tensor, shift_nc: Tensor, activation: str) -> Tensor:
        return activated_in_place(self.affine(mean_nc, scale_nc, shift_nc), activation)

    def gradient_and_sums(
        self, g: Tensor, mean_nc: Tensor, scale_nc: Tensor, shift_nc: Tensor, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient in front of the activation, and its sums."""
        if activation != "none":
            g = activation_gradient(g, self.affine(mean_nc, scale_nc, shift_nc), activation)
        return g, *self.sums(g, mean_nc)

    def total(self, t: Tensor) -> Tensor:
        return t.flatten(2).sum(2) if t.dim() > 2 else t

    def spread(self, values_nc: Tensor) -> Tensor:
        return values_nc.reshape(*values_nc.shape, *(1 for _ in self.x.shape[2:]))


class _Rows(_Passes):
    """A contiguous tensor on the CPU: a channel is a row, which torch's batch normalization takes for a channel."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.x_1rs = self._rows(x)
        self.zeros_r = x.new_zeros(self.x_1rs.shape[1])
        self.ones_r = x.new_ones(self.x_1rs.shape[1])

    def _rows(self, t: Tensor) -> Tensor:
        return t.reshape(1, t.shape[0] * t.shape[1], -1)

    def moments(self) -> tuple[Tensor, Tensor]:
        shape = self.x.shape[:2]
        mean_1r1 = self.x_1rs.mean(2, keepdim=True)
        centered = self.x_1rs - mean_1r1
        off, squares = _batch_norm_sums(centered, centered, self.zeros_r, self.ones_r)
        off, squares = off / self.size, squares / self.size  # off is what the mean's rounding left
        return (mean_1r1.flatten() + off).view(shape), (squares - off * off).clamp_min_(0).view(shape)

    def affine(self, mean_nc: Tensor, scale_nc: Tensor, shift_nc: Tensor) -> Tensor:
        start = shift_nc - mean_nc * scale_nc  # here, since torch's own may round it in two ways, as the batch is long
        statistics = (self.zeros_r, self.ones_r)
        y = torch.native_batch_norm(self.x_1rs, scale_nc.flatten(), start.flatten(), *statistics, False, 0.0, 0.0)[0]
        # Not a view to autograd, so that an activation in place may follow.
        return torch.ops.aten._unsafe_view(y, self.x.shape)

    def sums(self, g: Tensor, mean_nc: Tensor) -> tuple[Tensor, Tensor]:
        found = _batch_norm_sums(self._rows(g), self.x_1rs, mean_nc.flatten(), self.ones_r)
        return found[0].view(mean_nc.shape), found[1].view(mean_nc.shape)

    def combined(self, g: Tensor, mean_nc: Tensor, a_nc: Tensor, p_nc: Tensor, q_nc: Tensor) -> Tensor:
        # Torch's addcmul takes twice as long as both where the factor is one number a row.
        return self.affine(mean_nc, p_nc, q_nc).add_(g * self.spread(a_nc))


class _Columns(_Passes):
    """A tensor on the CPU with channels last: torch's batch normalization of one sample takes its moments."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.x_nsc = self._columns(x)

    def _columns(self, t: Tensor) -> Tensor:
        return t.movedim(1, -1).reshape(t.shape[0], -1, t.shape[1])

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.x_nsc.mean(1)
        # Its own mean adds up in the order of positions and is less exact; its variance is the one around that mean.
        found = [torch.batch_norm_update_stats(x_sc, None, None, 0.0) for x_sc in self.x_nsc]
        off = torch.stack([m for m, _ in found]) - mean
        return mean, (torch.stack([v for _, v in found]) - off * off).clamp_min_(0)

    def affine(self, mean_nc: Tensor, scale_nc: Tensor, shift_nc: Tensor) -> Tensor:
        start = shift_nc - mean_nc * scale_nc
        return torch.addcmul(self.spread(start), self.x, self.spread(scale_nc))

    def sums(self, g: Tensor, mean_nc: Tensor) -> tuple[Tensor, Tensor]:
        ones_c = mean_nc.new_ones(mean_nc.shape[1])
        samples = zip(self._columns(g), self.x_nsc, mean_nc, strict=True)
        found = [_batch_norm_sums(g_sc, x_sc, mean_c, ones_c) for g_sc, x_sc, mean_c in samples]
        return torch.stack([s for s, _ in found]), torch.stack([s for _, s in found])

    def combined(self, g: Tensor, mean_nc: Tensor, a_nc: Tensor, p_nc: Tensor, q_nc: Tensor) -> Tensor:
        return self.affine(mean_nc, p_nc, q_nc).addcmul_(g, self.spread(a_nc))


def _batch_norm_sums(g: Tensor, x: Tensor, mean_c: Tensor, ones_c: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``g`` and of ``g * (x - mean)``: the gradients of batch normalization's shift and scale."""
    given = (ones_c, mean_c, ones_c, mean_c, ones_c)  # the scale, and both kinds of statistics
    _, along, total = torch.ops.aten.native_batch_norm_backward(g, x, *given, False, 0.0, [False, True, True])
    return total, along


def _passes(x: Tensor) -> _Passes:
    x = widened(x)
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.numel() > 0
    if not plain or torch.is_grad_enabled():
        return _Passes(x)
    if x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return _Columns(x)
    return _Rows(x.contiguous())


class _Batch(NamedTuple):
    """The batch part of Batch-Channel Norm, ``z = (x - mean) * scale + bias``; each (C,)."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    scale: Tensor
    bias: Tensor | None


def _batch(
    mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, wide: torch.dtype
) -> _Batch | None:
    if mean is None or var is None:
        return None
    rstd = torch.rsqrt(var.to(wide) + eps)
    weight = _as(wide, weight)
    return _Batch(mean.to(wide), rstd, weight, rstd if weight is None else rstd * weight, _as(wide, bias))


def _as(wide: torch.dtype, values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(wide)


class _Numbers(NamedTuple):
    """What group normalization of channels with known moments comes down to; ``z`` is what is normalized."""

    scale_nc: Tensor  # of x
    shift_nc: Tensor
    scale_z_nc: Tensor
    off_ngd: Tensor  # a channel's mean from its group's
    rstd_ng1: Tensor


def _numbers(
    mean_nc: Tensor,
    var_nc: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: _Batch | None,
    eps: float,
) -> _Numbers:
    if batch is not None:
        mean_nc = (mean_nc - batch.mean) * batch.scale
        mean_nc = mean_nc if batch.bias is None else mean_nc + batch.bias
        var_nc = var_nc * batch.scale.square()
    mean_ngd = mean_nc.unflatten(1, (groups, -1))
    off = mean_ngd - mean_ngd.mean(2, keepdim=True)
    var = (var_nc.unflatten(1, (groups, -1)) + off.square()).mean(2, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    scale = rstd.expand_as(off).flatten(1)
    scale = scale if weight is None else scale * weight
    shift = off.flatten(1) * scale
    shift = shift if bias is None else shift + bias
    return _Numbers(scale if batch is None else scale * batch.scale, shift, scale, off, rstd)


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        batch_mean: Tensor | None,
        batch_var: Tensor | None,
        batch_weight: Tensor | None,
        batch_bias: Tensor | None,
        eps: float,
        activation: str,
    ) -> Tensor:
        passes = _passes(x)
        mean_nc, var_nc = passes.moments()
        wide = mean_nc.dtype
        batch = _batch(batch_mean, batch_var, batch_weight, batch_bias, eps, wide)
        numbers = _numbers(mean_nc, var_nc, groups, _as(wide, weight), _as(wide, bias), batch, eps)
        ctx.groups, ctx.eps, ctx.activation = groups, eps, activation
        kept = () if passes.size == 1 else (mean_nc, var_nc, *numbers)  # of one position they are as large as x
        ctx.save_for_backward(x, weight, bias, batch_mean, batch_var, batch_weight, batch_bias, *kept)
        return passes.output(mean_nc, numbers.scale_nc, numbers.shift_nc, activation).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, batch_mean, batch_var, batch_weight, batch_bias, *kept = ctx.saved_tensors
        given = (batch_mean, batch_var, batch_weight, batch_bias)
        if several_at_once(gradient):
            formulas = partial(_formulas, groups=ctx.groups, eps=ctx.eps, activation=ctx.activation)
            g_x, *found = recomputed_gradients(formulas, (x, weight, bias, *given), gradient)
            return g_x, None, *found, None, None
        passes = _passes(x)
        wide = passes.x.dtype
        batch = _batch(*given, eps=ctx.eps, wide=wide)
        wide_weight = _as(wide, weight)
        if not kept or torch.is_grad_enabled():  # second derivatives need them as functions of x
            mean_nc, var_nc = passes.moments()
            numbers = _numbers(mean_nc, var_nc, ctx.groups, wide_weight, _as(wide, bias), batch, ctx.eps)
        else:
            mean_nc, var_nc, *others = kept
            numbers = _Numbers(*others)
        g, total_nc, along_nc = passes.gradient_and_sums(
            widened(gradient), mean_nc, numbers.scale_nc, numbers.shift_nc, ctx.activation
        )
        g_weight, p_nc, q_nc = _coefficients(total_nc, along_nc, numbers, wide_weight, batch, passes.size)
        g_batch = (None, None, None, None)
        if batch is not None:
            g_batch = _batch_gradients(
                batch, numbers.scale_z_nc, p_nc, q_nc, mean_nc, var_nc, total_nc, along_nc, passes.size
            )
            p_nc, q_nc = p_nc * batch.scale.square(), q_nc * batch.scale
        g_x = passes.combined(g, mean_nc, numbers.scale_nc, p_nc, q_nc) if ctx.needs_input_grad[0] else None
        found = (g_x, None, g_weight, total_nc.sum(0), *g_batch)
        return *_like((x, None, weight, bias, *given), found), None, None


def _formulas(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *batch: Tensor | None, groups: int, **options: Any
) -> Tensor:
    if batch[0] is None:
        return group_norm.reference(x, groups, weight, bias, **options)
    return batch_channel_norm.reference(x, groups, *batch, weight, bias, **options)


def _coefficients(
    total_nc: Tensor, along_nc: Tensor, numbers: _Numbers, weight: Tensor | None, batch: _Batch | None, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight's gradient, and p and q of the gradient of z, ``scale * g + p * (z - its mean) + q``."""
    off, rstd = numbers.off_ngd, numbers.rstd_ng1
    total = total_nc.view_as(off)
    along = (along_nc if batch is None else along_nc * batch.scale).view_as(off)
    along = rstd * (along + off * total)  # of g with the normalized values
    scaled = (total, along)
    if weight is not None:
        scaled = (t * weight.view(off.shape[1:]) for t in scaled)
    within, slope = (rstd * t.sum(2, keepdim=True) / (size * off.shape[2]) for t in scaled)
    slope = rstd * slope
    # It is rstd * weight * g - within - slope * (z - the mean of its group).
    return along.sum(0).flatten(), -slope.expand_as(off).flatten(1), -(within + slope * off).flatten(1)


def _batch_gradients(
    batch: _Batch,
    scale_nc: Tensor,
    p_nc: Tensor,
    q_nc: Tensor,
    mean_nc: Tensor,
    var_nc: Tensor,
    total_nc: Tensor,
    along_nc: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the batch part's mean, variance, scale and bias, where ``scale * g + p * (z - its mean) + q`` is that of z."""
    total = scale_nc * total_nc + size * q_nc  # of the gradient of z, over positions
    along = scale_nc * along_nc + size * p_nc * batch.scale * var_nc + total * (mean_nc - batch.mean)
    g_bias, g_scale = total.sum(0), along.sum(0)
    weighted = g_scale if batch.weight is None else g_scale * batch.weight
    return -batch.scale * g_bias, -0.5 * batch.rstd**3 * weighted, g_scale * batch.rstd, g_bias


def _like(given: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Each gradient in the dtype of its tensor; None where that is None."""
    pairs = zip(given, gradients, strict=True)
    return tuple(None if t is None or g is None else g.to(t.dtype) for t, g in pairs)


def _refusal(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> str | None:
    if torch_refusal(x, groups, weight, bias, eps=eps, activation=activation) is None:
        return f"x is contiguous {x.dtype}, of which torch's own kernel keeps no more and takes less time"
    if any(p is not None and p.shape != x.shape[1:2] for p in (weight, bias)):
        return "weight or bias is not one number a channel of x"
    return _refused(x, groups, activation)


def _refused(x: Tensor, groups: int, activation: str) -> str | None:
    return refused_tracing() or refused_groups(x, groups) or refused_activation(activation)


@group_norm.kernel("moments", refusal=_refusal)
def group_norm_by_moments(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    return _ChannelNorm.apply(x, groups, weight, bias, None, None, None, None, eps, activation)


def _batch_refusal(
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
) -> str | None:
    if reason := _refused(x, groups, activation):
        return reason
    of_channels, of_either = (mean, var, batch_weight, batch_bias), (weight, bias)
    if any(p is not None and p.shape != x.shape[1:2] for p in of_channels) or any(
        p is not None and (p.dim() != 1 or len(p) not in (x.shape[1], groups)) for p in of_either
    ):
        return "statistics, scales or shifts are not one number a channel of x, or a group"
    return None


def refused_estimates(running_mean: Tensor, running_var: Tensor, batches: Tensor) -> str | None:
    """Why kernels do not let batches into these estimates, or None."""
    if sharing():
        return "processes share their statistics"
    if batches.dtype != torch.int64 or not running_mean.dtype == running_var.dtype == torch.float32:
        return "estimates are not float32, or their number is not int64"
    return None


@batch_channel_norm.kernel("moments", refusal=_batch_refusal)
def batch_channel_norm_by_moments(
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
    weight, bias = (by_channel(p, x.shape[1]) for p in (weight, bias))
    batch = (mean, var, batch_weight, batch_bias)
    return _ChannelNorm.apply(x, groups, weight, bias, *batch, eps, activation)
