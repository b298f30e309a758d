"""Batch Renormalization by torch's batch normalization, which keeps nothing but its input for backward."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from anybatch.methods.batch_renorm import batch_renorm, check_input, corrected_affine
from anybatch.methods.common import widened


def _refusal(x: Tensor, *_: Any, **__: Any) -> str | None:
    # On the CPU torch rounds the normalized value to half precision before it scales and shifts it.
    return f"x is {x.dtype} on the CPU" if x.dtype.itemsize < 4 and x.device.type == "cpu" else None


@batch_renorm.kernel("torch", refusal=_refusal)
def torch_batch_renorm(
    x: Tensor, r: Tensor, d: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    check_input(x, r)
    wide = widened(x[:0]).dtype
    scale, shift = (values.to(wide) for values in corrected_affine(r, d, weight, bias))
    return F.batch_norm(x, None, None, scale, shift, True, 0.0, eps)
