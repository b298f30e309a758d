"""A quadratic loss, whose gradient changes as worked out; and the parts that Weight Standardization removes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from anybatch.layers import WSConv2d, WSConvTranspose2d
from anybatch.probe import smoothness
from anybatch.probe.subject import SEED


def test_a_quadratic_by_hand() -> None:
    # loss = w^2 / 2 at w = 2 with x = 1: gradient 2; at a distance d against it, w = 2 - d.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    found = smoothness(model, torch.ones(2, 1), steps=(0.1, 0.5), loss=lambda y, _: y.square().mean() / 2)
    assert (found.loss, found.gradient) == (2.0, 2.0)
    assert [s.loss for s in found.steps] == pytest.approx([1.8**2 / 2, 0.5])
    assert [s.change for s in found.steps] == pytest.approx([0.1, 0.5])
    assert [s.smoothness for s in found.steps] == pytest.approx([1.0, 1.0])  # the second derivative
    assert found.layers == ()


def test_parts_of_a_plain_filter_by_hand() -> None:
    # y = <w, x>, loss = y: the gradient is x = (3, 1, 1, -1); w = (1, -1, 0, 0) has mean 0.
    conv = nn.Conv2d(1, 1, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0]).reshape(1, 1, 2, 2))
    x = torch.tensor([3.0, 1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    (layer,) = smoothness(conv, x, loss=lambda y, _: y.sum()).layers
    assert layer.mean == pytest.approx(4**2 / 4 / 12)
    assert layer.radial == pytest.approx(2**2 / 2 / 12)


@pytest.mark.parametrize("kind", [WSConv2d, WSConvTranspose2d])
def test_the_theorem_of_weight_standardization(kind: type[WSConv2d]) -> None:
    # |dL/dW|^2 = (|g|^2 - <1, g>^2 / I - <g, W>^2 / I) / var for each filter: one filter, so that norms are its own.
    torch.manual_seed(0)
    layer = kind(3, 1, 3, eps=1e-12, bias=False).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = smoothness(layer, x)
    assert found.standardized
    used = layer.standardized().detach().requires_grad_(True)
    convolve = nn.functional.conv_transpose2d if kind is WSConvTranspose2d else nn.functional.conv2d
    y = convolve(x, used)
    target = torch.randn(
        y.shape[1:],
        generator=torch.Generator().manual_seed(SEED),
        dtype=torch.float64,
    )
    (g,) = torch.autograd.grad(((y - target) ** 2).mean() / 2, used)
    squared = float(g.square().sum())
    left = squared * (1 - found.mean - found.radial) / layer.weight.var(correction=0).item()
    assert found.gradient**2 == pytest.approx(left, rel=1e-9)
    assert found.mean == pytest.approx(float(g.sum() ** 2) / 27 / squared, rel=1e-9)


class Chosen(nn.Linear):
    """Gives the number of the largest output."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).argmax(1)


def test_steps_that_lead_nowhere_are_refused() -> None:
    model = nn.Linear(3, 2)
    for steps in ((), (0.0,), (-1.0,), (float("inf"),)):
        with pytest.raises(ValueError, match="steps must be numbers above 0"):
            smoothness(model, torch.randn(2, 3), steps=steps)
    with pytest.raises(ValueError, match="no floating point tensor with a gradient"):
        smoothness(Chosen(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="ReLU has no parameters to move"):
        smoothness(nn.ReLU(), torch.randn(2, 3))


def test_a_rough_landscape_is_told() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    found = smoothness(model, torch.ones(1, 1), steps=(0.5,), loss=lambda y, _: (100 * y).cos().mean() + 0 * y.sum())
    assert found.findings[0].level == "warning"
