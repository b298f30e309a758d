"""Local response normalization: torch's layer, made to work in half precision."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import check_has_channels, widened
from anybatch.scheme import Scheme, check_count, check_number


@op
def local_response_norm(x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Divide each value by a power of the mean square over neighboring channels, as torch's function of this name.

    ``y = x / (k + alpha / size * sum of x²) ** beta``, the sum over the ``size`` channels around each (where ``size``
    is even, one more before than behind), channels outside counting as 0. It does not set the scale of activations to
    1, as the norms do: with the defaults values far below 100 pass nearly unchanged, so that a deep network needs as
    much care with its initialization as one without norms. Torch's function has no float16 and no bfloat16 on the CPU
    and squares in half precision elsewhere; here squares and sums are in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        size: Channels in the sum, 1 or more.
        alpha: Of the mean square, so its unit is that of ``x`` to the power -2. The paper multiplies the sum and not
            the mean: its 1e-4 with 5 channels is 5e-4 here.
        beta: The power.
        k: Added, above 0; the paper has 2, torch 1.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, or ``size`` is below 1.

    Source:
        Krizhevsky, Sutskever and Hinton 2012, "ImageNet Classification with Deep Convolutional Neural Networks",
        section 3.3; torch.nn.functional.local_response_norm.
    """
    check_has_channels(x)
    if size < 1:
        raise ValueError(f"size must be 1 or more, got {size}")
    wide = widened(x)
    squares = F.pad(wide.square(), (*(0, 0) * (x.dim() - 2), size // 2, (size - 1) // 2))
    mean = squares.unfold(1, size, 1).mean(-1)
    return (wide / (k + alpha * mean) ** beta).to(x.dtype)


class LocalResponseNorm(nn.LocalResponseNorm):
    """Torch's ``LocalResponseNorm``, in every dtype; see `anybatch.functional.local_response_norm`.

    It does not set the scale of activations, and has no parameters.

    Args:
        size: Channels in the sum, 1 or more.
        alpha: Of the mean square.
        beta: The power.
        k: Added.

    Shape:
        (N, C, *) to (N, C, *).

    Raises:
        ValueError: If ``size`` is below 1, ``k`` is not above 0, or ``alpha`` or ``beta`` is below 0.

    Source:
        Krizhevsky, Sutskever and Hinton 2012, section 3.3.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        _check_options(size, alpha, beta, k)
        super().__init__(size, alpha, beta, k)

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


def _check_options(size: int, alpha: float, beta: float, k: float) -> None:
    check_count("size", size)
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        check_number(name, value)
    if k == 0:
        raise ValueError("k=0 is not above 0: it would divide 0 by 0 where x is 0")


def _of_any_channels(channels: int, **options: Any) -> LocalResponseNorm:
    return LocalResponseNorm(**options)


def lrn(*, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Scheme:
    """Local response normalization with torch's defaults; it shifts nothing, so that convolutions keep their biases."""
    _check_options(size, alpha, beta, k)
    return Scheme(
        name="lrn",
        norm=partial(_of_any_channels, size=size, alpha=alpha, beta=beta, k=k),
        conv_bias=True,
        sources=("doi:10.1145/3065386", "torch.nn.LocalResponseNorm"),
    )
