"""KNConv: a convolution of kernel-normalized windows, without writing the windows out."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import TakesActivation, activated, widened
from anybatch.methods.kernel_norm import (
    EvalStats,
    KernelNorm1d,
    KernelNorm2d,
    KernelNorm3d,
    check_eval_stats,
    check_units,
    dropout,
    dropout_mask,
    unit_moments,
)
from anybatch.methods.windows import Padding, Sizes, Windows, pad, pixel_means, window_means, windows
from anybatch.scheme import Scheme, check_count, check_number, check_rate

_CONVS = (F.conv1d, F.conv2d, F.conv3d)


@op
def kn_conv(
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
    """Convolve windows that are each normalized over their positions and all channels.

    ``y_o = sum(W_o (u - mean u')) / sqrt(var u' + eps) + b_o`` for the window u at each output position, where u' is u
    after dropout. It equals `kernel_norm` and behind it a convolution whose stride is its kernel size, and is taken as

    ``y_o = (conv(x, W_o - mean W_o) + (mean u - mean u') sum W_o) / sqrt(var u' + eps) + b_o``,

    whose statistics need one mean and one variance a position: to subtract a window's mean is to center the filters.
    With ``groups`` above ``norm_groups``, ``mean u`` is over the channels that filter o reads and ``mean u'`` over
    those of its norm group. Biased variance; zeros that the padding adds count. The bias is added behind the division.
    Statistics and filters are taken in float32 or wider. Filters that were centered and then rounded to half precision
    do not sum to 0: what their rounded sum adds, ``mean u`` times it, is taken off, so that in half precision the
    result errs as a plain convolution and a scaling behind it do, also where mean / std of ``x`` is 30 or more.
    Nothing is drawn at random here: `KNConv2d` draws.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        weight: (O, C / groups, *kernel).
        bias: (O,), or None for 0.
        stride: As ``torch.nn.functional.conv2d`` takes it; so is ``dilation``.
        padding: One number, one a dimension, ``"same"``, ``"valid"``, or pairs, the outermost dimension first:
            ``((top, bottom), (left, right))``.
        dilation: Steps between a window's positions.
        groups: Groups of the convolution.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        norm_groups: A divisor of ``groups``: so many groups of channels are normalized apart. By default, and as
            published, a window is normalized over all channels, also where the convolution has groups.
        p: Rate of the dropout, in [0, 1).
        seed: One number, int64, of which `dropout_mask` makes what is dropped out; windows share it. What is kept is
            divided by 1 - p. Without it ``p`` gives the moments expected over masks, ``mean u' = mean u`` and
            ``var u' = var u + p / (1 - p) mean(u^2) (1 - 1 / S)`` for a window of S values.
        eps: Added to the variance.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"``, of the result.
        residual: Added to the result before its activation; of its shape.
        centered: Whether the filters sum to 0 already, as those of a folded network, which saves centering them.

    Returns:
        (N, O, *), with the dtype of ``x``, under autocast too, or of its sum with a wider ``residual``; windows that
        the padded map does not hold whole are left out.

    Raises:
        ValueError: If ``x`` and ``weight`` do not go together, ``norm_groups`` does not divide ``groups``, no window
            fits, ``bias`` is not one number a filter, a window holds one value, which normalizing would erase, ``p`` is
            outside [0, 1), ``seed`` is not one number, ``residual`` has another shape than the result, ``centered``
            filters ask for a gradient, which would move them, or an argument is malformed.

    Source:
        Nasirigerdeh et al. 2024, "Kernel Normalized Convolutional Networks", arXiv:2205.10089, eq. 1-5, algorithm 1.
        Their form convolves with the filters as they are and subtracts ``mean u' sum W_o`` from the result.
    """
    at = filter_windows(x, weight, stride, padding, dilation, groups, padding_mode, norm_groups, p, seed)
    check_centered(weight, centered)
    check_bias(bias, weight)
    mask = None if seed is None else dropout_mask(x, p, seed)
    dims = len(at.kernel)
    mean, var = unit_moments(x, norm_groups, at, p, mask)
    w = weight.to(mean.dtype)
    w_mean = None if centered else w.mean(tuple(range(1, w.dim())), keepdim=True)
    filters = (w if w_mean is None else w - w_mean).to(x.dtype)
    # Filters that share a convolution group are laid out as (G, O / G), beside maps of one value a group.
    per_filter = (groups, -1, *(1 for _ in range(dims)))
    z = widened(convolve(x, filters, at, groups)).unflatten(1, (groups, -1))
    alike = mask is None and groups == norm_groups
    own = mean if alike or (centered and filters.dtype == w.dtype) else window_means(pixel_means(x, groups), at)
    if filters.dtype != w.dtype:
        # The sum of centered filters is 0 whatever W is, so that no gradient flows through what rounding left of it.
        rest = filters.detach().to(w.dtype).flatten(1).sum(1)
        z = torch.addcmul(z, own.detach().unsqueeze(2), rest.reshape(per_filter), value=-1)
    if own is not mean and w_mean is not None:
        total = w_mean * w[0].numel()
        z = torch.addcmul(z, (own - _each_group(mean, groups)).unsqueeze(2), total.reshape(per_filter))
    scale = _each_group(torch.rsqrt(var + eps), groups).unsqueeze(2)
    y = z * scale if bias is None else torch.addcmul(bias.to(z.dtype).reshape(per_filter), z, scale)
    y = y.flatten(1, 2).to(x.dtype)
    if residual is not None:
        check_residual(residual, y.shape)
        y = y + residual
    return activated(y, activation)


def filter_windows(
    x: Tensor,
    weight: Tensor,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    norm_groups: int,
    p: float,
    seed: Tensor | None,
) -> Windows:
    """The windows of `kn_conv`, whose errors this raises."""
    dims = weight.dim() - 2
    if not 1 <= dims <= 3:
        raise ValueError(f"weight must have 1 to 3 dimensions of positions, got shape {tuple(weight.shape)}")
    if not weight.numel():
        raise ValueError(f"weight of shape {tuple(weight.shape)} holds no filters")
    sizes = tuple(weight.shape[2:])
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace gives tensors, and warns of what makes them numbers
        with warnings.catch_warnings(action="ignore"):
            sizes = tuple(int(n) for n in sizes)
    at = windows(dims, sizes, stride, padding, dilation, padding_mode)
    _check_groups(groups, norm_groups)
    check_units(x, at, norm_groups, p, seed)
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} with groups={groups} takes {weight.shape[1] * groups} channels and "
            f"needs filters that the groups divide evenly, got x of shape {tuple(x.shape)}"
        )
    return at


def check_centered(weight: Tensor, centered: bool) -> None:
    """Raise a `ValueError` where filters that are said to be centered could move."""
    if centered and weight.requires_grad:
        raise ValueError("centered=True is for filters that stay as they are, and weight asks for a gradient")


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Raise a `ValueError` unless there is one number for each filter."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be one number for each of {len(weight)} filters, got shape {tuple(bias.shape)}")


def check_residual(residual: Tensor, shape: torch.Size) -> None:
    """Raise a `ValueError` unless what is added to the result has its shape."""
    if residual.shape != shape:
        raise ValueError(f"residual of shape {tuple(residual.shape)} is added to a result of shape {tuple(shape)}")


def _check_groups(groups: int, norm_groups: int) -> None:
    if groups < 1:
        raise ValueError(f"groups must be 1 or more, got {groups}")
    if norm_groups < 1 or groups % norm_groups:
        raise ValueError(
            f"norm_groups={norm_groups} does not divide groups={groups}: a filter reads the channels of one group, all "
            f"of which must be divided by one and the same standard deviation"
        )


def convolve(x: Tensor, filters: Tensor, at: Windows, groups: int) -> Tensor:
    """In the dtype of both, which autocast must not change: statistics and what is behind go by that of ``x``."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        with torch.autocast(device, enabled=False):
            return _convolved(x, filters, at, groups)
    return _convolved(x, filters, at, groups)


def _convolved(x: Tensor, filters: Tensor, at: Windows, groups: int) -> Tensor:
    conv = _CONVS[len(at.kernel) - 1]
    if at.padding_mode == "zeros" and (padding := at.symmetric) is not None:
        return conv(x, filters, None, at.stride, padding, at.dilation, groups)
    return conv(pad(x, at), filters, None, at.stride, 0, at.dilation, groups)


def _each_group(values: Tensor, groups: int) -> Tensor:
    """Maps of norm groups, (N, G, *), as ones of the convolution's groups, or one that goes with all."""
    return values if values.shape[1] in (1, groups) else values.repeat_interleave(groups // values.shape[1], 1)


class _KNConv(TakesActivation, nn.modules.conv._ConvNd):
    """What the three sizes of `KNConv1d` share. Not torch's ``Conv1d``, for which other tools would take it."""

    dims: ClassVar[int]
    takes_residual = True

    def take_activation(self, act: nn.Module) -> bool:
        """As `TakesActivation`, of ReLU alone: others cannot be undone from what they give, and more would be kept."""
        return isinstance(act, (nn.ReLU, nn.Identity)) and super().take_activation(act)

    centered = False
    """Whether the filters sum to 0 already, as `anybatch.convert.fold` leaves them."""

    keeps_output = True
    """Whether what it gives must not be overwritten."""

    keeps_drawn_bias = True  # at 0 flat backgrounds would stay flat, and windows without variance pass no signal

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_groups: int = 1,
        p: float = 0.05,
        eval_stats: EvalStats = "clean",
        eps: float = 1e-5,
    ) -> None:
        at = windows(self.dims, kernel_size, stride, padding, dilation, padding_mode)
        _check_groups(groups, norm_groups)
        check_rate("p", p)
        check_number("eps", eps)
        check_eval_stats(eval_stats)
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        if in_channels // norm_groups * at.positions == 1:
            raise ValueError(
                f"in_channels={in_channels}, norm_groups={norm_groups} and kernel_size={at.kernel} leave one value in "
                f"each window, which normalizing would erase; use fewer norm_groups or a larger kernel"
            )
        super().__init__(
            in_channels,
            out_channels,
            at.kernel,
            at.stride,
            padding if isinstance(padding, str) else at.symmetric or (0,) * self.dims,
            at.dilation,
            False,
            (0,) * self.dims,
            groups,
            bias,
            padding_mode,  # pyright: ignore[reportArgumentType] (as checked)
            device=device,
            dtype=dtype,
        )
        if at.symmetric is None and not isinstance(padding, str):
            self.padding = at.pads  # pyright: ignore[reportAttributeAccessIssue] (which torch cannot say)
            self._reversed_padding_repeated_twice = [n for pair in reversed(at.pads) for n in pair]
        self.norm_groups = norm_groups
        self.p = p
        self.eval_stats: EvalStats = eval_stats
        self.eps = eps

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        alone = input.dim() == self.dims + 1
        x = input.unsqueeze(0) if alone else input
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} takes (N, {self.in_channels}, *) or ({self.in_channels}, *) with {self.dims} "
                f"spatial dimensions, got shape {tuple(input.shape)}"
            )
        # Autocast would round inside of the convolution; statistics must be of the values that it convolves.
        # The meta device knows no autocast.
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        y = kn_conv(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            norm_groups=self.norm_groups,
            eps=self.eps,
            activation=self.activation,
            residual=residual.unsqueeze(0) if alone and residual is not None else residual,
            centered=self.centered and not self.weight.requires_grad,
            **dropout(x, self.p, self.eval_stats, self.training),
        )
        return y.squeeze(0) if alone else y

    def literal(self) -> nn.Sequential:
        """The two layers that this one stands for, with its parameters: `KernelNorm2d` and a plain convolution.

        From the same random state both draw the same mask. It takes as many times the memory as a window has positions.
        """
        norm, conv = _LITERAL[self.dims - 1]
        plain = conv(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.kernel_size,
            groups=self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        plain.weight, plain.bias = self.weight, self.bias
        normalize = norm(
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            p=self.p,
            eps=self.eps,
            norm_groups=self.norm_groups,
            eval_stats=self.eval_stats,
            padding_mode=self.padding_mode,
        )
        behind = () if self.activation == "none" else (self.taken_activation(),)
        return nn.Sequential(normalize, plain, *behind).train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, norm_groups={self.norm_groups}, p={self.p}, eval_stats={self.eval_stats}, "
            f"eps={self.eps}{self.shown_activation()}{', centered=True' if self.centered else ''}"
        )


