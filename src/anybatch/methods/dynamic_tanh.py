"""Dynamic tanh (DyT): a bounded function of each value in place of a norm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import ChannelLayer, check_has_channels, scaled_and_shifted, widened
from anybatch.scheme import Scheme, check_flag, check_number


@op
def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``y = tanh(alpha * x) * weight + bias``, in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        alpha: (1,), for all channels.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension.

    Source:
        Zhu et al. 2025, "Transformers without Normalization", arXiv:2503.10622.
    """
    check_has_channels(x)
    return scaled_and_shifted(torch.tanh(widened(x) * alpha), weight, bias).to(x.dtype)


class DynamicTanh(ChannelLayer):
    """A bounded function of each value in place of a norm; see `anybatch.functional.dynamic_tanh`.

    ``y = tanh(alpha * x) * weight + bias``. Made for networks with layer normalization: ConvNeXt-B is as good with it
    (83.7 % on ImageNet both). In place of BatchNorm it fails: ResNet-50 falls from 76.2 % to 68.9 %, VGG-19 from 72.7 %
    to 71.0 % (the paper's numbers).

    Args:
        num_channels: C.
        alpha: What the learned ``alpha`` (1,) starts at; the paper's 0.5.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *) to (N, C, *).

    Source:
        Zhu et al. 2025, "Transformers without Normalization", arXiv:2503.10622.
    """

    alpha: nn.Parameter

    def __init__(
        self,
        num_channels: int,
        alpha: float = 0.5,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, affine, device=device, dtype=dtype)
        self.first_alpha = alpha
        self.learn("alpha", alpha, 1, device=device, dtype=dtype)

    def normalize(self, x: Tensor) -> Tensor:
        return dynamic_tanh(x, self.alpha, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, alpha={self.first_alpha}, affine={self.affine}"


def dyt(*, alpha: float = 0.5, affine: bool = True) -> Scheme:
    """Dynamic tanh, a bounded function of each value; made for networks with layer normalization, fails on ResNets."""
    check_number("alpha", alpha)
    check_flag("affine", affine)
    return Scheme(name="dyt", norm=partial(DynamicTanh, alpha=alpha, affine=affine), sources=("arXiv:2503.10622",))
