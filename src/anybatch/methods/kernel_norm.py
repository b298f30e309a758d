"""Kernel normalization: each window of a map, over all its channels, is a unit of its own."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import check_has_channels, widened
from anybatch.methods.windows import (
    Padding,
    Sizes,
    Windows,
    channels_are_last,
    check_fit,
    pad,
    taps,
    window_moments,
    windows,
)
from anybatch.scheme import check_count, check_number, check_rate

EvalStats = Literal["clean", "expected"]


def check_eval_stats(eval_stats: str) -> None:
    """Raise a `ValueError` for any other word."""
    if eval_stats not in ("clean", "expected"):
        raise ValueError(f"eval_stats={eval_stats!r} is neither 'clean' nor 'expected'")


def check_units(x: Tensor, at: Windows, norm_groups: int, p: float, seed: Tensor | None) -> None:
    """Raise a `ValueError` unless ``x`` has units to normalize and what tells of dropout does."""
    check_has_channels(x)
    check_fit(x, at)
    check_rate("p", p)
    c = x.shape[1]
    if norm_groups < 1 or c % norm_groups:
        raise ValueError(f"norm_groups={norm_groups} does not divide the {c} channels of x")
    if c // norm_groups * at.positions == 1:
        raise ValueError(
            f"norm_groups={norm_groups} and a kernel_size of {at.kernel} leave one value in each window of x of shape "
            f"{tuple(x.shape)}, which would erase it; use fewer groups or a larger kernel"
        )
    if seed is not None and (seed.dtype != torch.int64 or seed.dim()):
        raise ValueError(f"seed must be one number of int64, got {seed.dtype} of shape {tuple(seed.shape)}")


def unit_moments(
    x: Tensor, groups: int, at: Windows, p: float = 0.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each window after dropout, (N, G, *), in float32 or wider.

    Args:
        x: (N, C, *), to which neither dropout nor padding has been applied.
        groups: G, a divisor of C.
        at: The windows.
        p: Rate of dropout.
        mask: (N, C, *), int8, 0 where a value is dropped out; None for what both moments are on average over masks.

    Returns:
        Mean ``m'`` and variance ``v'`` of ``x mask / (1 - p)``; without a mask ``m' = m`` and
        ``v' = v + p / (1 - p) (v + m^2) (1 - 1 / S)`` for windows of S values, none of which the padding repeats.
    """
    if mask is not None:
        mean, var = window_moments(x * mask, groups, at)
        return mean / (1 - p), var / (1 - p) ** 2
    mean, var = window_moments(x, groups, at)
    if p:
        size = x.shape[1] // groups * at.positions
        var = var + p / (1 - p) * (1 - 1 / size) * (var + mean.square())
    return mean, var


