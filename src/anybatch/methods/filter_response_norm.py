"""Filter response normalization and its activation, the thresholded linear unit."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from anybatch.dispatch import op
from anybatch.methods.common import ChannelNorm, check_has_channels, per_channel, scaled_and_shifted, widened
from anybatch.scheme import Scheme, check_flag, check_number


@op
def filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps_l: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Divide each channel of each sample by its root mean square over positions, and cut it off below a threshold.

    ``y = max(x / sqrt(nu² + eps + |eps_l|) * weight + bias, tau)``, with ``nu²`` the mean of ``x²`` over positions; no
    mean is subtracted. The mean square is taken in float32 or wider. A map of one position becomes
    ``x / sqrt(x² + eps)``, nearly the sign of ``x``, through which nearly no gradient passes: hence ``eps_l``.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        tau: (C,), the threshold, or None for no activation.
        eps_l: (C,) or (1,), learned, or None for 0.
        eps: Added to the mean square, so its unit is that of ``x`` squared.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension.

    Source:
        Singh and Krishnan 2019, "Filter Response Normalization Layer", arXiv:1911.09737.
    """
    check_has_channels(x)
    wide = widened(x)
    positions = tuple(range(2, x.dim()))
    squares = wide.square()
    nu2 = squares.mean(positions, keepdim=True) if positions else squares
    if eps_l is not None:
        nu2 = nu2 + per_channel(eps_l, x.dim()).abs()
    y = scaled_and_shifted(wide * torch.rsqrt(nu2 + eps), weight, bias)
    if tau is not None:
        y = torch.maximum(y, per_channel(tau, x.dim()))
    return y.to(x.dtype)


class _FilterResponseNorm(ChannelNorm):
    """What the three sizes of `FilterResponseNorm1d` share."""

    tau: Tensor | None
    eps_l: Tensor | None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        learnable_eps: bool = False,
        apply_act: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)
        self.learnable_eps = learnable_eps
        self.apply_act = apply_act
        self.learn("tau", 0.0 if apply_act else None, device=device, dtype=dtype)
        self.learn("eps_l", 1e-4 if learnable_eps else None, device=device, dtype=dtype)

    def normalize(self, x: Tensor) -> Tensor:
        return filter_response_norm(x, self.weight, self.bias, self.tau, self.eps_l, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learnable_eps={self.learnable_eps}, apply_act={self.apply_act}"


_DOC = """Filter response normalization of {what} and its activation; see `anybatch.functional.filter_response_norm`.

    ``y = max(x / sqrt(mean of x² over positions + eps + |eps_l|) * weight + bias, tau)``. It takes the place of a norm
    and the ReLU behind it. The learned threshold ``tau`` (C,) starts at 0, where it is a ReLU, as in every release we
    know; the paper was not at hand to confirm it.

    Where nothing is to cut off behind a norm, as before the join of a residual block, give ``apply_act=False``. The
    paper's residual networks are pre-activated, in which there is no such place. An independent repetition with the
    original order (23.2 % error on ImageNet, where BatchNorm has 23.0 %) leaves the threshold out there, as we do, and
    puts one with learned ``tau`` behind the join, where our networks have a ReLU.

    Args:
        num_channels: C.
        eps: Added to the mean square.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        learnable_eps: Whether to learn ``eps_l`` (C,), first 1e-4, whose size is added to ``eps``: the paper's cure for
            maps of one position, which would become the sign of ``x``.
        apply_act: Whether to cut off below ``tau``.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        {shape} to {shape}, or without N.

    Source:
        Singh and Krishnan 2019, "Filter Response Normalization Layer", arXiv:1911.09737.
    """


class FilterResponseNorm1d(_FilterResponseNorm):
    __doc__ = _DOC.format(what="signals", shape="(N, C, L)")
    dims: ClassVar[int | None] = 1


class FilterResponseNorm2d(_FilterResponseNorm):
    __doc__ = _DOC.format(what="images", shape="(N, C, H, W)")
    dims: ClassVar[int | None] = 2


class FilterResponseNorm3d(_FilterResponseNorm):
    __doc__ = _DOC.format(what="volumes", shape="(N, C, D, H, W)")
    dims: ClassVar[int | None] = 3


def frn(*, eps: float = 1e-6, affine: bool = True, learnable_eps: bool = False) -> Scheme:
    """Filter response normalization with its thresholded activation; said to want a warm-up of the learning rate."""
    check_number("eps", eps)
    check_flag("affine", affine)
    check_flag("learnable_eps", learnable_eps)
    options: dict[str, Any] = {"eps": eps, "affine": affine, "learnable_eps": learnable_eps}
    one_d, two_d, three_d = (
        partial(layer, **options) for layer in (FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d)
    )
    return Scheme(name="frn", norm_act=(one_d, two_d, three_d), sources=("arXiv:1911.09737",))
