"""What is special about positional normalization: values by hand, ConvNeXt's layer norm, the moments given back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.dispatch import backend
from anybatch.functional import moment_shortcut, positional_moments, positional_norm
from anybatch.layers import MomentShortcut, PositionalNorm
from helpers import assert_error_within, saved_tensors


def offset_input(*shape: int) -> Tensor:
    """Positions with means and scales of their own."""
    x = torch.randn(shape, dtype=torch.float64)
    return x * torch.rand(shape[0], 1, *shape[2:], dtype=torch.float64) + 3 * torch.randn(
        shape[0], 1, *shape[2:], dtype=torch.float64
    )


def test_by_hand() -> None:
    # One position holds 1, 3, 5, 7: mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5, unbiased 20 / 3. The other is 2.
    x = torch.tensor([[[1.0, 2.0], [3.0, 2.0], [5.0, 2.0], [7.0, 2.0]]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 10.0, 20.0], dtype=torch.float64)
    y = positional_norm(x, weight, bias, eps=4.0)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([-1.0, -2 / 3, 11.0, 24.0], dtype=torch.float64))
    torch.testing.assert_close(y[0, :, 1], bias)
    y = positional_norm(x, eps=7 / 3, unbiased=True)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 12, 1, 1), (3, 12, 9), (2, 12, 2, 3, 3), (4, 12)])
def test_equals_torchs_layer_norm_over_channels(shape: tuple[int, ...]) -> None:
    x = offset_input(*shape)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (12,), weight, bias, 1e-3).movedim(-1, 1)
    torch.testing.assert_close(positional_norm(x, weight, bias, eps=1e-3), expected)


def test_with_the_unbiased_variance_it_is_the_released_code() -> None:
    x = offset_input(2, 12, 5, 7)
    std, mean = torch.std_mean(x, 1, correction=1, keepdim=True)
    torch.testing.assert_close(positional_norm(x, eps=0.0, unbiased=True), (x - mean) / std)
    torch.testing.assert_close(positional_moments(x, eps=0.0, unbiased=True), torch.stack([mean, std]))


def test_is_timms_layer_norm_of_images_and_loads_its_state_dict() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.LayerNorm2d(12).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = PositionalNorm(12, 1e-6).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = offset_input(2, 12, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_scale_and_shift_of_a_position_change_nothing() -> None:
    x = offset_input(2, 6, 5, 7)
    other = x.clone()
    other[0, :, 2, 3] = 7 * x[0, :, 2, 3] - 100
    torch.testing.assert_close(positional_norm(other, eps=0.0), positional_norm(x, eps=0.0))


def test_on_one_position_it_is_layer_norm() -> None:
    x = offset_input(2, 6, 1, 1)
    torch.testing.assert_close(positional_norm(x), anybatch.functional.group_norm(x, 1))


def test_the_shortcut_gives_back_what_the_norm_took() -> None:
    x = offset_input(2, 6, 5, 7)
    mean, std = positional_moments(x, eps=1e-3)
    assert mean.shape == std.shape == (2, 1, 5, 7)
    torch.testing.assert_close(moment_shortcut(positional_norm(x, eps=1e-3), mean, std), x)
    torch.testing.assert_close(MomentShortcut(nn.Identity(), 1e-3, unbiased=True)(x), x)


def test_the_shortcut_takes_other_numbers_of_channels() -> None:
    x = offset_input(2, 6, 5, 7)
    body = nn.Conv2d(6, 3, 1).double()
    mean, std = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(MomentShortcut(body, 0.0)(x), body((x - mean) / std) * std + mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_moments_of_half_precision_are_wide_and_keep_no_wide_copy(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 64, 5, 7) + 100).to(dtype).requires_grad_()
    with saved_tensors() as kept:
        moments = positional_moments(x, eps=1e-3)
    assert moments.dtype == torch.float32
    assert not [t for t in kept if t.numel() >= x.numel() and t.dtype.itemsize > 2]
    exact = positional_moments(x.detach().double(), eps=1e-3)
    assert_error_within(moments, exact, 4 * 101 * torch.finfo(torch.float32).eps)
    moments.sum().backward()
    assert x.grad is not None
    with backend("reference"):
        (expected,) = torch.autograd.grad(positional_moments(x, eps=1e-3).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    assert moment_shortcut(x, *moments).dtype == dtype


def test_gradients_of_the_moments() -> None:
    x = offset_input(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(positional_moments, (x,))
    assert torch.autograd.gradgradcheck(positional_moments, (x,), fast_mode=True)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, C, \*\), got shape \(5,\)"):
        positional_norm(torch.zeros(5))
    for call in (positional_norm, positional_moments):
        with pytest.raises(ValueError, match=r"x of shape \(2, 1, 3\) has one channel, which .* would erase"):
            call(torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="PositionalNorm with num_channels=1 has one channel"):
        PositionalNorm(1)
    x = torch.zeros(2, 6, 3, 3)
    mean, std = positional_moments(x)
    with pytest.raises(ValueError, match=r"std must be \(N, 1, \*\) .* \(2, 1, 3, 3\), got shape \(2, 1, 3, 1\)"):
        moment_shortcut(x, mean, std[..., :1])
    with pytest.raises(ValueError, match=r"mean must be .* \(2, 6, 3, 3\)"):
        moment_shortcut(x, x, std)


def test_parts() -> None:
    made = {
        spec: anybatch.scheme(spec).norm(12)  # pyright: ignore[reportOptionalCall, reportCallIssue]
        for spec in ("pn", "pono(eps=0.5)", "pn(affine=False)", "LayerNorm2d")
    }
    assert {spec: (type(layer), layer.eps, layer.affine) for spec, layer in made.items()} == {
        "pn": (PositionalNorm, 1e-5, True),
        "pono(eps=0.5)": (PositionalNorm, 0.5, True),
        "pn(affine=False)": (PositionalNorm, 1e-5, False),
        "LayerNorm2d": (PositionalNorm, 1e-5, True),
    }
    with pytest.raises(ValueError, match="affine='no' is neither True nor False"):
        anybatch.scheme("pn(affine=no)")
