"""Weight Standardization as torch's layer normalization of the flattened filters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from anybatch.methods.weight_standardization import VARIANTS, weight_standardize


def _refusal(
    weight: Tensor, *, eps: float | None = None, variant: str = "default", dim: tuple[int, ...] | None = None
) -> str | None:
    if weight.dtype.itemsize < 4:
        # Torch keeps mean and 1/std for backward in half precision: with |mean| / std of 100 no digit of a gradient
        # would be right.
        return f"weight is {weight.dtype}"
    if not weight.is_contiguous():
        return "weight is not contiguous"
    if dim is not None:
        return "dim is given"
    if not weight.is_floating_point() or weight.dim() < 2 or weight[0].numel() <= 1 or variant not in VARIANTS:
        return "the arguments are none that weight_standardize takes"
    rule = VARIANTS[variant]
    if (rule.correction, rule.place) != (0, "inside"):
        return f"variant {variant!r} is not layer normalization's"
    return None


@weight_standardize.kernel("torch", refusal=_refusal)
def torch_weight_standardize(weight: Tensor, *, eps: float | None = None, variant: str = "default", **_: Any) -> Tensor:
    eps = VARIANTS[variant].eps if eps is None else eps
    return F.layer_norm(weight.flatten(1), (weight[0].numel(),), eps=eps).view_as(weight)