@op
def kernel_norm(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    *,
    padding_mode: str = "zeros",
    norm_groups: int = 1,
    p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each window of the padded map over its positions and all channels, and lay the windows side by side.

    ``y = (u - mean u') / sqrt(var u' + eps)`` for each window u, where u' is u after dropout: dropout disturbs the
    statistics and not the values. Biased variance; zeros that the padding adds count in both moments, and are
    normalized too. Statistics are taken in float32 or wider. Nothing is drawn at random here: `KernelNorm2d` draws.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        kernel_size: Positions of a window in each dimension, as ``torch.nn.functional.conv2d`` takes them; so are
            ``stride`` and ``dilation``. Windows that the padded map does not hold whole are left out.
        stride: Steps between windows.
        padding: One number, one a dimension, ``"same"``, ``"valid"``, or pairs, the outermost dimension first:
            ``((top, bottom), (left, right))``.
        dilation: Steps between a window's positions.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        norm_groups: G, a divisor of C: so many groups of neighboring channels are normalized apart.
        p: Rate of the dropout, in [0, 1).
        seed: One number, int64, of which `dropout_mask` makes what is dropped out; windows share it. What is kept is
            divided by 1 - p. Without it ``p`` gives the moments expected over masks, ``mean u' = mean u`` and
            ``var u' = var u + p / (1 - p) mean(u^2) (1 - 1 / S)`` for a window of S values.
        eps: Added to the variance.

    Returns:
        (N, C, kernel L, ...) for L windows in each dimension, with the dtype of ``x``: position a of window i stands at
        i kernel + a, so that a convolution whose stride is its kernel size reads one window at a time.

    Raises:
        ValueError: If ``x`` has another rank than ``kernel_size``, ``norm_groups`` does not divide C, no window fits, a
            window holds one value, which normalizing would erase, ``p`` is outside [0, 1), ``seed`` is not one number,
            or an argument is malformed.

    Source:
        Nasirigerdeh et al. 2024, "Kernel Normalized Convolutional Networks", arXiv:2205.10089, eq. 1-3. Their released
        layer draws a mask for each window where windows share values, so that joint distributions differ; and it
        draws in evaluation too.
    """
    check_has_channels(x)
    dims = x.dim() - 2
    at = windows(dims, kernel_size, stride, padding, dilation, padding_mode)
    check_units(x, at, norm_groups, p, seed)
    mask = None if seed is None else dropout_mask(x, p, seed)
    mean, var = unit_moments(x, norm_groups, at, p, mask)
    unit, rstd = pad(x, at), torch.rsqrt(var + eps)
    last = channels_are_last(x)
    first, split = (1, -1) if last else (2, 1)
    if last:  # so that result and gradient lie in memory as x does
        unit, mean, rstd = (t.movedim(1, -1) for t in (unit, mean, rstd))
    for dim in range(dims):
        # In 2d (N, C, windows, kernel, windows, kernel), in which the tiles need only be flattened.
        axis = first + 2 * dim
        unit = torch.stack(taps(unit, at, dim, axis), axis + 1)
        mean, rstd = mean.unsqueeze(axis + 1), rstd.unsqueeze(axis + 1)
    beside = split % mean.dim() + 1  # channels of a group stand behind the groups
    unit = widened(unit.unflatten(split, (norm_groups, -1)))
    y = ((unit - mean.unsqueeze(beside)) * rstd.unsqueeze(beside)).flatten(beside - 1, beside)
    for dim in range(first, first + dims):
        y = y.flatten(dim, dim + 1)
    y = y.to(x.dtype).contiguous()
    return y.movedim(-1, 1) if last else y


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64, the last two as int64."""
_LOW, _MIDDLE, _HIGH = _GOLDEN % 2**24, _GOLDEN >> 24 & 2**24 - 1, _GOLDEN >> 48
"""The first in pieces of 24, 24 and 16 bits."""
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
"""Of `dropout_mask`, as int32."""


def dropout_threshold(p: float) -> int:
    """A value is dropped out where its 16 bits, as a signed number, are below this."""
    return min(round(p * 2**16), 2**16 - 1) - 2**15


def dropout_keys(seed: Tensor, samples: int) -> Tensor:
    """(N,), int64: for each sample the number of SplitMix64 from a seed, both halves of which are keys."""
    # The place times a constant, of which 64 bits are kept. One product of both would end compiled code: C++ lets no
    # int64 overflow, and compilers conclude that a loop which multiplies its counter so never comes to its end. Nor may
    # a factor have more than 28 bits, since torch's vectors multiply it by their lanes in int32.
    place = torch.arange(1, samples + 1, device=seed.device)
    middle = place * _MIDDLE
    low = place * _LOW + ((middle & (2**24 - 1)) << 24)
    high = place * _HIGH + (middle >> 24) + (low >> 48)
    z = ((high << 48) | (low & (2**48 - 1))) + seed
    # Shifts of int64 keep the sign: what they shift in is masked away.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def dropout_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Which values of (N, C, *) a seed keeps: int8, 0 with probability ``p``, rounded to 1 / 65,536, and else 1.

    Two neighboring channels of a position take the halves of one 32-bit hash of their place in the sample, position by
    position, keyed by two numbers that SplitMix64 makes of the seed for each sample. So backward need not keep the
    mask, kernels find it wherever they are, every device makes the same, and the memory format does not matter: the
    mask lies in memory as ``x`` does. Of 32 bits, places repeat after 2^33 values of one sample.

    Source:
        Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 9 and section 4; the hash
        is a finalizer of the form that MurmurHash3 uses, with C. Wellons' constants ("lowbias32", 2018).
    """
    n, c = x.shape[:2]
    positions, pairs = math.prod(x.shape[2:]), (c + 1) // 2
    keys = dropout_keys(seed.to(x.device), n)
    low, high = keys.to(torch.int32).unsqueeze(1), (keys >> 32).to(torch.int32).unsqueeze(1)
    z = torch.arange(positions * pairs, device=x.device).to(torch.int32) ^ low
    # Shifts of int32 keep the sign too, and products wrap.
    z = (z ^ ((z >> 16) & 0xFFFF)).mul_(MULTIPLIERS[0])
    z = (z ^ ((z >> 15) & 0x1FFFF)).add_(high).mul_(MULTIPLIERS[1])
    z = z ^ ((z >> 16) & 0xFFFF)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # In torch 2.11 neither `vmap` nor the compiler knows views of all these dtypes.
        halves = (z.unsqueeze(-1) >> torch.tensor([0, 16], dtype=torch.int32, device=x.device)) & 0xFFFF
        kept = ((halves ^ 0x8000) >= dropout_threshold(p) + 0x8000).to(torch.int8)
    else:  # torch multiplies by an integer three times as fast as by a bool
        kept = (z.view(torch.int16) >= dropout_threshold(p)).view(torch.int8)
    kept = kept.view(n, *x.shape[2:], 2 * pairs)[..., :c].movedim(-1, 1)
    if not channels_are_last(x):
        return kept.contiguous()
    return kept if c % 2 == 0 else kept.movedim(1, -1).contiguous().movedim(-1, 1)


def dropout(x: Tensor, p: float, eval_stats: EvalStats, training: bool) -> dict[str, Any]:
    """A layer's ``p`` and ``seed`` for its op: drawn in training, and in evaluation what ``eval_stats`` says."""
    if training and p:
        return {"p": p, "seed": torch.randint(-(2**63), 2**63 - 1, (), device=x.device)}
    return {"p": p if eval_stats == "expected" else 0.0, "seed": None}


class _KernelNorm(nn.Module):
    """What the three sizes of `KernelNorm1d` share."""

    dims: ClassVar[int]

    def __init__(
        self,
        kernel_size: Sizes = 1,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        *,
        p: float = 0.1,
        eps: float = 1e-5,
        norm_groups: int = 1,
        eval_stats: EvalStats = "clean",
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at = windows(self.dims, kernel_size, stride, padding, dilation, padding_mode)
        check_rate("p", p)
        check_number("eps", eps)
        check_eval_stats(eval_stats)
        check_count("norm_groups", norm_groups)
        self.kernel_size, self.stride, self.dilation = at.kernel, at.stride, at.dilation
        self.padding = padding if isinstance(padding, str) else at.symmetric or at.pads
        self.padding_mode = padding_mode
        self.norm_groups = norm_groups
        self.p = p
        self.eval_stats: EvalStats = eval_stats
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        alone = x.dim() == self.dims + 1
        x = x.unsqueeze(0) if alone else x
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"{type(self).__name__} takes (N, C, *) or (C, *) with {self.dims} spatial dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        y = kernel_norm(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            padding_mode=self.padding_mode,
            norm_groups=self.norm_groups,
            eps=self.eps,
            **dropout(x, self.p, self.eval_stats, self.training),
        )
        return y.squeeze(0) if alone else y

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"p={self.p}, eps={self.eps}, norm_groups={self.norm_groups}, eval_stats={self.eval_stats}, "
            f"padding_mode={self.padding_mode}"
        )


