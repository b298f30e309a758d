"""Scaled Weight Standardization: filters of zero mean and unit norm, times a gain, for networks without norms."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import widened
from anybatch.methods.filters import Rule, StandardizedFilter, check_fan_in, standardized
from anybatch.scheme import Scheme, check_flag, check_number

EpsRule = Literal["max", "add"]


@op
def scaled_weight_standardize(
    weight: Tensor, gain: Tensor | None = None, *, eps: float = 1e-4, eps_rule: EpsRule = "max"
) -> Tensor:
    """Give each filter zero mean and unit norm, so that its output has the variance of its input; then a gain.

    ``gain * (W - mean) / sqrt(max(N * var, eps))``, mean and biased variance over all but the first dimension, whose
    N values are the filter's fan-in. N var is the squared norm of the centred filter: eps acts only where that norm is
    below 0.01. The paper prints no eps; this is its release's rule. Statistics are taken in float32 or wider.

    Args:
        weight: (O, I, *), floating point; the result keeps its memory format.
        gain: O values of any shape, or None for 1.
        eps: What N var is at least.
        eps_rule: ``"max"`` as released; ``"add"`` for ``sqrt(N * (var + eps))``, which timm computes (with eps 1e-5 in
            its models), to load weights that were trained so: there eps acts on every filter, and more the larger N.

    Returns:
        (O, I, *), with the dtype of ``weight``.

    Raises:
        ValueError: If a filter has a single value, which standardizing would set to 0, or ``eps_rule`` is another word.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 4; Brock et al. 2021, arXiv:2102.06171, section 3; eps of
        their release (deepmind-research, nfnets/base.py).
    """
    check_fan_in("scaled_weight_standardize", weight)
    check_eps_rule(eps_rule)
    made = standardized(weight, filter_rule(eps_rule, eps, weight[0].numel()))
    return (made if gain is None else made * gain.reshape(-1, *(1 for _ in weight.shape[1:]))).to(weight.dtype)


def check_eps_rule(eps_rule: str) -> None:
    """Raise a `ValueError` for a rule that does not exist."""
    if eps_rule not in ("max", "add"):
        raise ValueError(f"eps_rule={eps_rule!r} is neither 'max' nor 'add'")


def filter_rule(eps_rule: EpsRule, eps: float, size: int) -> Rule:
    """Of the squared norm itself, which is N var."""
    return Rule(eps, correction=None, place="floor") if eps_rule == "max" else Rule(size * eps, correction=None)


class _ScaledWS(StandardizedFilter):
    """What convolutions and the linear layer share: gain, initialization, and the filter they multiply with."""

    weight_gamma: Tensor
    weight_beta: Tensor

    def __init__(
        self,
        *args: Any,
        gamma: float = 1.0,
        eps: float = 1e-4,
        eps_rule: EpsRule = "max",
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs, device=device, dtype=dtype)
        check_fan_in(type(self).__name__, self.weight)
        check_eps_rule(eps_rule)
        check_number("gamma", gamma)
        check_number("eps", eps)
        check_flag("affine", affine)
        self.gamma = gamma
        self.eps = eps
        self.eps_rule: EpsRule = eps_rule
        self.affine = affine
        self.gain = nn.Parameter(torch.empty(len(self.weight), device=device, dtype=dtype))
        if affine:
            shape = (len(self.weight), *(1 for _ in self.weight.shape[1:]))
            self.register_buffer("weight_gamma", torch.ones(shape, device=device, dtype=dtype))
            self.register_buffer("weight_beta", torch.zeros(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Filters normal with variance 1 / fan-in (LeCun's), biases 0, gains 1."""
        if not hasattr(self, "gain"):
            return  # torch's constructor calls this before the gain is there
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.ones_(self.gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def rule(self) -> Rule:
        return filter_rule(self.eps_rule, self.eps, self.weight[0].numel())

    def standardize(self, weight: Tensor, gain: Tensor | None = None) -> Tensor:
        return scaled_weight_standardize(weight, gain, eps=self.eps, eps_rule=self.eps_rule)

    def filter_gain(self) -> Tensor:
        gain_o = self.gain if self.gamma == 1 else self.gamma * self.gain
        return gain_o.reshape(-1, *(1 for _ in self.weight.shape[1:]))

    @property
    def changes_standardized(self) -> bool:
        return self.affine

    def standardized(self) -> Tensor:
        made = super().standardized()
        return made * self.weight_gamma + self.filter_gain() * self.weight_beta if self.affine else made

    @torch.no_grad()
    def restore_filters(self) -> None:
        """Set an ``affine`` layer's scale and shift, and gain 1, so that it multiplies with its weight as it stands."""
        rows = widened(self.weight).flatten(1)
        mean = rows.mean(1, keepdim=True)
        scale = self.rule().scale((rows - mean).square().sum(1), rows.shape[1])
        self.weight_gamma.copy_((1 / (self.gamma * scale)).reshape(self.weight_gamma.shape))
        self.weight_beta.copy_((mean / self.gamma).reshape(self.weight_beta.shape))
        nn.init.ones_(self.gain)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        gain = state_dict.get(f"{prefix}gain")
        if isinstance(gain, Tensor) and gain.dim() > 1 and gain.numel() == self.gain.numel():
            state_dict[f"{prefix}gain"] = gain.reshape(-1)  # timm's is (O, 1, 1, 1); the dict is load_state_dict's own
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}, eps={self.eps}, eps_rule={self.eps_rule}" + (
            ", affine=True" if self.affine else ""
        )


