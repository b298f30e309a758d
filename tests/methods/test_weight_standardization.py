"""What is special about Weight Standardization: values by hand, timm's layer, the gradient's formula, refusals."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F

import anybatch
from anybatch.dispatch import backend
from anybatch.functional import weight_standardize
from anybatch.layers import (
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose1d,
    WSConvTranspose2d,
    WSConvTranspose3d,
    WSLinear,
)
from anybatch.methods.weight_standardization import VARIANTS

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
    with pytest.raises(ValueError, match=r"WSConv2d needs two values or more .* \(8, 1, 1, 1\): .*; use a plain layer"):
        WSConv2d(8, 8, 1, groups=8)
    with pytest.raises(ValueError, match="WSConv1d needs two values or more"):
        WSConv1d(1, 4, 1)
    with pytest.raises(ValueError, match=r"WSLinear needs two values or more .* \(4, 1\)"):
        WSLinear(1, 4)
    with pytest.raises(ValueError, match="WSConvTranspose2d needs two values or more"):
        WSConvTranspose2d(4, 8, 1, groups=4)
    WSConvTranspose2d(4, 1, 1)  # a filter sums the four input channels


def test_the_part_needs_a_norm() -> None:
    with pytest.raises(ValueError, match=r"'ws' needs a norm after its convolutions; write ws\+gn, say"):
        anybatch.create_model("resnet8", "ws", num_classes=2)


def test_eps_reaches_the_layers() -> None:
    model = anybatch.create_model("resnet8", "ws(eps=0.25)+gn:auto", num_classes=2)
    assert {m.eps for m in model.modules() if isinstance(m, WSConv2d)} == {0.25}


# The variants of the releases.


@CHOICES
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_by_hand(variant, scale: float, choice: str) -> None:
    # 1, 3, 5, 7: centred -3, -1, 1, 3, of squared norm 20.
    w = scale * torch.tensor([[1.0, 3.0, 5.0, 7.0]], dtype=torch.float64)
    centred = torch.tensor([[-3.0, -1.0, 1.0, 3.0]], dtype=torch.float64)
    biased, unbiased = 5 * scale**2, 20 / 3 * scale**2
    # A small filter shows where eps goes: 1e-5 inside the root stops standardizing it, outside it does not.
    root = {
        "default": (biased + 1e-6) ** 0.5,
        "paper": unbiased**0.5 + 1e-5,
        "bcn": (unbiased + 1e-5) ** 0.5,
        "bit": (biased + 1e-10) ** 0.5,
        "timm": (biased + 1e-6) ** 0.5,
        "aws": (unbiased + 1e-5) ** 0.5,
    }[variant]
    with backend(choice):
        got = weight_standardize(w, variant=variant)
    torch.testing.assert_close(got, scale * centred / root, rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_variants(variant) -> None:
    w = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: weight_standardize(w, variant=variant), (w,))
    assert torch.autograd.gradgradcheck(lambda w: weight_standardize(w, variant=variant), (w,))
    for dtype in (torch.float32, torch.float64):
        flat = torch.full((2, 3, 3), 0.25, dtype=dtype, requires_grad=True)
        (got,) = torch.autograd.grad(weight_standardize(flat, variant=variant), flat, torch.randn_like(flat))
        assert got.isfinite().all()


def test_eps_takes_the_place_of_the_variants() -> None:
    w = torch.tensor([[1.0, 3.0, 5.0, 7.0]], dtype=torch.float64)
    expected = (w - 4) / ((20 / 3) ** 0.5 + 0.5)
    torch.testing.assert_close(weight_standardize(w, variant="paper", eps=0.5), expected)
    layer = WSLinear(4, 1, variant="paper", eps=0.5).double()
    layer.load_state_dict({"weight": w, "bias": torch.zeros(1)})
    torch.testing.assert_close(layer(torch.eye(4).double()), expected.T)


def test_equals_the_formula_of_each_release_in_torchs_words() -> None:
    w = 0.02 * torch.randn(6, 4, 3, 3, dtype=torch.float64) + 0.01
    flat = w.flatten(1)
    mean = flat.mean(1, keepdim=True)
    for variant, expected in {
        "paper": (flat - mean) / (flat.std(1, keepdim=True) + 1e-5),
        "bcn": (flat - mean) / torch.sqrt(flat.var(1, keepdim=True) + 1e-5),
        "bit": (flat - mean) / torch.sqrt(flat.var(1, keepdim=True, unbiased=False) + 1e-10),
        "timm": F.batch_norm(w.reshape(1, 6, -1), None, None, training=True, eps=1e-6)[0],
    }.items():
        got = weight_standardize(w, variant=variant)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(got.flatten(1), expected, rtol=1e-12, atol=1e-12)


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant of weight standardization 'papr'; did you mean paper"):
        weight_standardize(torch.randn(2, 3), variant="papr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown variant of weight standardization 'papr'"):
        WSConv2d(3, 4, 3, variant="papr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown variant of weight standardization 'papr'"):
        anybatch.scheme("ws(variant=papr)+gn")


def test_the_variant_reaches_the_layers_of_a_network() -> None:
    model = anybatch.create_model("resnet8", "ws(variant=bit)+gn:auto", num_classes=2)
    assert {(m.variant, m.eps) for m in model.modules() if isinstance(m, WSConv2d)} == {("bit", 1e-10)}


# The affine form.

PAIRS = [
    (WSConv1d, torch.nn.Conv1d, {}, (2, 4, 9)),
    (WSConv2d, torch.nn.Conv2d, {"groups": 2}, (2, 4, 9, 7)),
    (WSConv3d, torch.nn.Conv3d, {"bias": False}, (2, 4, 5, 4, 3)),
    (WSConvTranspose1d, torch.nn.ConvTranspose1d, {}, (2, 4, 9)),
    (WSConvTranspose2d, torch.nn.ConvTranspose2d, {"groups": 2}, (2, 4, 9, 7)),
    (WSConvTranspose3d, torch.nn.ConvTranspose3d, {}, (2, 4, 5, 4, 3)),
    (WSLinear, torch.nn.Linear, {}, (2, 4)),
]


@pytest.mark.parametrize(("ours", "theirs", "options", "shape"), PAIRS)
def test_the_affine_form_computes_what_the_plain_layer_did(ours, theirs, options, shape) -> None:
    size = () if theirs is torch.nn.Linear else (3,)
    plain = theirs(4, 6, *size, **options).double()
    layer = ours(4, 6, *size, variant="aws", **options).double()
    layer.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))
    # Trained on, it is saved with its scale and shift, which are loaded again and not set anew.
    with torch.no_grad():
        layer.weight.mul_(3).add_(torch.randn_like(layer.weight))
    again = ours(4, 6, *size, variant="aws", **options).double()
    again.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(again.weight_gamma, layer.weight_gamma, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(again.weight_gamma, again._moments()[0])


def test_the_affine_form_before_and_without_a_checkpoint() -> None:
    layer = WSConv2d(4, 6, 3, variant="aws")
    assert layer.weight_gamma.shape == layer.weight_beta.shape == (6, 1, 1, 1)
    torch.testing.assert_close(layer.standardized(), weight_standardize(layer.weight, variant="aws"))
    state = WSConv2d(4, 6, 3, variant="aws").state_dict()
    del state["weight_beta"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_beta"):
        layer.load_state_dict(state)
    assert not layer.load_state_dict({"bias": torch.zeros(6)}, strict=False).unexpected_keys
    torch.testing.assert_close(layer.weight_gamma, state["weight_gamma"])


# Transposed convolutions and the linear layer.


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("layer", "torchs", "shape"),
    [
        (WSConvTranspose1d, torch.nn.ConvTranspose1d, (2, 4, 5)),
        (WSConvTranspose2d, torch.nn.ConvTranspose2d, (2, 4, 5, 3)),
        (WSConvTranspose3d, torch.nn.ConvTranspose3d, (1, 4, 3, 2, 3)),
    ],
)
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_transposed_filters_are_standardized_one_output_channel_at_a_time(
    layer, torchs, shape: tuple[int, ...], groups: int, variant
) -> None:
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": groups, "dilation": 2}
    made = layer(4, 6, 3, variant=variant, eps=0.01, **options).double()
    assert isinstance(made, torchs)
    filters = torch.empty_like(made.weight)
    for channel in range(6):
        group, within = divmod(channel, 6 // groups)
        inputs = slice(group * 4 // groups, (group + 1) * 4 // groups)
        one = made.weight[inputs, within]
        mean, correction = one.mean(), int(variant == "paper")
        var = (one - mean).square().sum() / (one.numel() - correction)
        filters[inputs, within] = (one - mean) / ((var.sqrt() + 0.01) if correction else (var + 0.01).sqrt())
    torch.testing.assert_close(made.standardized(), filters)
    plain = torchs(4, 6, 3, **options).double()
    plain.load_state_dict({"weight": filters, "bias": made.bias})
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(made(x), plain(x))
    size = [n - 1 for n in plain(x).shape[2:]]
    torch.testing.assert_close(made(x, output_size=size), plain(x, output_size=size))


def test_transposed_filters_keep_their_memory_format() -> None:
    for groups in (1, 2):
        layer = WSConvTranspose2d(4, 6, 3, groups=groups).to(memory_format=torch.channels_last)
        assert layer.standardized().is_contiguous(memory_format=torch.channels_last)


def test_the_linear_layer_is_a_convolution_of_one_position() -> None:
    linear, conv = WSLinear(6, 4, eps=1e-2), WSConv1d(6, 4, 1, eps=1e-2)
    conv.load_state_dict({"weight": linear.weight[..., None], "bias": linear.bias})
    x = torch.randn(3, 6)
    torch.testing.assert_close(linear(x), conv(x[..., None])[..., 0])
    assert linear(torch.randn(2, 3, 6)).shape == (2, 3, 4)