_DOC = """Kernel normalization of {dims}d data, without parameters; see `anybatch.functional.kernel_norm`.

    Before a convolution whose stride is its kernel size this is what `KNConv{dims}d` computes, with as many times the
    memory as a window has positions. With a kernel of 1 it is positional normalization without scale and shift.

    Args:
        kernel_size: Positions of a window, one number or one a dimension; so are ``stride`` and ``dilation``.
        stride: Steps between windows.
        padding: One number, one a dimension, ``"same"``, ``"valid"``, or a pair (before, behind) for each dimension,
            the outermost first.
        dilation: Steps between a window's positions.
        p: Rate of the dropout under which statistics are taken in training, in [0, 1). One mask is drawn for the input.
        eps: Added to the variance.
        norm_groups: A divisor of C: so many groups of channels are normalized apart.
        eval_stats: Which statistics evaluation takes, both without drawing: ``"clean"``, of the input as it is, which
            errs less where both were measured (docs/log.md), or ``"expected"``, with the variance that dropout gives
            on average.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Taken as every layer takes it; there is nothing to place.
        dtype: The same.

    Shape:
        (N, C, *) or (C, *) to the same with kernel times windows positions in each dimension.

    Raises:
        ValueError: If an argument or the input is none that `anybatch.functional.kernel_norm` takes.

    Source:
        Nasirigerdeh et al. 2024, arXiv:2205.10089, section 3; its default of p and its other defaults are those of the
        released code, which draws in evaluation too.
    """


class KernelNorm1d(_KernelNorm):
    __doc__ = _DOC.format(dims=1)
    dims = 1


class KernelNorm2d(_KernelNorm):
    __doc__ = _DOC.format(dims=2)
    dims = 2


class KernelNorm3d(_KernelNorm):
    __doc__ = _DOC.format(dims=3)
    dims = 3
