"""Weight Standardization: each filter is centred and scaled before it is used."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.filters import Rule, StandardizedFilter, check_fan_in, standardized
from anybatch.scheme import Scheme, check_number
from anybatch.suggest import unknown

Variant = Literal["default", "paper", "bcn", "bit", "timm", "aws"]

VARIANTS: dict[str, Rule] = {
    "default": Rule(1e-6),
    "paper": Rule(1e-5, correction=1, place="outside"),
    "bcn": Rule(1e-5, correction=1),
    "bit": Rule(1e-10),
    "timm": Rule(1e-6),
    "aws": Rule(1e-5, correction=1),
}
"""Which variance is taken, where eps goes, and how large it is, in this library and in releases; see
`weight_standardize`."""


def variant_rule(variant: str, eps: float | None) -> Rule:
    """How a variant scales, with its own eps where none is given; a `ValueError` names the variants."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise unknown("variant of weight standardization", variant, VARIANTS)
    rule = VARIANTS[variant]
    return rule if eps is None else dataclasses.replace(rule, eps=eps)


@op
def weight_standardize(
    weight: Tensor, *, eps: float | None = None, variant: Variant = "default", dim: tuple[int, ...] | None = None
) -> Tensor:
    """Give each filter zero mean and unit variance over its inputs.

    ``(W - mean) / sqrt(var + eps)``, mean and biased variance over all but the first dimension. Releases differ, and
    weights must be used with the variant that they were trained with:

    ============== ======== =================== ===== ==============================================================
    variant        variance divided by          eps   where
    ============== ======== =================== ===== ==============================================================
    ``"default"``  biased   ``sqrt(var + eps)`` 1e-6  here
    ``"paper"``    unbiased ``sqrt(var) + eps`` 1e-5  the WS release; mmcv's ``ConvWS``
    ``"bcn"``      unbiased ``sqrt(var + eps)`` 1e-5  the BCN release's ImageNet code
    ``"bit"``      biased   ``sqrt(var + eps)`` 1e-10 BiT
    ``"timm"``     biased   ``sqrt(var + eps)`` 1e-6  timm's ``StdConv2d``
    ``"aws"``      unbiased ``sqrt(var + eps)`` 1e-5  mmcv's ``ConvAWS``, whose scale and shift are the layer's
    ============== ======== =================== ===== ==============================================================

    The paper's formula has the biased variance and leaves eps open; its authors have since advised eps inside the root,
    whose gradient is infinite at 0 otherwise (here a constant filter's is finite in every variant).
    Statistics are taken in float32 or wider.

    Args:
        weight: (O, I, *), floating point; the result keeps its memory format.
        eps: Instead of the variant's. A filter whose standard deviation falls near ``sqrt(eps)`` is no longer scaled
            to 1.
        variant: A row of the table.
        dim: The dimensions over which a filter extends, instead of all but the first.

    Returns:
        (O, I, *), with the dtype of ``weight``.

    Raises:
        ValueError: If a filter has a single value, which standardizing would set to 0, or the variant is unknown.

    Source:
        Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        arXiv:1903.10520, section "Weight Standardization"; the variants: joe-siyuan-qiao/WeightStandardization,
        joe-siyuan-qiao/Batch-Channel-Normalization, google-research/big_transfer, timm, mmcv.
    """
    check_fan_in("weight_standardize", weight, dim)
    return standardized(weight, variant_rule(variant, eps), dim).to(weight.dtype)