class _ScaledWSConv(_ScaledWS, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardized(), self.bias)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


_DOC = """{what} whose filters have zero mean and norm ``gain``: torch's ``{base}`` and its arguments.

    ``y = {op}(x, gamma * gain * (W - mean W) / sqrt(max(N * var W, eps))) + bias``, biased variance over the N inputs
    of each filter. Where the inputs of a filter are independent and share a mean, which it cancels, and a variance, the
    output has that variance: behind an activation times its gain (`ScaledActivation`), 1. Filters start normal with
    variance 1 / N, biases at 0. The published networks keep the bias everywhere.{depthwise}

    Args:
        gamma: A constant factor of the filter: an activation's gain where, as in the paper and in timm's models, it is
            not applied to the activation.
        eps: What N var is at least.
        eps_rule: ``"max"`` as released; ``"add"`` for ``sqrt(N * (var + eps))``, as timm computes (eps 1e-5).
        affine: Whether constants stand between standardizing and gain, one scale and one shift for each filter, as in
            Weight Standardization's variant ``"aws"``: the buffers ``weight_gamma`` and ``weight_beta``. With them
            filters that were trained without standardization stay what they are: ``restore_filters()``.

    All keyword only, behind ``{base}``'s arguments.

    Learned beside the filter: ``gain`` (O,), first 1. A state dict may hold it as (O, 1, 1, 1), as timm's
    ``ScaledStdConv2d`` does.

    Shape:
        As ``torch.nn.{base}``.

    Raises:
        ValueError: If a filter has a single value.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 4; Brock et al. 2021, arXiv:2102.06171, section 3.
    """
_DEPTHWISE = """ Depthwise filters are allowed but over-constrained: two of
    their nine values, in a 3 x 3 kernel, are no longer free."""


class ScaledWSConv1d(_ScaledWSConv, nn.Conv1d):
    __doc__ = _DOC.format(what="A convolution", op="conv", base="Conv1d", depthwise=_DEPTHWISE)


class ScaledWSConv2d(_ScaledWSConv, nn.Conv2d):
    __doc__ = _DOC.format(what="A convolution", op="conv", base="Conv2d", depthwise=_DEPTHWISE)


class ScaledWSConv3d(_ScaledWSConv, nn.Conv3d):
    __doc__ = _DOC.format(what="A convolution", op="conv", base="Conv3d", depthwise=_DEPTHWISE)


class ScaledWSLinear(_ScaledWS, nn.Linear):
    __doc__ = _DOC.format(what="A linear layer", op="linear", base="Linear", depthwise="")

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.standardized(), self.bias)


def sws(*, gamma: float = 1.0, eps: float = 1e-4, eps_rule: EpsRule = "max") -> Scheme:
    """Scaled Weight Standardization in every convolution and nothing else; meant for ``nf``, which adds the rest."""
    check_number("gamma", gamma)
    check_number("eps", eps)
    check_eps_rule(eps_rule)
    one_d, two_d, three_d = (
        partial(layer, gamma=gamma, eps=eps, eps_rule=eps_rule)
        for layer in (ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d)
    )
    return Scheme(name="sws", conv=(one_d, two_d, three_d), sources=("arXiv:2101.08692", "arXiv:2102.06171"))