_LITERAL: tuple[tuple[Any, Any], ...] = (
    (KernelNorm1d, nn.Conv1d),
    (KernelNorm2d, nn.Conv2d),
    (KernelNorm3d, nn.Conv3d),
)

_DOC = """A convolution of kernel-normalized windows; see `anybatch.functional.kn_conv`.

    Arguments, initialization and state dict are those of ``torch.nn.Conv{dims}d``; ``padding`` may also be a pair
    (before, behind) for each dimension, the outermost first.

    Args:
        norm_groups: A divisor of ``groups``: so many groups of channels are normalized apart.
        p: Rate of the dropout under which statistics are taken in training, in [0, 1). One mask is drawn for the input.
        eval_stats: Which statistics evaluation takes, both without drawing: ``"clean"``, of the input as it is, which
            errs less where both were measured (docs/log.md), or ``"expected"``, with the variance that dropout gives
            on average.
        eps: Added to the variance.

    The result is kept for backward and must not be overwritten: behind it ``nn.ReLU(inplace=True)`` and ``out += skip``
    are errors in backward. It can apply ReLU and add a skip connection itself: ``layer.take_activation(nn.ReLU())``,
    ``layer(x, skip)``, which keeps least.

    Shape:
        As ``torch.nn.Conv{dims}d``, single samples without N too. Under autocast the result has autocast's dtype.

    Raises:
        ValueError: If an argument or the input is none that `anybatch.functional.kn_conv` takes.

    Source:
        Nasirigerdeh et al. 2024, arXiv:2205.10089, eq. 4-5 and algorithm 1; p as published. The released layer draws
        in evaluation too, and takes paddings in the order of ``torch.nn.functional.pad``.
    """


