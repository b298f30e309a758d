"""Channel statistics by hand and against batch normalization's, which are 0 and 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anybatch
from anybatch.probe import elimination_singularities
from probe.models import small

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.0])
def test_batch_norm_is_at_distance_0_whatever_its_scale(scale: float) -> None:
    model = small(nn.BatchNorm2d)
    for layer in (model[1], model[4]):
        nn.init.constant_(layer.weight, scale)  # pyright: ignore[reportArgumentType]
        nn.init.constant_(layer.bias, scale)  # pyright: ignore[reportArgumentType]
        layer.eps = 1e-12  # pyright: ignore[reportAttributeAccessIssue]
    first = elimination_singularities(model, X).layers[0]
    assert first.spread < 1e-6
    assert first.distance < 1e-6
    assert max(first.dead, first.linear) == 0


def test_group_norm_by_hand() -> None:
    # Two channels of constants: the mean 0 and the second moment 1 of the group put them at -1 and 1, with deviation 0.
    x = torch.empty(2, 2, 2, 2)
    x[:, 0], x[:, 1] = 3.0, 5.0
    (layer,) = elimination_singularities(nn.Sequential(nn.GroupNorm(1, 2, eps=0)), x).layers
    assert layer.means == pytest.approx((-1, 1))
    assert layer.deviations == pytest.approx((0, 0), abs=1e-6)
    assert (layer.spread, layer.distance) == pytest.approx((1, 1))
    assert (layer.dead, layer.linear) == (0.5, 0.5)


def test_dead_units_are_told() -> None:
    model = small(nn.BatchNorm2d)
    with torch.no_grad():
        model[1].bias[:2] = -9.0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        model[1].bias[2] = 9.0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    found = elimination_singularities(model, X)
    assert (found.layers[0].dead, found.layers[0].linear) == (0.25, 0.125)
    assert "most in 1 (25 %)" in found.findings[0].text
    assert found.findings[0].level == "warning"


@pytest.mark.parametrize("scheme", ["gn:auto", "ws+bcn(group_size=4)", "in", "pn"])
def test_activations_inside_a_norm_are_left_out(scheme: str) -> None:
    model = anybatch.create_model("resnet8", scheme, num_classes=4)
    layer = elimination_singularities(model, X).layers[0]
    mean, second = sum(layer.means) / 16, sum(m * m + s * s for m, s in zip(layer.means, layer.deviations, strict=True))
    assert mean == pytest.approx(0, abs=1e-4)  # ReLU would leave it above 0
    assert second / 16 == pytest.approx(1, rel=0.02)


def test_networks_without_norms_show_their_convolutions() -> None:
    found = elimination_singularities(anybatch.create_model("resnet8", "kn", num_classes=4), X)
    assert {x.measured for x in found.layers} == {"convolution"}
    for layer in found.layers:
        second = sum(m * m + s * s for m, s in zip(layer.means, layer.deviations, strict=True)) / len(layer.means)
        assert second == pytest.approx(1, rel=1e-6)


def test_weight_standardization_brings_channels_together() -> None:
    torch.manual_seed(0)
    plain, standardized = (
        max(x.spread for x in elimination_singularities(anybatch.create_model("resnet8", s, num_classes=4), X).layers)
        for s in ("gn:auto", "ws+gn:auto")
    )
    assert standardized < plain / 2


def test_models_with_nothing_to_see_are_refused() -> None:
    with pytest.raises(ValueError, match="neither norms of channels nor convolutions"):
        elimination_singularities(nn.Linear(3, 2), torch.randn(4, 3))


def test_timm_norms_with_activations() -> None:
    timm = pytest.importorskip("timm")
    layer = timm.layers.BatchNormAct2d(3)
    (found,) = elimination_singularities(nn.Sequential(layer), X + 2).layers
    assert max(found.spread, found.distance) < 1e-4
