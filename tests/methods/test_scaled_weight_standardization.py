"""What is special about Scaled Weight Standardization: values by hand, both rules of eps, timm's layer, refusals."""

from __future__ import annotations

import copy

import pytest
import timm.layers
import torch
from torch import nn

import anybatch
from anybatch.functional import activation_gain, scaled_weight_standardize
from anybatch.layers import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, ScaledWSLinear


def test_by_hand() -> None:
    # 1, 3, 5, 7: mean 4, squared norm 9 + 1 + 1 + 9 = 20.
    w = torch.tensor([[1.0, 3.0, 5.0, 7.0]], dtype=torch.float64)
    centred = torch.tensor([[-3.0, -1.0, 1.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(scaled_weight_standardize(w), centred / 20**0.5)
    torch.testing.assert_close(scaled_weight_standardize(w, torch.tensor([2.0]).double()), 2 * centred / 20**0.5)
    torch.testing.assert_close(scaled_weight_standardize(w, eps=25.0), centred / 5)  # the larger of 20 and 25
    torch.testing.assert_close(scaled_weight_standardize(w, eps=1.25, eps_rule="add"), centred / 5)  # 20 + 4 * 1.25


def test_eps_acts_only_below_a_norm_of_a_hundredth() -> None:
    direction = torch.tensor([[1.0, -1.0]], dtype=torch.float64) / 2**0.5
    unit = scaled_weight_standardize(direction, eps=0.0)
    torch.testing.assert_close(scaled_weight_standardize(0.0101 * direction), unit)
    torch.testing.assert_close(scaled_weight_standardize(0.005 * direction), 0.5 * unit)
    # The sum shrinks every filter, here at a norm of 1 by N * eps.
    added = scaled_weight_standardize(direction, eps=1e-2, eps_rule="add")
    torch.testing.assert_close(added, unit / 1.02**0.5)


def test_output_has_the_variance_of_its_input() -> None:
    conv = ScaledWSConv2d(64, 128, 3, padding=1, padding_mode="circular", bias=False)
    w = conv.standardized().flatten(1)
    torch.testing.assert_close(w.sum(1), torch.zeros(128), rtol=0, atol=1e-5)
    torch.testing.assert_close(w.square().sum(1), torch.ones(128))
    # One filter's output has the variance of its input but for chance; 128 filters' mean has within 3 %.
    assert conv(torch.randn(8, 64, 16, 16)).var().item() == pytest.approx(1, abs=0.03)
    conv.gain.data.fill_(2)
    assert conv(torch.randn(8, 64, 16, 16)).var().item() == pytest.approx(4, abs=0.12)


def test_scale_and_shift_of_a_filter_change_nothing() -> None:
    w = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    scale = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.5
    expected = scaled_weight_standardize(w)
    torch.testing.assert_close(scaled_weight_standardize(scale * w + torch.randn_like(scale)), expected)


def test_gradient_at_a_constant_filter_is_finite() -> None:
    w = torch.full((2, 3, 3, 3), 0.25, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(w)
    (got,) = torch.autograd.grad(scaled_weight_standardize(w), w, g)
    torch.testing.assert_close(got, (g - g.mean(dim=(1, 2, 3), keepdim=True)) / 1e-4**0.5)


@pytest.mark.parametrize("eps_rule", ["max", "add"])
def test_gradgradcheck(eps_rule) -> None:
    w = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w, g: scaled_weight_standardize(w, g, eps_rule=eps_rule), (w, gain))


@pytest.mark.parametrize("gamma", [1.0, activation_gain("relu", released=True)])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "bias": False}, {"groups": 2}, {"dilation": 2, "padding": 2}], ids=str
)
def test_equals_timms_layer(options: dict, eps: float, gamma: float) -> None:
    theirs = timm.layers.ScaledStdConv2d(4, 6, 3, eps=eps, gamma=gamma, **{"padding": 1, **options}).double()
    for p in (theirs.gain, theirs.bias):
        if p is not None:
            nn.init.normal_(p)
    ours = ScaledWSConv2d(4, 6, 3, eps=eps, eps_rule="add", gamma=gamma, **{"padding": 1, **options}).double()
    state = theirs.state_dict()
    ours.load_state_dict(state, strict=True)
    assert state["gain"].shape == (6, 1, 1, 1)  # the caller's own is left as it was
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    again = copy.deepcopy(ours)
    again.reset_parameters()
    again.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(again(x), ours(x), rtol=0, atol=0)


