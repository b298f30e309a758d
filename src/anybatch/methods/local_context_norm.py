"""Local context normalization: each position by the window around it, over a few channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from anybatch.dispatch import explain, op
from anybatch.methods.common import (
    ChannelNorm,
    TakesActivation,
    activated,
    check_has_channels,
    scaled_and_shifted,
    widened,
)
from anybatch.methods.group_norm import group_norm
from anybatch.scheme import Scheme, check_count, check_flag, check_number

Window = int | Sequence[int]


@op
def local_context_norm(
    x: Tensor,
    window: Window,
    channels_per_group: int = 2,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    released: bool = False,
    activation: str = "none",
) -> Tensor:
    """Normalize each value by the window around it, over a group of neighboring channels of its sample.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias)``, mean and biased variance over the window's positions and
    the group's channels. Windows stay inside the map: near a border the nearest complete one is taken. Where ``window``
    is even, it holds one position more behind the center than before. In a dimension that is no larger than ``window``
    it holds the whole dimension; where this is so in all, the result is `group_norm`'s.

    The cost does not depend on the window: sums over windows are differences of running sums. These are taken in
    float64 (float32 on devices that have none) of the group's mean at each position, less the mean of the whole map,
    and of its variance, from which the law of total variance gives the window's. NaN and infinity make NaN of all whose
    windows hold them, and may of others in their sample and group.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        window: Positions, for all dimensions of ``*`` or one for each.
        channels_per_group: Channels in a group, a divisor of C.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to the variance, so its unit is that of ``x`` squared.
        released: Whether to compute what the authors' released code does, for weights trained with it. Where ``window``
            is smaller than the map in every dimension, it takes mean and variance as constants for the gradient, and
            never uses the window that begins at a dimension's first position: near that border the second one stands
            in, and odd windows begin one position later everywhere but at the far border. Else it takes the statistics
            of the whole map, with the unbiased variance. (Unlike it, we leave ``x`` as it is, and lose no digits where
            its mean is large.)
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"``. As part of the op it keeps no tensor for backward,
            but where formulas run: in float64, 3d or without a C compiler on the CPU, or with ``released``.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, ``channels_per_group`` does not divide C, ``window`` is not
            positive or has another number of dimensions than ``x``, or a window holds one value, which normalizing
            would erase; if there is no such activation.

    Source:
        Ortiz et al. 2019, "Local Context Normalization: Revisiting Local Normalization", arXiv:1912.05845,
        and its released code.
    """
    check_has_channels(x)
    c, sizes = x.shape[1], x.shape[2:]
    if channels_per_group < 1 or c % channels_per_group:
        raise ValueError(f"channels_per_group={channels_per_group} does not divide the {c} channels of x")
    windows = windows_within(window, sizes)
    groups = c // channels_per_group
    if released and any(w == size for w, size in zip(windows, sizes, strict=True)):
        windows = tuple(sizes)
    if channels_per_group * math.prod(windows) == 1:
        raise ValueError(
            f"window={window} and channels_per_group=1 leave one value in each window of x of shape {tuple(x.shape)}, "
            f"which would erase it; use a larger window or more channels per group"
        )
    whole = windows == tuple(sizes)
    if whole and not released:
        return group_norm(x, groups, weight, bias, eps=eps, activation=activation)

    x_ngc = widened(x.unflatten(1, (groups, channels_per_group)))
    # The result does not depend on a constant for each sample and group; running sums of the mean would lose digits.
    x_ngc = x_ngc - x_ngc.detach().mean(tuple(range(2, x_ngc.dim())), keepdim=True)
    seen = x_ngc.detach() if released and not whole else x_ngc
    mean_ng = seen.mean(2)
    var_ng = (seen - mean_ng.unsqueeze(2)).square().mean(2)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    mean_ng, var_ng = mean_ng.to(wide), var_ng.to(wide)
    first, second = _box_means(torch.stack([mean_ng, var_ng + mean_ng.square()]), windows, late=released)
    var_ng = (second - first.square()).clamp_min(0)
    if whole:
        values = channels_per_group * math.prod(sizes)
        var_ng = var_ng * (values / (values - 1))
    mean_ngc = first.to(x_ngc.dtype).unsqueeze(2)
    rstd_ngc = torch.rsqrt(var_ng + eps).to(x_ngc.dtype).unsqueeze(2)
    y = ((x_ngc - mean_ngc) * rstd_ngc).flatten(1, 2)
    return activated(scaled_and_shifted(y, weight, bias), activation).to(x.dtype)


def windows_within(window: Window, sizes: Sequence[int]) -> tuple[int, ...]:
    """One window for each dimension, at most as large as it; a `ValueError` where ``window`` is none."""
    return tuple(min(w, size) for w, size in zip(_windows(window, len(sizes)), sizes, strict=True))


def _windows(window: Window, dims: int) -> tuple[int, ...]:
    """One window for each dimension."""
    windows = (window,) * dims if isinstance(window, int) else tuple(window)
    if len(windows) != dims:
        raise ValueError(f"window={window} is for {len(windows)} dimensions, and x has {dims} behind its channels")
    if any(w < 1 for w in windows):
        raise ValueError(f"window={window} must be 1 or more")
    return windows


def _box_means(fields: Tensor, windows: Sequence[int], *, late: bool) -> Tensor:
    """The mean of (K, N, G, *) over the window around each position; size 1 in dimensions that a window covers.

    Args:
        fields: Their means are not far from 0.
        windows: At most the sizes of ``*``.
        late: Whether the window that begins at the first position is missing, as in the released code.
    """
    for dim, window in enumerate(windows, start=3):
        size = fields.shape[dim]
        if window == size:
            fields = fields.mean(dim, keepdim=True)
            continue
        sums = fields.cumsum(dim)
        boxes = sums.narrow(dim, window, size - window) - sums.narrow(dim, 0, size - window)
        if not late:
            boxes = torch.cat([sums.narrow(dim, window - 1, 1), boxes], dim)
        before = window // 2 if late else (window - 1) // 2
        last = boxes.shape[dim] - 1
        behind = size - before - last - 1
        # The outermost windows again, for the positions around which no window fits.
        repeated = [-1] * fields.dim()
        repeated[dim] = before
        head = boxes.narrow(dim, 0, 1).expand(repeated)
        repeated[dim] = behind
        tail = boxes.narrow(dim, last, 1).expand(repeated)
        fields = torch.cat([head, boxes, tail], dim) / window
    return fields


class _LocalContextNorm(TakesActivation, ChannelNorm):
    """What the three sizes of `LocalContextNorm1d` share."""

    def __init__(
        self,
        num_channels: int,
        window: Window = 227,
        channels_per_group: int = 2,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        released: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)
        if channels_per_group < 1 or num_channels % channels_per_group:
            raise ValueError(f"channels_per_group={channels_per_group} does not divide {num_channels} channels")
        _windows(window, self.dims or 0)
        self.window = window if isinstance(window, int) else tuple(window)
        self.channels_per_group = channels_per_group
        self.released = released

    def _called(self, call: Callable[..., Any], *front: Any) -> Any:
        return call(
            *front,
            self.window,
            self.channels_per_group,
            self.weight,
            self.bias,
            eps=self.eps,
            released=self.released,
            activation=self.activation,
        )

    def normalize(self, x: Tensor) -> Tensor:
        return self._called(local_context_norm, x)

    def keeps_input_alone(self, x: Tensor) -> bool:
        """As `TakesActivation`: formulas keep more."""
        return self._called(explain, local_context_norm, x)["reference"] != "runs"

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, window={self.window}, channels_per_group={self.channels_per_group}, eps={self.eps}, "
            f"affine={self.affine}, released={self.released}{self.shown_activation()}"
        )


_DOC = """Local context normalization of {what}; see `anybatch.functional.local_context_norm`.

    Each value is normalized by the window around it and the channels of its group, so that statistics hardly depend on
    the size of the map, as where large images are cut into tiles. Maps no larger than the window are normalized as by
    GroupNorm with ``channels_per_group`` channels a group: with the defaults every map of a ResNet at 224 pixels.

    Args:
        num_channels: C.
        window: Positions, for all dimensions or one for each; the authors' 227 is meant for satellite images.
        channels_per_group: Channels in a group, a divisor of C.
        eps: Added to the variance.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0. The released code shapes them
            (1, C, 1, 1): flatten them to load them.
        released: Whether to compute what the released code does, with its faults; see the function.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        {shape} to {shape}, or without N.

    Raises:
        ValueError: If ``channels_per_group`` does not divide C, or ``window`` is not positive or has another number of
            dimensions; in `forward`, if a window holds one value, which normalizing would erase.

    Source:
        Ortiz et al. 2019, arXiv:1912.05845, and its released code.
    """


class LocalContextNorm1d(_LocalContextNorm):
    __doc__ = _DOC.format(what="signals", shape="(N, C, L)")
    dims: ClassVar[int | None] = 1


class LocalContextNorm2d(_LocalContextNorm):
    __doc__ = _DOC.format(what="images", shape="(N, C, H, W)")
    dims: ClassVar[int | None] = 2


class LocalContextNorm3d(_LocalContextNorm):
    __doc__ = _DOC.format(what="volumes", shape="(N, C, D, H, W)")
    dims: ClassVar[int | None] = 3


def lcn(
    *,
    window: int = 227,
    group_size: int = 2,
    eps: float = 1e-5,
    affine: bool = True,
    released: bool = False,
) -> Scheme:
    """Local context normalization; on maps no larger than the window it is group normalization."""
    check_count("window", window)
    check_count("group_size", group_size)
    check_number("eps", eps)
    check_flag("affine", affine)
    check_flag("released", released)
    options: dict[str, Any] = {
        "window": window,
        "channels_per_group": group_size,
        "eps": eps,
        "affine": affine,
        "released": released,
    }
    one_d, two_d, three_d = (
        partial(layer, **options) for layer in (LocalContextNorm1d, LocalContextNorm2d, LocalContextNorm3d)
    )
    return Scheme(name="lcn", norm=(one_d, two_d, three_d), sources=("arXiv:1912.05845",))
