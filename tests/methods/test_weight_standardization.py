"""What is special about Weight Standardization: values by hand, timm's layer, the gradient's formula, refusals."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F

import anybatch
from anybatch.dispatch import backend
from anybatch.functional import weight_standardize
from anybatch.layers import WSConv1d, WSConv2d, WSConv3d

CHOICES = pytest.mark.parametrize("choice", ["auto", "reference"])


@CHOICES
def test_by_hand(choice: str) -> None:
    # 1, 3, 5, 7: mean 4, biased variance 5; with eps 4 the root is 3. The unbiased one, 20/3, would give 3.266.
    w = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [2.0, 2.0]]])
    with backend(choice):
        got = weight_standardize(w, eps=4.0)
    torch.testing.assert_close(got, torch.tensor([[[-1.0, -1 / 3], [1 / 3, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))


@CHOICES
def test_eps_is_added_to_the_variance_and_not_to_its_root(choice: str) -> None:
    w = 1e-3 * torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # variance 1e-6, as large as eps
    with backend(choice):
        got = weight_standardize(w)
    torch.testing.assert_close(got, torch.tensor([[0.5**0.5, -(0.5**0.5)]], dtype=torch.float64))


@CHOICES
def test_filters_have_mean_0_and_variance_1(choice: str) -> None:
    w = 5 + torch.randn(8, 4, 3, 3, dtype=torch.float64) * torch.arange(1, 9).reshape(8, 1, 1, 1)
    with backend(choice):
        got = weight_standardize(w, eps=0.0).flatten(1)
    torch.testing.assert_close(got.mean(1), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.var(1, correction=0), torch.ones(8, dtype=torch.float64))


@CHOICES
def test_scale_and_shift_of_a_filter_change_nothing(choice: str) -> None:
    w = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    scale = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.5
    shift = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    with backend(choice):
        expected = weight_standardize(w, eps=0.0)
        torch.testing.assert_close(weight_standardize(scale * w + shift, eps=0.0), expected)
        torch.testing.assert_close(weight_standardize(-w, eps=0.0), -expected)


@CHOICES
def test_gradient_is_the_projection_that_the_paper_derives(choice: str) -> None:
    # dL/dW = (g - mean g - What mean(g What)) / sigma: no part along 1, none along What.
    w = (torch.randn(5, 3, 3, 3, dtype=torch.float64) + 2).requires_grad_()
    g = torch.randn_like(w)
    with backend(choice):
        (got,) = torch.autograd.grad(weight_standardize(w, eps=0.0), w, g)
    rows, g_rows = w.detach().flatten(1), g.flatten(1)
    sigma = rows.var(1, correction=0, keepdim=True).sqrt()
    hat = (rows - rows.mean(1, keepdim=True)) / sigma
    expected = (g_rows - g_rows.mean(1, keepdim=True) - hat * (g_rows * hat).mean(1, keepdim=True)) / sigma
    torch.testing.assert_close(got.flatten(1), expected)
    torch.testing.assert_close(got.flatten(1).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((got.flatten(1) * hat).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


@CHOICES
def test_gradient_at_a_constant_filter_is_finite(choice: str) -> None:
    # var = 0: the result is (W - mean W) / sqrt(eps), whose gradient is (g - mean g) / sqrt(eps).
    w = torch.full((2, 3, 3, 3), 0.25, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(w)
    with backend(choice):
        (got,) = torch.autograd.grad(weight_standardize(w), w, g)
    torch.testing.assert_close(got, (g - g.mean(dim=(1, 2, 3), keepdim=True)) / 1e-6**0.5)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "bias": False}, {"groups": 2, "bias": True}, {"dilation": 2, "padding": 2}], ids=str
)
def test_equals_timms_layer_of_the_same_eps(options: dict[str, int]) -> None:
    theirs = timm.layers.StdConv2d(4, 6, 3, eps=1e-6, **{"padding": 1, **options}).double()
    ours = WSConv2d(4, 6, 3, **{"padding": 1, "bias": False, **options}).double()
    ours.load_state_dict(theirs.state_dict(), strict=("bias" in options or ours.bias is None))
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("layer", "conv", "x"),
    [
        (WSConv1d, F.conv1d, torch.linspace(-1, 2, 24).reshape(2, 2, 6)),
        (WSConv2d, F.conv2d, torch.linspace(-1, 2, 96).reshape(2, 2, 6, 4)),
        (WSConv3d, F.conv3d, torch.linspace(-1, 2, 192).reshape(2, 2, 3, 4, 4)),
    ],
)
def test_layers_convolve_with_the_standardized_filter(layer, conv, x: torch.Tensor) -> None:
    made = layer(2, 3, 3, padding=1, eps=1e-2)
    expected = conv(x, weight_standardize(made.weight, eps=1e-2), made.bias, padding=1)
    torch.testing.assert_close(made(x), expected, rtol=0, atol=0)


def test_layers_take_torchs_state_dict() -> None:
    for ours, theirs in [(WSConv1d, torch.nn.Conv1d), (WSConv2d, torch.nn.Conv2d), (WSConv3d, torch.nn.Conv3d)]:
        made = ours(4, 6, 3)
        assert isinstance(made, theirs)
        made.load_state_dict(theirs(4, 6, 3).state_dict(), strict=True)


@CHOICES
def test_filters_keep_their_memory_format(choice: str) -> None:
    w = torch.randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    with backend(choice):
        got = weight_standardize(w)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, weight_standardize(w.contiguous()))
    (gradient,) = torch.autograd.grad(got, w, torch.randn_like(got))
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@CHOICES
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 1, 1, 1), (5, 1, 1, 1, 1)])
def test_filters_of_one_value_are_refused(shape: tuple[int, ...], choice: str) -> None:
    with (
        backend(choice),
        pytest.raises(ValueError, match=r"has one value, which standardizing would set to 0; use a plain"),
    ):
        weight_standardize(torch.ones(shape))


def test_layers_with_filters_of_one_value_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"WSConv2d needs two values or more .* \(8, 1, 1, 1\); use a plain convolution"
    ):
        WSConv2d(8, 8, 1, groups=8)
    with pytest.raises(ValueError, match="WSConv1d needs two values or more"):
        WSConv1d(1, 4, 1)


def test_the_part_needs_a_norm() -> None:
    with pytest.raises(ValueError, match=r"'ws' needs a norm after its convolutions; write ws\+gn, say"):
        anybatch.create_model("resnet8", "ws", num_classes=2)


def test_eps_reaches_the_layers() -> None:
    model = anybatch.create_model("resnet8", "ws(eps=0.25)+gn:auto", num_classes=2)
    assert {m.eps for m in model.modules() if isinstance(m, WSConv2d)} == {0.25}
