"""The baseline is torch's own layer, with its statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anybatch
from anybatch.models.blocks import Pieces


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
def test_each_number_of_dimensions_gets_its_layer(dims: int, kind: type[nn.Module]) -> None:
    layer = Pieces(anybatch.scheme("bn(momentum=0.25,eps=0.5)"), dims=dims).norm(6)
    assert type(layer) is kind
    assert (layer.num_features, layer.momentum, layer.eps) == (6, 0.25, 0.5)


def test_defaults_are_torchs() -> None:
    ours, theirs = Pieces(anybatch.scheme("bn")).norm(6), nn.BatchNorm2d(6)
    assert repr(ours) == repr(theirs)


def test_by_hand() -> None:
    # The channel holds 1, 3, 5, 7 over batch and positions: mean 4, biased variance 5, unbiased 20/3.
    layer = Pieces(anybatch.scheme("bn(eps=4.0,momentum=0.5)")).norm(1)
    y = layer(torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]]))
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))
    torch.testing.assert_close(layer.running_mean, torch.tensor([2.0]))
    torch.testing.assert_close(layer.running_var, torch.tensor([0.5 * 1 + 0.5 * 20 / 3]))
    layer.eval()
    torch.testing.assert_close(
        layer(torch.tensor([[[[4.0]]]])).flatten(), torch.tensor([2.0]) / (0.5 + 10 / 3 + 4) ** 0.5
    )


def test_claims_no_batch_independence() -> None:
    assert not anybatch.scheme("bn").batch_independent
    assert not anybatch.scheme("ws+bn").batch_independent