class KNConv1d(_KNConv):
    __doc__ = _DOC.format(dims=1)
    dims = 1


class KNConv2d(_KNConv):
    __doc__ = _DOC.format(dims=2)
    dims = 2


class KNConv3d(_KNConv):
    __doc__ = _DOC.format(dims=3)
    dims = 3


def _final(channels: int, *, layer: Any, norm_groups: int, **options: Any) -> nn.Module:
    """A `KernelNorm2d` of one position, which needs no number of channels."""
    if channels % norm_groups:
        raise ValueError(f"norm_groups={norm_groups} does not divide {channels} channels")
    return layer(1, norm_groups=norm_groups, **options)


def kn(
    *,
    p: float = 0.05,
    eps: float = 0.1,
    eval_stats: EvalStats = "clean",
    norm_groups: int = 1,
    final_p: float | None = None,
) -> Scheme:
    """Kernel normalization inside every convolution, with no norm behind it.

    The published eps, 1e-5, which the layers and the published networks keep, multiplies windows of hardly any
    variance, such as flat backgrounds, and the gradients that pass them, by up to 316 in each layer: on Fashion-MNIST
    such networks do not learn, or their evaluation differs from what dropout made of such windows in training. With 0.1
    they do, and err as little where there are no flat backgrounds (docs/log.md).

    Pre-activated networks have one norm, in front of the head: a KernelNorm of one position, whose dropout has the rate
    ``final_p``; None for the released code's rule, the lesser of 5 p and 0.25.
    """
    check_rate("p", p)
    final_p = min(5 * p, 0.25) if final_p is None else final_p
    check_rate("final_p", final_p)
    check_number("eps", eps)
    check_eval_stats(eval_stats)
    check_count("norm_groups", norm_groups)
    one_d, two_d, three_d = (
        partial(layer, p=p, eps=eps, eval_stats=eval_stats, norm_groups=norm_groups)
        for layer in (KNConv1d, KNConv2d, KNConv3d)
    )
    final_1d, final_2d, final_3d = (
        partial(_final, layer=layer, norm_groups=norm_groups, p=final_p, eps=eps, eval_stats=eval_stats)
        for layer in (KernelNorm1d, KernelNorm2d, KernelNorm3d)
    )
    return Scheme(
        name="kn",
        conv=(one_d, two_d, three_d),
        final=(final_1d, final_2d, final_3d),
        sources=("arXiv:2205.10089",),
    )
