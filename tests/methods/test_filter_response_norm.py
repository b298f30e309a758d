"""What is special about filter response normalization: values by hand, timm's layer, the threshold, maps of 1 x 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anybatch
from anybatch.functional import filter_response_norm
from anybatch.layers import FilterResponseNorm1d, FilterResponseNorm2d
from anybatch.models.blocks import Pieces
from helpers import assert_error_within


def test_by_hand() -> None:
    # Mean of squares of 1, 7: 25. With eps 11 the root is 6.
    x = torch.tensor([[[1.0, 7.0], [-7.0, 1.0]]], dtype=torch.float64)
    weight, bias, tau = torch.tensor([[6.0, 12.0], [0.0, 1.0], [2.0, -5.0]], dtype=torch.float64)
    y = filter_response_norm(x, weight, bias, eps=11.0)
    torch.testing.assert_close(y, torch.tensor([[[1.0, 7.0], [-13.0, 3.0]]], dtype=torch.float64))
    y = filter_response_norm(x, weight, bias, tau, eps=11.0)
    torch.testing.assert_close(y, torch.tensor([[[2.0, 7.0], [-5.0, 3.0]]], dtype=torch.float64))
    y = filter_response_norm(x, weight, bias, tau, torch.tensor([-10.0]).double(), eps=1.0)
    torch.testing.assert_close(y, torch.tensor([[[2.0, 7.0], [-5.0, 3.0]]], dtype=torch.float64))


@pytest.mark.parametrize("apply_act", [True, False])
def test_is_timms_layer_and_loads_its_state_dict(apply_act: bool) -> None:
    timm_layers = pytest.importorskip("timm.layers.filter_response_norm")
    theirs = timm_layers.FilterResponseNormTlu2d(6, apply_act=apply_act, eps=1e-2).double()
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = FilterResponseNorm2d(6, 1e-2, apply_act=apply_act).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = (torch.randn(2, 6, 5, 7, dtype=torch.float64) + 0.5).float().double()
    # Its mean of squares is in float32 whatever the input.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_starts_as_a_relu_behind_the_norm() -> None:
    layer, x = FilterResponseNorm2d(6), torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(layer(x), filter_response_norm(x).relu())
    nn.init.normal_(layer.get_parameter("tau"))
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), filter_response_norm(x).relu())


def test_a_scale_changes_nothing_and_a_shift_does() -> None:
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = filter_response_norm(x, eps=0.0)
    torch.testing.assert_close(filter_response_norm(7 * x, eps=0.0), expected)
    assert (filter_response_norm(x + 1, eps=0.0) - expected).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(3, 6, 1, 1), (3, 6)])
def test_one_position_becomes_its_sign(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) + 0.1
    assert_error_within(filter_response_norm(x), x.sign(), 0.5 * 1e-6 / x.square().min().item())
    y = filter_response_norm(x, eps_l=torch.ones(1), eps=0.0)
    torch.testing.assert_close(y, x / (1 + x.square()).sqrt())


def test_the_learned_eps_lets_gradients_through_maps_of_one_position() -> None:
    x = torch.ones(1, 1, 1, 1, requires_grad=True)
    plain, learned = FilterResponseNorm2d(1), FilterResponseNorm2d(1, learnable_eps=True)
    (without,), (with_it,) = (torch.autograd.grad(layer(x), x) for layer in (plain, learned))
    # Of x / sqrt(x² + eps) at 1: eps / (1 + eps) ** 1.5.
    torch.testing.assert_close(without.item(), 1e-6, rtol=0.1, atol=0)
    torch.testing.assert_close(with_it.item(), 1.01e-4, rtol=1e-2, atol=0)
    learned(x).backward()
    assert learned.get_parameter("eps_l").grad.item() == pytest.approx(-0.5, rel=1e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, C, \*\), got shape \(5,\)"):
        filter_response_norm(torch.zeros(5))
    with pytest.raises(ValueError, match=r"FilterResponseNorm1d takes .* got shape \(2, 6, 3, 3\)"):
        FilterResponseNorm1d(6)(torch.zeros(2, 6, 3, 3))
    for spec, message in [
        ("frn(eps=-1)", "eps=-1 is not a number from 0"),
        ("frn(learnable_eps=yes)", "learnable_eps='yes' is neither True nor False"),
    ]:
        with pytest.raises(ValueError, match=message):
            anybatch.scheme(spec)


def test_the_part_brings_its_activation_except_before_a_join() -> None:
    pieces = Pieces(anybatch.scheme("frn(eps=0.5, learnable_eps=True)"), dims=1)
    norm, act = pieces.norm_act(6)
    assert isinstance(norm, FilterResponseNorm1d)
    assert isinstance(act, nn.Identity)
    assert (norm.eps, norm.learnable_eps, norm.apply_act) == (0.5, True, True)
    last = pieces.norm(6)
    assert not last.apply_act
    assert set(dict(last.named_parameters())) == {"weight", "bias", "eps_l"}
    block = anybatch.create_model("resnet8", "frn", num_classes=2, width=8).layer1[0]
    assert (block.bn1.apply_act, block.bn2.apply_act) == (True, False)
    assert isinstance(block.act2, nn.ReLU)
