"""Weight Standardization: each filter is centred and scaled before it is used."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import widened
from anybatch.scheme import Scheme, check_number


def check_fan_in(where: str, weight: Tensor) -> None:
    """Raise a `ValueError` unless each filter of (O, I, *) has two values or more."""
    if weight.dim() < 2 or weight[0].numel() == 1:
        raise ValueError(
            f"{where} needs two values or more in a filter, got weight of shape {tuple(weight.shape)}: a filter that "
            f"has one value, which standardizing would set to 0; use a plain layer there"
        )


@op
def weight_standardize(weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Give each filter zero mean and unit variance over its inputs.

    ``(W - mean) / sqrt(var + eps)``, mean and biased variance over all but the first dimension.
    The released code takes the unbiased variance and adds eps to the standard deviation; we follow the paper's
    formula with eps inside the root, as its authors advise since, because the root's gradient is infinite at 0.
    Statistics are taken in float32 or wider.

    Args:
        weight: (O, I, *), floating point; the result keeps its memory format.
        eps: Added to the variance. A filter whose standard deviation falls near ``sqrt(eps)`` is no longer
            scaled to 1.

    Returns:
        (O, I, *), with the dtype of ``weight``.

    Raises:
        ValueError: If a filter has a single value, which standardizing would set to 0.

    Source:
        Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        arXiv:1903.10520, section "Weight Standardization".
    """
    check_fan_in("weight_standardize", weight)
    w = widened(weight)
    var, mean = torch.var_mean(w, dim=tuple(range(1, w.dim())), correction=0, keepdim=True)
    return ((w - mean) * torch.rsqrt(var + eps)).to(weight.dtype)


class _WSConv(nn.modules.conv._ConvNd):
    """What the three sizes of `WSConv1d` share: the standardized filter in place of the stored one."""

    def __init__(self, *args: object, eps: float = 1e-6, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType] (torch checks them)
        self.eps = eps
        if self.weight[0].numel() == 1:
            raise ValueError(
                f"{type(self).__name__} needs two values or more in a filter to standardize, got weight of shape "
                f"{tuple(self.weight.shape)}; use a plain convolution there"
            )

    def forward(self, input: Tensor) -> Tensor:
        weight = weight_standardize(self.weight, eps=self.eps)
        return self._conv_forward(input, weight, self.bias)  # pyright: ignore[reportAttributeAccessIssue]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


_WSCONV_DOC = """A convolution whose filters are standardized: torch's ``{base}``, its arguments and state dict.

    ``y = conv(x, (W - mean W) / sqrt(var W + eps)) + bias``, biased variance over the inputs of each filter. The
    output's variance grows with the filter's inputs, so a normalization must follow.

    Args:
        eps: Added to the filter's variance; keyword only, behind ``{base}``'s arguments.

    Shape:
        As ``torch.nn.{base}``.

    Raises:
        ValueError: If a filter has a single value.

    Source:
        Qiao et al. 2019, arXiv:1903.10520, section "Weight Standardization".
    """


class WSConv1d(_WSConv, nn.Conv1d):
    __doc__ = _WSCONV_DOC.format(base="Conv1d")


class WSConv2d(_WSConv, nn.Conv2d):
    __doc__ = _WSCONV_DOC.format(base="Conv2d")


class WSConv3d(_WSConv, nn.Conv3d):
    __doc__ = _WSCONV_DOC.format(base="Conv3d")


def ws(*, eps: float = 1e-6) -> Scheme:
    """Weight Standardization in every convolution; a norm must follow, as in ``ws+gn``."""
    check_number("eps", eps)
    one_d, two_d, three_d = (partial(layer, eps=eps) for layer in (WSConv1d, WSConv2d, WSConv3d))
    return Scheme(name="ws", conv=(one_d, two_d, three_d), needs_norm=True, sources=("arXiv:1903.10520",))
