"""A batch against its parts: equal for norms of single samples to the last digits, and not for those of the batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import anybatch
from anybatch.probe import split_invariance
from probe.models import small

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "scheme", ["gn:auto", "ws+gn:auto", "in", "pn", "kn", "lcn(window=5)", "frn", "evos0:auto", "nf", "frozenbn"]
)
@pytest.mark.parametrize("micro", [1, 2])
def test_single_samples_give_the_gradient_of_the_batch(scheme: str, micro: int) -> None:
    found = split_invariance(anybatch.create_model("resnet8", scheme, num_classes=3), X, micro=micro)
    assert found.dtype == "float64"
    assert found.invariant
    assert found.worst < 1e-12
    assert found.findings[0].level == "good"


@pytest.mark.parametrize("scheme", ["bn", "brn", "ws+bcn(group_size=4)"])
def test_statistics_of_the_batch_give_another_gradient(scheme: str) -> None:
    found = split_invariance(anybatch.create_model("resnet8", scheme, num_classes=3), X)
    assert not found.invariant
    assert found.worst > 0.01
    assert "9 layers take statistics of the batch" in found.findings[0].text


def test_differences_by_hand() -> None:
    # The loss (w mean x)^2 is no mean over samples: its gradient is 2 w (mean x)^2, against 2 w mean(x^2).
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[1.0], [3.0]])
    found = split_invariance(model, x, loss=lambda y, _: y.mean().square())
    (layer,) = found.layers
    weight = abs(model.weight.item())
    assert layer.norm == pytest.approx(2 * weight * 4)
    assert layer.relative == pytest.approx((5 - 4) / 4)
    assert layer.cosine == pytest.approx(1)


def test_labels_take_cross_entropy_and_dropout_does_not_count() -> None:
    model = nn.Sequential(small(partial(nn.GroupNorm, 4), nn.Dropout(0.5)), nn.Flatten(), nn.Linear(2048, 3))
    found = split_invariance(model, X, torch.tensor([0, 1, 2, 0]), micro=2)
    assert found.worst < 1e-12
    assert max(x.norm for x in found.layers) > 0


def test_without_a_copy_rounding_is_told_apart() -> None:
    found = split_invariance(small(partial(nn.GroupNorm, 4)), X, double=False)
    assert found.dtype == "float32"
    assert 1e-12 < found.worst < 1e-4
    assert found.invariant


@pytest.mark.parametrize("micro", [0, 3, 4, True])
def test_parts_that_do_not_divide_the_batch_are_refused(micro: int) -> None:
    with pytest.raises(ValueError, match="micro must be a divisor of the 4 samples"):
        split_invariance(small(nn.BatchNorm2d), X, micro=micro)


def test_parts_that_the_model_does_not_take_are_told() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"fails on x of shape \(1, 3, 16, 16\)"):
        split_invariance(model, X)
