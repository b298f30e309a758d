"""Windows over the positions of a map: how they are given, padded and laid out, and the moments of what they hold."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.methods.common import widened

Sizes = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[Sequence[int]]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Windows(NamedTuple):
    """Where windows lie; each field has one entry a dimension, the outermost first."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    """Positions added before and behind."""
    padding_mode: str

    @property
    def positions(self) -> int:
        """How many a window has."""
        return math.prod(self.kernel)

    @property
    def spans(self) -> tuple[int, ...]:
        """Positions from a window's first to its last, both counted."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def symmetric(self) -> tuple[int, ...] | None:
        """What is added on both sides, or None where the sides differ."""
        if any(before != behind for before, behind in self.pads):
            return None
        return tuple(before for before, _ in self.pads)

    @property
    def untouched(self) -> bool:
        """Whether each position is a window and each window a position."""
        return self.positions == 1 and not self.padded and all(s == 1 for s in self.stride)

    @property
    def padded(self) -> bool:
        return any(before or behind for before, behind in self.pads)


def windows(
    dims: int,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
) -> Windows:
    """The windows that the arguments of a torch convolution mean.

    Args:
        dims: Spatial dimensions of the data.
        kernel_size: One number, or one a dimension, as for ``stride`` and ``dilation``.
        stride: Steps between windows.
        padding: One number, one a dimension, a pair (before, behind) for each dimension with the outermost first as in
            ``((top, bottom), (left, right))``, ``"valid"`` for none, or ``"same"`` for one window a position; where
            that takes an odd number of positions, the last is added behind, as torch does.
        dilation: Steps between the positions of a window.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Raises:
        ValueError: If one of them is none of these, or ``"same"`` is asked for with a stride above 1.
    """
    given = (dims, kernel_size, stride, padding, dilation, padding_mode)
    if not torch.compiler.is_compiling():  # torch.compile would warn of the cache, and needs none
        with contextlib.suppress(TypeError):  # lists
            return _parsed_once(*given)
    return _parsed(*given)


