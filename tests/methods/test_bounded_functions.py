"""What is special about DyT and Derf: values by hand, first values, the released names of parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import anybatch
from anybatch.functional import dynamic_erf, dynamic_tanh
from anybatch.layers import DynamicErf, DynamicTanh


def test_by_hand() -> None:
    x = torch.tensor([[-2.0, 4.0]], dtype=torch.float64)
    alpha, shift = torch.tensor([0.25]).double(), torch.tensor([0.5]).double()
    weight, bias = torch.tensor([[2.0, 3.0], [1.0, 0.0]], dtype=torch.float64)
    y = dynamic_tanh(x, alpha, weight, bias)
    torch.testing.assert_close(y, torch.tensor([[1 - 2 * math.tanh(0.5), 3 * math.tanh(1.0)]], dtype=torch.float64))
    y = dynamic_erf(x, alpha, shift, weight, bias)
    torch.testing.assert_close(y, torch.tensor([[1.0, 3 * math.erf(1.5)]], dtype=torch.float64))


def test_layers_start_as_the_papers_do_and_reset_to_it() -> None:
    x = 3 * torch.randn(2, 6, 5, 7)
    for layer, expected in [
        (DynamicTanh(6), torch.tanh(0.5 * x)),
        (DynamicErf(6), torch.erf(0.5 * x)),
        (DynamicTanh(6, 0.8), torch.tanh(0.8 * x)),
        (DynamicErf(6, 0.8, -0.3), torch.erf(0.8 * x - 0.3)),
    ]:
        torch.testing.assert_close(layer(x), expected)
        for p in layer.parameters():
            nn.init.normal_(p)
        layer.reset_parameters()
        torch.testing.assert_close(layer(x), expected)


def test_parameters_have_the_released_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in DynamicErf(6).named_parameters()}
    assert shapes == {"weight": (6,), "bias": (6,), "alpha": (1,), "shift": (1,)}
    shapes = {name: tuple(p.shape) for name, p in DynamicTanh(6).named_parameters()}
    assert shapes == {"weight": (6,), "bias": (6,), "alpha": (1,)}


def test_values_stay_bounded_whatever_the_input() -> None:
    x = 1e30 * torch.randn(2, 6, 5, 7)
    for layer in (DynamicTanh(6), DynamicErf(6)):
        assert layer(x).abs().max() == 1


def test_refusals() -> None:
    for call in (lambda x: dynamic_tanh(x, torch.ones(1)), lambda x: dynamic_erf(x, torch.ones(1), torch.ones(1))):
        with pytest.raises(ValueError, match=r"x must be \(N, C, \*\), got shape \(5,\)"):
            call(torch.zeros(5))
    with pytest.raises(ValueError, match="DynamicTanh is made for 6 channels, got x of shape"):
        DynamicTanh(6)(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match="alpha=-1 is not a number from 0 to below inf"):
        anybatch.scheme("dyt(alpha=-1)")


def test_parts() -> None:
    for spec, kind in [("dyt(alpha=0.7)", DynamicTanh), ("DynamicTanh(alpha=0.7)", DynamicTanh), ("derf", DynamicErf)]:
        layer = anybatch.scheme(spec).norm(6)  # pyright: ignore[reportOptionalCall, reportCallIssue]
        assert isinstance(layer, kind)
        assert layer.first_alpha == (0.7 if "0.7" in spec else 0.5)
