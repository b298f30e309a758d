"""Weight Standardization of filters as rows in C, for float32 on the CPU: each is read once forward, twice backward."""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.kernels.native_common import function, refused_native
from anybatch.kernels.recompute import several_at_once
from anybatch.methods.filters import Rows, Rule, pulled_rows, standardized_rows

_PLACES = ("inside", "outside", "floor")


def _refused(rows: Tensor, *others: Tensor | None) -> str | None:
    if reason := refused_native(rows):
        return reason
    if any(t is not None and (t.dtype != rows.dtype or not t.is_contiguous()) for t in (rows, *others)):
        return "rows or gains are not contiguous, or of several dtypes"
    return None


def _refusal(rows: Tensor, rule: Rule, gain: Tensor | None = None) -> str | None:
    return _refused(rows, gain)


@standardized_rows.kernel("native", refusal=_refusal)
def native_standardized_rows(rows: Tensor, rule: Rule, gain: Tensor | None = None) -> Rows:
    made, (mean, scale, pull) = torch.empty_like(rows), rows.new_empty((3, len(rows), 1))
    place = (_PLACES.index(rule.place), rule.divisor(rows.shape[1]), rule.eps)
    function("standardized_rows", "iippiddpppp")(*rows.shape, rows, gain, *place, made, mean, scale, pull)
    return Rows(made, mean, scale, pull)


def _refusal_of_pull(
    gradient: Tensor, values: Tensor, mean: Tensor | None, scale: Tensor, pull: Tensor | None, gain: Tensor | None
) -> str | None:
    if several_at_once(gradient):
        return "there are several gradients at once"
    return "torch standardized the rows" if pull is None else _refused(values, gradient, mean, scale, pull, gain)


@pulled_rows.kernel("native", refusal=_refusal_of_pull)
def native_pulled_rows(
    gradient: Tensor, values: Tensor, mean: Tensor | None, scale: Tensor, pull: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    made, along = torch.empty_like(values), torch.empty_like(scale)
    numbers = (mean, scale, pull, gain)
    function("pulled_rows", "iipppppppp")(*values.shape, gradient, values, *numbers, made, along)
    return made, None if gain is None else along
