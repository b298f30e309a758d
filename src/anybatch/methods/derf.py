"""Derf: the error function of each value in place of a norm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import ChannelLayer, check_has_channels, scaled_and_shifted, widened
from anybatch.scheme import Scheme, check_flag, check_number


@op
def dynamic_erf(
    x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``y = erf(alpha * x + shift) * weight + bias``, in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        alpha: (1,), for all channels.
        shift: (1,), for all channels; the paper's s.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension.

    Source:
        Chen et al. 2025, "Stronger Normalization-Free Transformers", arXiv:2512.10938, abstract.
    """
    check_has_channels(x)
    return scaled_and_shifted(torch.erf(widened(x) * alpha + shift), weight, bias).to(x.dtype)


class DynamicErf(ChannelLayer):
    """The error function of each value in place of a norm; see `anybatch.functional.dynamic_erf`.

    ``y = erf(alpha * x + shift) * weight + bias``. Its authors put it in place of layer normalization in transformers
    (ViT-B on ImageNet: 82.8 %, layer normalization 82.3 %, DyT 82.5 %). We know of no result in place of BatchNorm;
    there its relative DyT fails (ResNet-50 falls from 76.2 % to 68.9 %).

    Args:
        num_channels: C.
        alpha: What the learned ``alpha`` (1,) starts at; 0.5 as in the authors' code.
        shift: What the learned ``shift`` (1,) starts at; 0 as in the authors' code.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *) to (N, C, *).

    Source:
        Chen et al. 2025, "Stronger Normalization-Free Transformers", arXiv:2512.10938, abstract; names and first values
        of the parameters from the authors' code, whose state dict this layer loads.
    """

    alpha: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self,
        num_channels: int,
        alpha: float = 0.5,
        shift: float = 0.0,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, affine, device=device, dtype=dtype)
        self.first_alpha, self.first_shift = alpha, shift
        self.learn("alpha", alpha, 1, device=device, dtype=dtype)
        self.learn("shift", shift, 1, device=device, dtype=dtype)

    def normalize(self, x: Tensor) -> Tensor:
        return dynamic_erf(x, self.alpha, self.shift, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, alpha={self.first_alpha}, shift={self.first_shift}, affine={self.affine}"


def derf(*, alpha: float = 0.5, affine: bool = True) -> Scheme:
    """The error function of each value; made for networks with layer normalization, its relative fails on ResNets."""
    check_number("alpha", alpha)
    check_flag("affine", affine)
    return Scheme(name="derf", norm=partial(DynamicErf, alpha=alpha, affine=affine), sources=("arXiv:2512.10938",))
