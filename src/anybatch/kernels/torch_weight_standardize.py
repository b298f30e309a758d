"""Weight Standardization, plain and scaled, by torch's layer normalization of the filters as rows in memory.

Backward keeps the weight, which lives anyway, and two or three numbers a filter. With c = W - mean W, S = sum c^2,
Z = s(S) c and the gradient g of gain * Z:

    d W = s gain (g - mean g) - q gain <g, Z> Z,  q = -2 s'(S) / s^2,  d gain = <g, Z>

of which torch's backward of layer normalization is the case s = 1 / sqrt(S / N + eps).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas
from anybatch.methods.common import widened
from anybatch.methods.filters import Rule, as_rows, from_rows, pulled_rows, standardized_rows
from anybatch.methods.scaled_weight_standardization import filter_rule, scaled_weight_standardize
from anybatch.methods.weight_standardization import VARIANTS, variant_rule, weight_standardize


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, rule: Rule, reference: Any) -> Tensor:
        rows = widened(as_rows(weight))  # pyright: ignore[reportArgumentType] (as `_refusal` made sure)
        done = standardized_rows(rows, rule, None if gain is None else gain.reshape(-1, 1).to(rows.dtype))
        ctx.reference = reference
        ctx.save_for_backward(weight, gain, done.mean, done.scale, done.pull)
        return from_rows(done.made.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, gain, mean, scale, pull = ctx.saved_tensors
        if taken_in_formulas(gradient):  # a gradient that is differentiated again
            return *recomputed_gradients(ctx.reference, (weight, gain), gradient), None, None
        rows, g = widened(as_rows(weight)), widened(as_rows(gradient, like=weight))  # pyright: ignore[reportArgumentType]
        gain_o1 = None if gain is None else gain.reshape(-1, 1).to(rows.dtype)
        pulled, along = pulled_rows(g, rows, mean, scale, pull, gain_o1)
        to_gain = None if gain is None or along is None else along.to(gain.dtype).reshape(gain.shape)
        return from_rows(pulled.to(weight.dtype), weight), to_gain, None, None


def _refusal(weight: Tensor) -> str | None:
    if (reason := refused_tracing()) is not None:
        return reason
    if type(weight) is not Tensor and type(weight) is not nn.Parameter:
        return f"weight is a {type(weight).__name__}"
    if not weight.is_floating_point() or weight.dim() < 2 or weight[:1].numel() <= 1:
        return "the arguments are none that weight standardization takes"
    return None if as_rows(weight) is not None else "filters are no rows in memory"


def _refusal_of_ws(
    weight: Tensor, *, eps: float | None = None, variant: str = "default", dim: tuple[int, ...] | None = None
) -> str | None:
    if dim is not None:
        return "dim is given"
    return f"variant {variant!r} is unknown" if variant not in VARIANTS else _refusal(weight)


def _refusal_of_sws(
    weight: Tensor, gain: Tensor | None = None, *, eps: float = 1e-4, eps_rule: str = "max"
) -> str | None:
    if eps_rule not in ("max", "add"):
        return f"eps_rule={eps_rule!r} is unknown"
    if gain is not None and (gain.numel() != len(weight) or not gain.is_floating_point()):
        return "gain is not one number a filter"
    return _refusal(weight)


@weight_standardize.kernel("torch", refusal=_refusal_of_ws)
def torch_weight_standardize(weight: Tensor, *, eps: float | None = None, variant: Any = "default", **_: Any) -> Tensor:
    def reference(w: Tensor, _: None) -> Tensor:
        return weight_standardize.reference(w, eps=eps, variant=variant)

    return _Standardize.apply(weight, None, variant_rule(variant, eps), reference)


@scaled_weight_standardize.kernel("torch", refusal=_refusal_of_sws)
def torch_scaled_weight_standardize(
    weight: Tensor, gain: Tensor | None = None, *, eps: float = 1e-4, eps_rule: Any = "max"
) -> Tensor:
    reference = partial(scaled_weight_standardize.reference, eps=eps, eps_rule=eps_rule)
    return _Standardize.apply(weight, gain, filter_rule(eps_rule, eps, weight[0].numel()), reference)