class _WeightStandardized(StandardizedFilter):
    """What convolutions, transposed ones and the linear layer share."""

    weight_gamma: Tensor
    weight_beta: Tensor

    def __init__(self, *args: Any, eps: float | None = None, variant: Variant = "default", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if eps is not None:
            check_number("eps", eps)
        self.eps = variant_rule(variant, eps).eps
        self.variant: Variant = variant
        check_fan_in(type(self).__name__, self.by_filter(self.weight), self.filter_dims)
        if variant == "aws":
            shape = self._moments()[0].shape
            like = {"device": self.weight.device, "dtype": self.weight.dtype}
            self.register_buffer("weight_gamma", torch.ones(shape, **like))
            self.register_buffer("weight_beta", torch.zeros(shape, **like))

    def rule(self) -> Rule:
        return variant_rule(self.variant, self.eps)

    def standardize(self, weight: Tensor, gain: Tensor | None = None) -> Tensor:
        if not self.transposed_filters:
            return weight_standardize(weight, eps=self.eps, variant=self.variant)
        filters = self.by_filter(weight)
        return self.as_weight(weight_standardize(filters, eps=self.eps, variant=self.variant, dim=self.filter_dims))

    @property
    def changes_standardized(self) -> bool:
        return self.variant == "aws"

    def standardized(self) -> Tensor:
        made = super().standardized()
        if not self.changes_standardized:
            return made
        return self.as_weight(self.by_filter(made) * self.weight_gamma + self.weight_beta)

    @torch.no_grad()
    def restore_filters(self) -> None:
        """Set the variant ``"aws"``'s scale and shift so that the layer multiplies with its weight as it stands."""
        self.weight_gamma, self.weight_beta = self._moments()

    def _moments(self) -> tuple[Tensor, Tensor]:
        """The scale and shift with which the standardized filter is the stored one."""
        dim, filters = self.filter_dims, self.by_filter(self.weight.detach())
        var, mean = torch.var_mean(filters, dim, correction=1, keepdim=True)
        return (var + self.eps).sqrt(), mean

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        buffers = {f"{prefix}weight_gamma", f"{prefix}weight_beta"}
        if self.variant == "aws" and buffers <= set(missing) and f"{prefix}weight" in state_dict:
            self.restore_filters()
            missing = [key for key in missing if key not in buffers]
        missing_keys += missing

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, variant={self.variant}"


class _WSConv(_WeightStandardized, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardized(), self.bias)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


class _WSConvTranspose(_WeightStandardized, nn.modules.conv._ConvTransposeNd):
    transposed_filters = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        output_padding = self._output_padding(
            input, output_size, kernel_size=list(self.kernel_size), num_spatial_dims=dims, **geometry
        )
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        filters = self.standardized()
        return convolve(input, filters, self.bias, output_padding=output_padding, groups=self.groups, **geometry)


_DOC = """{what} whose filters are standardized: torch's ``{base}``, its arguments and state dict.

    ``y = {op}(x, (W - mean W) / sqrt(var W + eps)) + bias``, biased variance over {inputs}. The
    output's variance grows with the filter's inputs, so a normalization must follow.

    Args:
        eps: Added to the filter's variance; None for the variant's. Keyword only, behind ``{base}``'s arguments, as is
        variant: The form of a release, to use its weights; see `anybatch.functional.weight_standardize`. ``"aws"``
            multiplies the standardized filter by the buffer ``weight_gamma`` and adds ``weight_beta``: a state dict
            without these, such as one trained without standardization, sets them to the standard deviation and mean
            of its filters, with which the layer computes what the plain one did.

    Shape:
        As ``torch.nn.{base}``.

    Raises:
        ValueError: If a filter has a single value, or the variant is unknown.

    Source:
        Qiao et al. 2019, arXiv:1903.10520, section "Weight Standardization"{aside}.
    """
_CONV = partial(_DOC.format, what="A convolution", op="conv", inputs="the inputs of each filter")
_TRANSPOSED = partial(
    _DOC.format,
    what="A transposed convolution",
    op="conv_transpose",
    inputs="what each output channel\n    sums: the input channels of its group and the kernel",
    aside=", which has no transposed\n        convolutions: the unit is ours",
)


class WSConv1d(_WSConv, nn.Conv1d):
    __doc__ = _CONV(base="Conv1d", aside="")


class WSConv2d(_WSConv, nn.Conv2d):
    __doc__ = _CONV(base="Conv2d", aside="")


class WSConv3d(_WSConv, nn.Conv3d):
    __doc__ = _CONV(base="Conv3d", aside="")


class WSConvTranspose1d(_WSConvTranspose, nn.ConvTranspose1d):
    __doc__ = _TRANSPOSED(base="ConvTranspose1d")


class WSConvTranspose2d(_WSConvTranspose, nn.ConvTranspose2d):
    __doc__ = _TRANSPOSED(base="ConvTranspose2d")


class WSConvTranspose3d(_WSConvTranspose, nn.ConvTranspose3d):
    __doc__ = _TRANSPOSED(base="ConvTranspose3d")


class WSLinear(_WeightStandardized, nn.Linear):
    __doc__ = _DOC.format(what="A linear layer", op="linear", base="Linear", inputs="the inputs", aside="")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.standardized(), self.bias)


def ws(*, eps: float | None = None, variant: Variant = "default") -> Scheme:
    """Weight Standardization in every convolution; a norm must follow, as in ``ws+gn``."""
    if eps is not None:
        check_number("eps", eps)
    variant_rule(variant, eps)
    one_d, two_d, three_d = (partial(layer, eps=eps, variant=variant) for layer in (WSConv1d, WSConv2d, WSConv3d))
    return Scheme(name="ws", conv=(one_d, two_d, three_d), needs_norm=True, sources=("arXiv:1903.10520",))