def _parsed(
    dims: int, kernel_size: Sizes, stride: Sizes, padding: Padding, dilation: Sizes, padding_mode: str
) -> Windows:
    kernel = _each("kernel_size", kernel_size, dims, 1)
    steps = _each("stride", stride, dims, 1)
    between = _each("dilation", dilation, dims, 1)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode={padding_mode!r} is none of {', '.join(PADDING_MODES)}")
    if padding == "same":
        if any(s != 1 for s in steps):
            raise ValueError(f"padding='same' needs stride 1, got stride={stride}; give the padding in numbers")
        totals = [(k - 1) * d for k, d in zip(kernel, between, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding={padding!r} is neither 'same' nor 'valid' nor numbers")
        pads = ((0, 0),) * dims
    elif isinstance(padding, Sequence) and any(isinstance(entry, Sequence) for entry in padding):
        if len(padding) != dims or any(not isinstance(entry, Sequence) for entry in padding):
            raise ValueError(f"padding={padding} is not one pair (before, behind) for each of {dims} dimensions")
        pads = tuple(_each("padding", entry, 2, 0) for entry in padding)
    else:
        pads = tuple((n, n) for n in _each("padding", padding, dims, 0))
    return Windows(kernel, steps, between, pads, padding_mode)  # pyright: ignore[reportArgumentType] (pairs, as checked)


_parsed_once = functools.lru_cache(1024, typed=True)(_parsed)


def _each(name: str, given: Any, dims: int, least: int) -> tuple[int, ...]:
    """One number a dimension."""
    numbers = tuple(given) if isinstance(given, Sequence) else (given,) * dims
    if len(numbers) != dims or any(not isinstance(n, int) or isinstance(n, bool) or n < least for n in numbers):
        raise ValueError(f"{name}={given!r} is not a number of {least} or more, or {dims} of them")
    return numbers


def check_fit(x: Tensor, at: Windows) -> None:
    """Raise a `ValueError` unless ``x`` is (N, C, *) with room for a window in every dimension."""
    if torch.compiler.is_compiling():
        reason = _unfit(x.shape, at)
    else:
        try:
            reason = _unfit_once(x.shape, at)
        except TypeError:  # sizes that are symbols
            reason = _unfit(x.shape, at)
    if reason is not None:
        raise ValueError(reason)


def _unfit(shape: torch.Size, at: Windows) -> str | None:
    if len(shape) != len(at.kernel) + 2:
        return (
            f"x must be (N, C, *) with {len(at.kernel)} spatial dimensions as the kernel has, got shape {tuple(shape)}"
        )
    for size, span, (before, behind) in zip(shape[2:], at.spans, at.pads, strict=True):
        if size + before + behind < span:
            return (
                f"a kernel_size of {at.kernel} with dilation {at.dilation} spans {at.spans} positions, more than x of "
                f"shape {tuple(shape)} has with a padding of {at.pads}; use a smaller kernel or more padding"
            )
        most = {"reflect": size - 1, "circular": size}.get(at.padding_mode)
        if most is not None and max(before, behind) > most:
            return (
                f"padding_mode={at.padding_mode!r} can add {most} positions to the {size} of x of shape "
                f"{tuple(shape)}, not {max(before, behind)}; pad less, or in another mode"
            )
    return None


_unfit_once = functools.lru_cache(4096)(_unfit)


def pad(x: Tensor, at: Windows) -> Tensor:
    """(N, C, *) with the windows' padding around it."""
    if not at.padded:
        return x
    last_first = [n for pair in reversed(at.pads) for n in pair]
    return F.pad(x, last_first, "constant" if at.padding_mode == "zeros" else at.padding_mode)


def channels_are_last(x: Tensor) -> bool:
    """Whether (N, C, *) lies in memory with its channels last."""
    return x.stride(1) == 1 and not x.is_contiguous()


def taps(x: Tensor, at: Windows, dim: int, axis: int) -> list[Tensor]:
    """Views of a padded ``x``, each of one position of every window along one dimension.

    Slices, because the gradient of torch's ``unfold`` is slow and cannot be taken for each sample by ``vmap``.

    Args:
        x: (N, C, *), or with its dimensions in another order.
        at: The windows.
        dim: Spatial dimension, counted from 0.
        axis: Where it is in ``x``.
    """
    stride, step = at.stride[dim], at.dilation[dim]
    count = (x.shape[axis] - at.spans[dim]) // stride + 1
    before = (slice(None),) * axis
    return [
        x[(*before, slice(first, first + (count - 1) * stride + 1, stride))] for first in range(0, at.spans[dim], step)
    ]


def pixel_means(x: Tensor, groups: int) -> Tensor:
    """The mean over each group's channels at each position, (N, G, *), in float32 or wider."""
    return _channel_means(widened(x).unflatten(1, (groups, -1)))


def _channel_means(x_ngc: Tensor) -> Tensor:
    # A sum, because the gradient of torch's mean would be a tensor as large as x where a sum's is a view.
    return x_ngc.sum(2) / x_ngc.shape[2]


def window_means(means: Tensor, at: Windows) -> Tensor:
    """The mean over each window of `pixel_means`."""
    means = pad(means, at)
    for dim, k in enumerate(at.kernel):
        parts = taps(means, at, dim, dim + 2)
        means = parts[0] if k == 1 else torch.stack(parts).mean(0)
    return means


def window_moments(x: Tensor, groups: int, at: Windows) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over each group's channels and each window's positions, (N, G, *), in float32 or wider.

    By the law of total variance, taken first over the channels of a position and then over one dimension of the
    window after another: the variance of what parts make up is the mean of their variances plus the variance of their
    means. Each step takes two passes, so that nothing cancels, and only the first reads ``x``. Padded positions count.
    """
    if at.positions == 1 and not at.padded:
        x = x[(..., *(slice(None, None, s) for s in at.stride))]
        at = at._replace(stride=(1,) * len(at.stride))
    x_ngc = widened(x).unflatten(1, (groups, -1))
    mean = _channel_means(x_ngc)
    # Adding what was negated before, for the same reason.
    return combined_moments(mean, _channel_means((x_ngc + -mean.unsqueeze(2)).square()), at)


def combined_moments(mean: Tensor, var: Tensor, at: Windows) -> tuple[Tensor, Tensor]:
    """Mean and variance of each window from those of its positions, (N, G, *) both."""
    mean, var = pad(mean, at), pad(var, at)
    for dim, k in enumerate(at.kernel):
        means, vars_ = taps(mean, at, dim, dim + 2), taps(var, at, dim, dim + 2)
        if k == 1:
            (mean,), (var,) = means, vars_
            continue
        parts = torch.stack(means)
        mean = parts.mean(0)
        var = torch.stack(vars_).mean(0) + (parts - mean).square().mean(0)
    return mean, var
