"""What is special about local context normalization: a loop over windows, its limit, the released code, large means."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import anybatch
from anybatch.functional import group_norm, local_context_norm
from anybatch.layers import LocalContextNorm1d, LocalContextNorm2d
from helpers import assert_error_within


def offset_input(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 2 + 3


def looped(x: Tensor, windows: tuple[int, ...], size: int, eps: float, *, late: bool = False) -> Tensor:
    """Every value by its window, one at a time; ``late``: as the released code chooses windows."""
    y = torch.empty_like(x)
    for n, c in itertools.product(range(x.shape[0]), range(0, x.shape[1], size)):
        group = x[n, c : c + size]
        for position in itertools.product(*map(range, x.shape[2:])):
            window = []
            for at, w, length in zip(position, windows, x.shape[2:], strict=True):
                if late:
                    first = 1 + min(max(at - w // 2, 0), length - w - 1)
                else:
                    first = min(max(at - (w - 1) // 2, 0), max(length - w, 0))
                window.append(slice(first, first + w))
            values = group[(slice(None), *window)]
            place = (slice(None), *position)
            y[(n, slice(c, c + size), *position)] = (group[place] - values.mean()) / (
                values.var(correction=0) + eps
            ).sqrt()
    return y


def test_by_hand() -> None:
    # One channel, windows of 3: (1, 2, 6) around the first two positions, (2, 6, 4) around the third and, as there is
    # none around the last, there again. Means 3, 3, 4, 4; variances 14/3, 14/3, 8/3, 8/3.
    x = torch.tensor([[[1.0, 2.0, 6.0, 4.0]]], dtype=torch.float64)
    y = local_context_norm(x, 3, 1, eps=0.0)
    a, b = (3 / 14) ** 0.5, (3 / 8) ** 0.5
    torch.testing.assert_close(y, torch.tensor([[[-2 * a, -a, 2 * b, 0.0]]], dtype=torch.float64))


def test_an_even_window_has_one_position_more_behind() -> None:
    x = torch.tensor([[[1.0, 3.0, 7.0]]], dtype=torch.float64)  # windows (1, 3), (3, 7), (3, 7)
    y = local_context_norm(x, 2, 1, eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[[-1.0, -1.0, 1.0]]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((2, 6, 5, 7), (1, 1)),
        ((2, 6, 5, 7), (3, 3)),
        ((2, 6, 5, 7), (2, 4)),
        ((1, 6, 5, 7), (4, 6)),
        ((1, 6, 5, 7), (5, 3)),
        ((1, 6, 5, 7), (1, 9)),
        ((1, 6, 5, 7), (9, 6)),
        ((1, 6, 5, 7), (5, 7)),
        ((1, 6, 5, 7), (9, 9)),
        ((2, 6, 11), (4,)),
        ((1, 6, 3, 4, 5), (2, 3, 4)),
        ((3, 6, 1, 1), (1, 1)),
        ((3, 6), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 3])
def test_equals_a_loop_over_windows(shape: tuple[int, ...], windows: tuple[int, ...], size: int) -> None:
    x = offset_input(*shape)
    got = local_context_norm(x, windows, size, eps=1e-3)
    torch.testing.assert_close(got, looped(x, windows, size, 1e-3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "windows"), [((2, 6, 5, 7), (3, 3)), ((2, 6, 5, 7), (4, 2)), ((1, 6, 5, 7), (4, 6)), ((2, 6, 9), (5,))]
)
def test_equals_a_loop_over_the_windows_of_the_released_code(shape: tuple[int, ...], windows: tuple[int, ...]) -> None:
    x = offset_input(*shape)
    got = local_context_norm(x, windows, 2, eps=1e-3, released=True)
    torch.testing.assert_close(got, looped(x, windows, 2, 1e-3, late=True))
    assert (got - local_context_norm(x, windows, 2, eps=1e-3)).abs().max() > 0.1


@pytest.mark.parametrize("window", [5, (5, 3), (3, 7), 227])
def test_the_released_code_takes_the_whole_map_unless_it_is_larger_in_both_dimensions(
    window: int | tuple[int, int],
) -> None:
    x = offset_input(2, 6, 5, 7).requires_grad_()
    y = local_context_norm(x, window, 2, eps=1e-3, released=True)
    x_ngs = x.reshape(2, 3, -1)
    var, mean = torch.var_mean(x_ngs, 2, correction=1, keepdim=True)
    expected = ((x_ngs - mean) / (var + 1e-3).sqrt()).reshape(x.shape)
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(z, x, seed)[0] for z in (y, expected))
    torch.testing.assert_close(got, wanted)


def test_the_released_code_takes_its_windows_as_constants() -> None:
    x = offset_input(1, 2, 5, 7).requires_grad_()
    y = local_context_norm(x, 3, 2, eps=1e-3, released=True)
    seed = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, seed)
    with torch.no_grad():  # what remains of the gradient is 1 / sqrt(var + eps)
        starts = [[1 + min(max(i - 1, 0), length - 4) for i in range(length)] for length in (5, 7)]
        var = torch.stack(
            [torch.stack([x[0, :, i : i + 3, j : j + 3].var(correction=0) for j in starts[1]]) for i in starts[0]]
        )
    torch.testing.assert_close(got, seed / (var + 1e-3).sqrt())


@pytest.mark.parametrize("window", [7, (5, 7), 227])
def test_a_window_as_large_as_the_map_is_group_norm(window: int | tuple[int, int]) -> None:
    x = offset_input(2, 6, 5, 7)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    got = local_context_norm(x, window, 2, weight, bias, eps=1e-3)
    torch.testing.assert_close(got, group_norm(x, 3, weight, bias, eps=1e-3), rtol=0, atol=0)


def test_scale_and_shift_change_nothing() -> None:
    x = offset_input(2, 6, 8, 9)
    torch.testing.assert_close(local_context_norm(7 * x - 100, 3, eps=0.0), local_context_norm(x, 3, eps=0.0))


def test_far_from_borders_a_tile_equals_the_image() -> None:
    x = offset_input(1, 4, 24, 24)
    whole, tile = local_context_norm(x, 5), local_context_norm(x[..., 4:20, 4:20], 5)
    torch.testing.assert_close(whole[..., 6:18, 6:18], tile[..., 2:14, 2:14])


@pytest.mark.parametrize("image", ["mean 1000", "mean 10000", "flat", "halves"])
@pytest.mark.parametrize("window", [3, 16, 31])
def test_large_means_cost_as_much_as_their_rounding(image: str, window: int) -> None:
    noise = torch.randn(1, 4, 32, 48)
    halves = torch.ones(1, 1, 1, 48)
    halves[..., 24:] = -1
    x, allowed = {
        "mean 1000": (noise + 1000, 1e-6),
        "mean 10000": (noise + 10000, 1e-6),
        "flat": (noise / 100 + 100, 1e-6),
        # Behind the subtraction of the map's mean, 0, values of 1000 remain: their window's mean is rounded to 6e-5.
        "halves": (noise + 1000 * halves, 1e-4),
    }[image]
    exact = local_context_norm(x.double(), window)
    assert_error_within(local_context_norm(x, window), exact, allowed * exact.abs().max().item())


@pytest.mark.parametrize("window", [2, 3, 7])
def test_constant_windows_in_a_varied_image_have_no_negative_variance(window: int) -> None:
    x = 1e7 * torch.randn(1, 2, 30, 40).cumsum(-1)
    x[..., 10:] = 1e7 / 3
    assert local_context_norm(x, window).isfinite().all()


@pytest.mark.parametrize("window", [3, 4, (2, 9)])
def test_gradients(window: int | tuple[int, int]) -> None:
    x = offset_input(1, 4, 5, 4).requires_grad_()
    weight, bias = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: local_context_norm(a[0], window, 2, *a[1:]), (x, weight, bias))


def test_refusals_of_the_input() -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, C, \*\), got shape \(5,\)"):
        local_context_norm(torch.zeros(5), 3)
    x = torch.zeros(2, 6, 5, 7)
    for size in (4, 0, -2):
        with pytest.raises(ValueError, match=f"channels_per_group={size} does not divide the 6 channels of x"):
            local_context_norm(x, 3, size)
    with pytest.raises(ValueError, match=r"window=\(3, 3, 3\) is for 3 dimensions, and x has 2 behind its channels"):
        local_context_norm(x, (3, 3, 3))
    with pytest.raises(ValueError, match="window=0 must be 1 or more"):
        local_context_norm(x, 0)
    with pytest.raises(ValueError, match=r"window=\(3, -1\) must be 1 or more"):
        local_context_norm(x, (3, -1))
    for values, window in [(x, 1), (x, (1, 1)), (torch.zeros(2, 6, 1, 1), 227), (torch.zeros(2, 6), ())]:
        for released in (False, True):
            with pytest.raises(ValueError, match=r"leave one value in each window of x .*; use a larger window"):
                local_context_norm(values, window, 1, released=released)


def test_refusals_of_the_layer() -> None:
    with pytest.raises(ValueError, match="channels_per_group=2 does not divide 5 channels"):
        LocalContextNorm2d(5)
    with pytest.raises(ValueError, match=r"window=\(3, 3\) is for 2 dimensions, and x has 1 "):
        LocalContextNorm1d(6, (3, 3))
    with pytest.raises(ValueError, match=r"LocalContextNorm2d takes .* 2 spatial dimensions, got shape \(2, 6\)"):
        LocalContextNorm2d(6)(torch.zeros(2, 6))


def test_layer_loads_the_released_weights_flattened() -> None:
    weight, bias = torch.randn(2, 1, 6, 1, 1)
    layer = LocalContextNorm2d(6, (3, 5), released=True)
    layer.load_state_dict({"weight": weight.flatten(), "bias": bias.flatten()}, strict=True)
    x = torch.randn(2, 6, 9, 9)
    plain = local_context_norm(x, (3, 5), 2, released=True)
    torch.testing.assert_close(layer(x), plain * weight + bias)
    assert "window=(3, 5)" in repr(layer)
    assert "released=True" in repr(layer)


def test_parts() -> None:
    def layer(spec: str) -> LocalContextNorm2d:
        return anybatch.scheme(spec).norm[1](12)  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]

    plain = layer("lcn")
    assert (plain.window, plain.channels_per_group, plain.eps, plain.affine) == (227, 2, 1e-5, True)
    told = layer("lcn(window=9, channels_per_group=4, eps=0.5, affine=False, released=True)")
    assert (told.window, told.channels_per_group, told.eps, told.affine, told.released) == (9, 4, 0.5, False, True)
    assert layer("lcn/3").channels_per_group == 3
    for spec, message in [
        ("lcn(window=0)", "window must be a whole number of 1 or more, got 0"),
        ("lcn(window=2.5)", "window must be a whole number of 1 or more, got 2.5"),
        ("lcn(group_size=many)", "group_size must be a whole number of 1 or more, got 'many'"),
        ("lcn(released=1)", "released=1 is neither True nor False"),
    ]:
        with pytest.raises(ValueError, match=message):
            anybatch.scheme(spec)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_half_precision_where_windows_cover_the_map() -> None:
    layer, x = LocalContextNorm2d(8), torch.randn(2, 8, 6, 7).bfloat16().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    g = torch.linspace(-1, 1, x.numel()).view_as(x).bfloat16()
    got, right = (torch.autograd.grad(call(x), x, g)[0] for call in (compiled, layer))
    assert_error_within(got, right, 2**-7 * right.abs().max().item())  # both round to 8 bits
