"""What is special about local response normalization: torch's values, half precision, biases before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch
from anybatch.functional import local_response_norm
from anybatch.layers import LocalResponseNorm
from anybatch.models.blocks import Pieces
from helpers import assert_error_within


def test_by_hand() -> None:
    # Sums of squares over 3 channels of 1, 2, 3: 1 + 4, 1 + 4 + 9, 4 + 9; with alpha 3, k 1: 1 + 5, 1 + 14, 1 + 13.
    x = torch.tensor([[[1.0], [2.0], [3.0]]], dtype=torch.float64)
    y = local_response_norm(x, 3, 3.0, 0.5, 1.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([6**-0.5, 2 * 15**-0.5, 3 * 14**-0.5], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 8, 9), (2, 8, 5, 7), (2, 8, 1, 1), (2, 8, 3, 4, 5), (2, 1, 5, 7)])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 20])
def test_equals_torchs_function(shape: tuple[int, ...], size: int) -> None:
    x = 30 * torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(local_response_norm(x, size, 0.1, 0.7, 2.0), F.local_response_norm(x, size, 0.1, 0.7, 2))
    torch.testing.assert_close(LocalResponseNorm()(x), nn.LocalResponseNorm(5)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_takes_values_whose_squares_overflow(dtype: torch.dtype) -> None:
    x = (3e4 * torch.randn(2, 8, 5, 7)).clamp(-6e4, 6e4).to(dtype)
    exact = local_response_norm(x.double())
    assert_error_within(local_response_norm(x), exact, torch.finfo(dtype).eps * exact.abs().max().item())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, C, \*\), got shape \(5,\)"):
        local_response_norm(torch.zeros(5))
    with pytest.raises(ValueError, match="size must be 1 or more, got 0"):
        local_response_norm(torch.zeros(2, 5, 3), 0)
    with pytest.raises(ValueError, match="size must be 1 or more, got -1"):
        local_response_norm(torch.zeros(2, 5, 3), -1)
    with pytest.raises(ValueError, match="size must be a whole number of 1 or more, got -1"):
        LocalResponseNorm(-1)
    for spec, message in [
        ("lrn(size=0)", "size must be a whole number of 1 or more, got 0"),
        ("lrn(size=2.5)", "size must be a whole number of 1 or more, got 2.5"),
        ("lrn(alpha=-1)", "alpha=-1 is not a number from 0 to below inf"),
        ("lrn(k=0)", "k=0 is not above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            anybatch.scheme(spec)


def test_the_part_keeps_the_biases_of_convolutions() -> None:
    scheme = anybatch.scheme("lrn(size=3, alpha=0.1, beta=0.5, k=2)")
    layer = Pieces(scheme).norm(12)
    assert isinstance(layer, LocalResponseNorm)
    assert (layer.size, layer.alpha, layer.beta, layer.k) == (3, 0.1, 0.5, 2)
    with_bias = {spec: Pieces(anybatch.scheme(spec)).conv(2, 4, 3).bias is not None for spec in ("lrn", "ws+lrn", "pn")}
    assert with_bias == {"lrn": True, "ws+lrn": True, "pn": False}
