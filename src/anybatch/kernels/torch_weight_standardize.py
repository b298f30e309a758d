"""Weight Standardization as torch's layer normalization of the flattened filters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anybatch.methods.weight_standardization import weight_standardize


def _refusal(weight: Tensor, *, eps: float = 1e-6) -> str | None:
    if weight.dtype.itemsize < 4:
        # Torch keeps mean and 1/std for backward in half precision: with |mean| / std of 100 no digit of a gradient
        # would be right.
        return f"weight is {weight.dtype}"
    if not weight.is_contiguous():
        return "weight is not contiguous"
    if weight.dim() < 2 or weight[0].numel() <= 1:
        return "the arguments are none that weight_standardize takes"
    return None


@weight_standardize.kernel("torch", refusal=_refusal)
def torch_weight_standardize(weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(weight.flatten(1), (weight[0].numel(),), eps=eps).view_as(weight)