def test_timms_layers_load_inside_a_network() -> None:
    theirs = nn.Sequential(timm.layers.ScaledStdConv2d(3, 4, 3), nn.ReLU(), timm.layers.ScaledStdConv2d(4, 2, 1))
    ours = nn.Sequential(
        *(ScaledWSConv2d(3, 4, 3, padding=1, eps=1e-6, eps_rule="add"), nn.ReLU()),
        ScaledWSConv2d(4, 2, 1, eps=1e-6, eps_rule="add"),
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_gain_of_another_size_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for gain"):
        ScaledWSConv2d(3, 4, 3).load_state_dict(ScaledWSConv2d(3, 5, 3).state_dict())


def test_layers_are_torchs_with_lecuns_initialization() -> None:
    for ours, theirs in [(ScaledWSConv1d, nn.Conv1d), (ScaledWSConv2d, nn.Conv2d), (ScaledWSConv3d, nn.Conv3d)]:
        made = ours(64, 96, 3)
        assert isinstance(made, theirs)
        assert made.weight.std().item() == pytest.approx(made.weight[0].numel() ** -0.5, rel=0.03)
        assert made.bias is not None
        assert not made.bias.any()
        assert made.gain.shape == (96,)
        assert (made.gain == 1).all()
    linear = ScaledWSLinear(6, 4)
    assert isinstance(linear, nn.Linear)
    x = torch.randn(3, 2, 6)
    expected = nn.functional.linear(x, scaled_weight_standardize(linear.weight, linear.gain), linear.bias)
    torch.testing.assert_close(linear(x), expected)


def test_the_fan_in_of_a_grouped_filter_is_its_own() -> None:
    depthwise = ScaledWSConv2d(8, 8, 3, groups=8)
    torch.testing.assert_close(depthwise.standardized().square().sum((1, 2, 3)), torch.ones(8))


def test_standardizes_in_float32_under_autocast() -> None:
    conv = ScaledWSConv2d(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.standardized().dtype == torch.float32
        assert conv(torch.randn(1, 3, 5, 5)).dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"ScaledWSConv2d needs two values or more in a filter, .* \(8, 1, 1, 1\)"):
        ScaledWSConv2d(8, 8, 1, groups=8)
    with pytest.raises(ValueError, match=r"ScaledWSLinear needs two values .* \(4, 1\)"):
        ScaledWSLinear(1, 4)
    with pytest.raises(ValueError, match=r"scaled_weight_standardize needs two values .* \(5,\)"):
        scaled_weight_standardize(torch.ones(5))
    with pytest.raises(ValueError, match="eps_rule='plus' is neither 'max' nor 'add'"):
        scaled_weight_standardize(torch.ones(5, 2), eps_rule="plus")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="eps_rule='plus' is neither"):
        anybatch.scheme("sws(eps_rule=plus)")
    with pytest.raises(ValueError, match="gamma='relu' is not a number"):
        anybatch.scheme("sws(gamma=relu)")


def test_options_reach_the_layers() -> None:
    model = anybatch.create_model("resnet8", "sws(gamma=1.5,eps=0.25,eps_rule=add)", num_classes=2)
    convs = [m for m in model.modules() if isinstance(m, ScaledWSConv2d)]
    assert {(m.gamma, m.eps, m.eps_rule) for m in convs} == {(1.5, 0.25, "add")}
    assert len(convs) == len([m for m in model.modules() if isinstance(m, nn.Conv2d)])
    assert all(m.bias is not None for m in convs)


def test_the_affine_form_by_hand() -> None:
    # 1, 3, 5, 7: mean 4, squared norm about it 20; times 2 and plus 1, all times the gain 3.
    layer = ScaledWSLinear(4, 1, affine=True).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 3.0, 5.0, 7.0]]))
        layer.weight_gamma.fill_(2.0)
        layer.weight_beta.fill_(1.0)
        layer.gain.fill_(3.0)
    standardized = torch.tensor([[-3.0, -1.0, 1.0, 3.0]]).double() / 20**0.5
    torch.testing.assert_close(layer.standardized(), 3 * (2 * standardized + 1))
    layer.restore_filters()
    assert (layer.weight_gamma.item(), layer.weight_beta.item()) == (pytest.approx(20**0.5), 4)
    torch.testing.assert_close(layer.standardized(), layer.weight)


@pytest.mark.parametrize("options", [{}, {"eps_rule": "add", "eps": 1e-2}, {"gamma": 1.7}, {"eps": 1e3}], ids=str)
@pytest.mark.parametrize("kind", [ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d])
def test_the_affine_form_restores_filters(kind, options: dict) -> None:
    layer = kind(4, 6, 3, **options, affine=True).double()
    nn.init.normal_(layer.weight, 0.3)
    nn.init.normal_(layer.gain)
    layer.restore_filters()
    torch.testing.assert_close(layer.standardized(), layer.weight, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.gain[1] = -2.0
    torch.testing.assert_close(layer.standardized()[1], -2 * layer.weight[1], rtol=1e-12, atol=1e-12)
    again = kind(4, 6, 3, **options, affine=True).double()
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.standardized(), layer.standardized(), rtol=0, atol=0)
    assert not any(p is buffer for p in layer.parameters() for buffer in layer.buffers())
    assert {name for name, _ in layer.named_buffers()} == {"weight_gamma", "weight_beta"}


def test_the_affine_form_has_the_gradients_of_its_formula() -> None:
    layer = ScaledWSConv2d(2, 3, 3, affine=True).double()
    layer.restore_filters()

    def filters(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(_Filters(layer), {"layer.weight": weight, "layer.gain": gain}, ())

    inputs = (layer.weight.detach().clone().requires_grad_(), layer.gain.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(filters, inputs)


class _Filters(nn.Module):
    def __init__(self, layer: ScaledWSConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return self.layer.standardized()
