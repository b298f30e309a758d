"""What is special about kernel normalization: its definition in loops, limits, dropout on statistics, geometry."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch import layers
from anybatch.functional import kernel_norm, positional_norm
from anybatch.methods.kernel_norm import dropout_keys, dropout_mask, unit_moments
from anybatch.methods.windows import windows
from helpers import error

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def offset_input(*shape: int) -> Tensor:
    """Samples and channels with means and scales of their own."""
    x = torch.randn(shape, dtype=torch.float64)
    per_channel = (1, shape[1], *(1 for _ in shape[2:]))
    return x * torch.rand(per_channel, dtype=torch.float64) + 3 * torch.randn(per_channel, dtype=torch.float64)


def in_loops(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int] = (1, 1),
    mode: str = "zeros",
    groups: int = 1,
    eps: float = 1e-5,
    kept: Tensor | None = None,
) -> Tensor:
    """The definition, window by window; ``kept`` is what each value is multiplied by for the statistics."""

    def padded(values: Tensor) -> Tensor:
        return F.pad(values, (*pads[1], *pads[0]), MODES[mode])

    dropped = padded(x if kept is None else x * kept)
    x = padded(x)
    (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
    rows = range(0, x.shape[2] - (kh - 1) * dh, sh)
    columns = range(0, x.shape[3] - (kw - 1) * dw, sw)
    y = x.new_full((*x.shape[:2], kh * len(rows), kw * len(columns)), torch.nan)
    for (i, top), (j, left), n in itertools.product(enumerate(rows), enumerate(columns), range(len(x))):
        for channels in torch.arange(x.shape[1]).chunk(groups):
            place = (n, channels, slice(top, top + (kh - 1) * dh + 1, dh), slice(left, left + (kw - 1) * dw + 1, dw))
            var, mean = torch.var_mean(dropped[place], correction=0)
            unit = (x[place] - mean) / (var + eps).sqrt()
            y[n, channels, i * kh : (i + 1) * kh, j * kw : (j + 1) * kw] = unit
    return y


def test_by_hand() -> None:
    # Windows 1, 3 and 3, 5: means 2 and 4, variance 1. With eps = 3 deviations are halved.
    x = torch.tensor([[[1.0, 3.0, 5.0]]], dtype=torch.float64)
    torch.testing.assert_close(kernel_norm(x, 2, eps=3.0), torch.tensor([[[-0.5, 0.5, -0.5, 0.5]]]).double())
    # Padded by zeros: 0, 1 with mean 1/2 and variance 1/4, then 3, 5; the last zero has no whole window.
    a, b = 0.5 * 0.5**-0.5, 1.25**-0.5
    torch.testing.assert_close(kernel_norm(x, 2, 2, 1, eps=0.25), torch.tensor([[[-a, a, -b, b]]]).double())


def test_by_hand_over_channels_and_in_groups() -> None:
    # One window of 1, 3 and 5, 7: mean 4, variance 5. Apart: means 2 and 6, variances 1.
    x = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]], dtype=torch.float64)
    torch.testing.assert_close(kernel_norm(x, 2, eps=4.0), (x - 4) / 3)
    apart = kernel_norm(x, 2, norm_groups=2, eps=3.0)
    torch.testing.assert_close(apart, torch.tensor([[[-0.5, 0.5], [-0.5, 0.5]]]).double())


def test_dropout_by_hand() -> None:
    # 2, 4 with 4 dropped out at p = 1/2 counts as 4, 0: mean 2, variance 4. The values themselves stay.
    x = torch.tensor([[[2.0, 4.0]]], dtype=torch.float64)
    seeds = [torch.tensor(i) for i in range(100)]
    seed = next(seed for seed in seeds if dropout_mask(x, 0.5, seed).tolist() == [[[1, 0]]])
    y = kernel_norm(x, 2, p=0.5, seed=seed, eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[[0.0, 1.0]]]).double())
    # On average over masks: mean 3, variance 1 + 1 * 10 * (1 - 1/2) = 6.
    torch.testing.assert_close(kernel_norm(x, 2, p=0.5, eps=0.0), (x - 3) / 6**0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel", "stride", "pads", "dilation"),
    [
        ((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
        ((1, 1), (2, 3), ((0, 0), (0, 0)), (1, 1)),
        ((1, 1), (1, 2), ((1, 1), (0, 0)), (1, 1)),
        ((2, 2), (1, 1), ((1, 0), (0, 1)), (1, 1)),
        ((3, 2), (1, 2), ((2, 2), (1, 1)), (1, 1)),
        ((3, 3), (2, 2), ((0, 0), (0, 0)), (1, 1)),
        ((2, 3), (3, 4), ((1, 1), (1, 1)), (1, 1)),
        ((3, 2), (1, 1), ((2, 2), (1, 2)), (2, 3)),
        ((5, 7), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ],
)
def test_equals_its_definition_in_loops(kernel: Any, stride: Any, pads: Any, dilation: Any, mode: str) -> None:
    x = offset_input(2, 4, 5, 7)
    seed = torch.tensor(5)
    mask = dropout_mask(x, 0.3, seed)
    for groups in (1, 2):
        options = {"padding_mode": mode, "norm_groups": groups}
        got = kernel_norm(x, kernel, stride, pads, dilation, **options)
        torch.testing.assert_close(got, in_loops(x, kernel, stride, pads, dilation, mode, groups))
        got = kernel_norm(x, kernel, stride, pads, dilation, **options, p=0.3, seed=seed)
        torch.testing.assert_close(
            got, in_loops(x, kernel, stride, pads, dilation, mode, groups, kept=mask.double() / 0.7)
        )


def test_shapes_of_tiles() -> None:
    x = torch.randn(2, 4, 7, 9)
    assert kernel_norm(x, 3, 2).shape == (2, 4, 9, 12)
    assert kernel_norm(x, (3, 2), (1, 2), (2, 1)).shape == (2, 4, 27, 10)
    assert kernel_norm(x, 3, 1, "same").shape == (2, 4, 21, 27)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_kernel_of_1_is_positional_norm_and_layer_norm_over_channels(dims: int) -> None:
    x = offset_input(2, 6, *(5, 3, 4)[:dims])
    expected = F.layer_norm(x.movedim(1, -1), (6,), eps=1e-3).movedim(-1, 1)
    torch.testing.assert_close(kernel_norm(x, 1, eps=1e-3), expected)
    torch.testing.assert_close(kernel_norm(x, 1, eps=1e-3), positional_norm(x, eps=1e-3))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_kernel_as_large_as_the_map_is_group_norm(dims: int, groups: int) -> None:
    x = offset_input(2, 6, *(5, 3, 4)[:dims])
    got = kernel_norm(x, tuple(x.shape[2:]), norm_groups=groups, eps=1e-3)
    torch.testing.assert_close(got, F.group_norm(x, groups, eps=1e-3))


def test_one_and_three_dimensions_are_two_with_sizes_of_1() -> None:
    x = offset_input(2, 4, 9)
    flat = kernel_norm(x[..., None, :], (1, 3), (1, 2), (0, 1), (1, 2))
    torch.testing.assert_close(kernel_norm(x, 3, 2, 1, 2), flat.squeeze(2))
    x = offset_input(2, 4, 5, 6)
    deep = kernel_norm(x[:, :, None], (1, 3, 2), (1, 2, 1), ((0, 0), (1, 0), (0, 1)))
    torch.testing.assert_close(kernel_norm(x, (3, 2), (2, 1), ((1, 0), (0, 1))), deep.squeeze(2))


def test_scale_and_shift_of_a_sample_change_nothing() -> None:
    x = offset_input(2, 4, 5, 7)
    torch.testing.assert_close(kernel_norm(7 * x - 100, 3, eps=0.0), kernel_norm(x, 3, eps=0.0))
    assert error(kernel_norm(x + 100, 3, 1, 1), kernel_norm(x, 3, 1, 1)) > 0.1  # zeros around it are not shifted


def test_expected_moments_are_the_mean_over_all_masks() -> None:
    """Every one of the 2^6 masks, weighed by its probability."""
    x, p, at = offset_input(1, 2, 3), 0.3, windows(1, 2, 1, 1)
    mean, var = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
    for values in itertools.product([True, False], repeat=6):
        probability = (1 - p) ** sum(values) * p ** (6 - sum(values))
        m, v = unit_moments(x, 1, at, p, torch.tensor(values).reshape(x.shape))
        mean += probability * m
        var += probability * v
    expected_mean, expected_var = unit_moments(x, 1, at, p)
    torch.testing.assert_close(expected_mean, mean)
    torch.testing.assert_close(expected_var, var)
    assert error(unit_moments(x, 1, at)[1], var) > 0.1


def test_drawn_masks_have_the_expected_moments() -> None:
    p, at, draws = 0.25, windows(2, 3), 4000
    x = offset_input(1, 8, 3, 3).relu()
    many = x.expand(draws, -1, -1, -1)
    mean, var = unit_moments(many, 1, at, p, dropout_mask(many, p, torch.tensor(5)))
    expected_mean, expected_var = unit_moments(x, 1, at, p)
    for drawn, expected in ((mean, expected_mean), (var, expected_var)):
        assert error(drawn.mean(), expected) < 4 * drawn.std().item() / draws**0.5
    # The variance of the mean: p / (1 - p) times the mean square over the number of values.
    spread = (p / (1 - p) * x.square().mean() / x.numel()).sqrt().item()
    assert mean.std().item() == pytest.approx(spread, rel=4 / (2 * draws) ** 0.5)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
def test_masks_are_of_independent_values(p: float) -> None:
    x = torch.empty(2, 8, 51, 41)
    kept = dropout_mask(x, p, torch.tensor(-(2**63)))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert kept.unique().tolist() == [0, 1]
    assert kept.shape == x.shape
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=4 * deviation)
    centered = (kept.double() - (1 - p)).flatten() / (p * (1 - p)) ** 0.5
    for lag in (1, 2, 3, 4, 5, 41, 51 * 41, 2 * 51 * 41, 8 * 51 * 41):  # neighboring channels share a hash
        pairs = len(centered) - lag
        assert abs((centered[lag:] * centered[:-lag]).mean().item()) < 4.5 / pairs**0.5
    for seed in (-(2**63) + 1, 0, 2**63 - 1):
        other = (dropout_mask(x, p, torch.tensor(seed)).double() - (1 - p)).flatten() / (p * (1 - p)) ** 0.5
        assert abs((centered * other).mean().item()) < 4.5 / len(other) ** 0.5


def test_masks_are_hashes_of_places_keyed_by_splitmix() -> None:
    """In Python's integers; the first number from seed 0 is the published 0xE220A8397B1DCDAF."""

    def number(seed: int, i: int) -> int:
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def hashed(place: int, key: int) -> int:
        z = place ^ key % 2**32
        z = (z ^ z >> 16) * 0x7FEB352D % 2**32
        z = ((z ^ z >> 15) + (key >> 32)) * 0x846CA68B % 2**32
        return z ^ z >> 16

    assert number(0, 0) == 0xE220A8397B1DCDAF
    channels, positions = 5, 7  # the last channel of a position shares its hash with none
    for seed in (0, 1234567, -5):
        got = dropout_mask(torch.empty(2, channels, positions), 0.3, torch.tensor(seed))
        for n in range(2):
            key = number(seed % 2**64, n)
            for place in range(positions):
                for channel in range(channels):
                    bits = hashed(place * 3 + channel // 2, key) >> 16 * (channel % 2) & 0xFFFF
                    signed = bits - 2**16 if bits >= 2**15 else bits
                    assert got[n, channel, place].item() == (signed >= round(0.3 * 2**16) - 2**15)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_makes_the_same_masks() -> None:
    """It ended with a segmentation fault where an int64 overflowed that a loop's counter was multiplied into.

    Where loops over samples are vectors, as with one hash a sample, keys were wrong from the third sample on.
    """
    for shape in ((5, 7, 3, 4), (17, 1, 1, 1)):
        x, seed = torch.empty(shape), torch.tensor(12345)
        assert torch.equal(torch.compile(dropout_mask)(x, 0.3, seed), dropout_mask(x, 0.3, seed))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("samples", [3, 17, 64])
def test_compiled_code_makes_the_same_keys(samples: int) -> None:
    compiled = torch.compile(dropout_keys)
    for seed in (torch.tensor(3), torch.tensor(-(2**63)), torch.tensor(2**63 - 1)):
        assert torch.equal(compiled(seed, samples), dropout_keys(seed, samples))


def test_masks_lie_in_memory_as_their_input_does() -> None:
    seed = torch.tensor(5)
    for x in (torch.empty(2, 3, 5, 7), torch.empty(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)):
        assert dropout_mask(x, 0.5, seed).stride() == x.stride()
    x = torch.empty(2, 3, 4, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    assert dropout_mask(x, 0.5, seed).stride() == x.stride()
    torch.testing.assert_close(dropout_mask(x, 0.5, seed), dropout_mask(x.contiguous(), 0.5, seed))
    assert dropout_mask(x[..., ::2], 0.5, seed).shape == (2, 3, 4, 5, 4)
    assert dropout_mask(torch.empty(0, 3, 4), 0.5, seed).shape == (0, 3, 4)


def test_the_layer_draws_in_training_alone() -> None:
    x = offset_input(2, 4, 5, 7)
    layer = layers.KernelNorm2d(3, p=0.2, eval_stats="clean")
    assert error(layer(x), layer(x)) > 0.01
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    torch.manual_seed(7)
    torch.testing.assert_close(layer(x), kernel_norm(x, 3, p=0.2, seed=seed))
    layer.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(layer(x), kernel_norm(x, 3))
    layer.eval_stats = "expected"
    torch.testing.assert_close(layer(x), kernel_norm(x, 3, p=0.2))
    assert torch.equal(torch.get_rng_state(), state)
    assert error(kernel_norm(x, 3, p=0.2), kernel_norm(x, 3)) > 0.01


def test_gradients_flow_through_moments_and_mask() -> None:
    x = offset_input(1, 2, 4, 3).requires_grad_()
    seed = torch.tensor(5)
    assert torch.autograd.gradcheck(lambda x: kernel_norm(x, 2, 1, 1, p=0.3, seed=seed), x)
    assert torch.autograd.gradcheck(lambda x: kernel_norm(x, 2, 2, p=0.3), x)


@pytest.mark.parametrize("offset", [10, 1e3, 1e4])
def test_a_large_mean_costs_no_more_than_its_rounding(offset: float) -> None:
    x = (torch.randn(2, 64, 9, 9, dtype=torch.float64) + offset).float()
    exact = kernel_norm(x.double(), 3)
    # Two passes: the mean's rounding alone, and not the difference of two squares, which would err by offset^2 eps.
    assert error(kernel_norm(x, 3), exact) < 4 * torch.finfo(torch.float32).eps * offset


@pytest.mark.parametrize("options", [{"kernel_size": 0}, {"kernel_size": (3, 3, 3)}, {"kernel_size": 2.5}])
def test_refusals_of_a_size(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"kernel_size=.* is not a number of 1 or more, or 2 of them"):
        kernel_norm(torch.randn(1, 2, 5, 5), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride=0 is not a number of 1 or more, or 2 of them"),
        ({"dilation": (1, 0)}, r"dilation=\(1, 0\) is not a number of 1 or more"),
        ({"padding": -1}, "padding=-1 is not a number of 0 or more"),
        ({"padding": (1, 2, 3)}, r"padding=\(1, 2, 3\) is not a number of 0 or more, or 2 of them"),
        ({"padding": ((1, 2), (3,))}, r"padding=\(3,\) is not a number of 0 or more, or 2 of them"),
        ({"padding": ((1, 2), 3)}, "is not one pair"),
        ({"padding": ((1, 2),)}, "is not one pair"),
        ({"padding": "full"}, "padding='full' is neither 'same' nor 'valid' nor numbers"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1, got stride=2; give the padding in numbers"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror' is none of zeros, reflect, replicate, circular"),
        ({"padding_mode": "reflect", "padding": 5}, "padding_mode='reflect' can add 4 positions to the 5 of x"),
        ({"padding_mode": "circular", "padding": 6}, "padding_mode='circular' can add 5 positions to the 5 of x"),
        (
            {"kernel_size": 6},
            r"kernel_size of \(6, 6\) .* spans \(6, 6\) positions, more than x of shape \(1, 2, 5, 5\)",
        ),
        ({"kernel_size": 3, "dilation": 3}, r"spans \(7, 7\) positions, more than .*; use a smaller kernel or more"),
        ({"norm_groups": 0}, "norm_groups=0 does not divide the 2 channels"),
        ({"norm_groups": 3}, "norm_groups=3 does not divide the 2 channels"),
        ({"norm_groups": 2, "kernel_size": 1}, "leave one value in each window .* would erase it"),
        ({"p": 1}, "p=1 is not a probability from 0 to below 1"),
        ({"p": -0.1}, "p=-0.1 is not a probability"),
        ({"p": float("nan")}, "p=nan is not a probability"),
        ({"seed": torch.ones(())}, "seed must be one number of int64, got torch.float32"),
        ({"seed": torch.arange(2)}, r"seed must be one number of int64, got torch.int64 of shape \(2,\)"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_norm(torch.randn(1, 2, 5, 5), **{"kernel_size": 2, **options})


def test_refusals_of_the_layer() -> None:
    with pytest.raises(ValueError, match=r"p=1\.0 is not a probability"):
        layers.KernelNorm2d(3, p=1.0)
    with pytest.raises(ValueError, match="eval_stats='sample' is neither 'clean' nor 'expected'"):
        layers.KernelNorm2d(3, eval_stats="sample")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="norm_groups must be a whole number of 1 or more, got 0"):
        layers.KernelNorm2d(3, norm_groups=0)
    with pytest.raises(ValueError, match=r"padding=2\.5 is not a number of 0 or more"):
        layers.KernelNorm2d(3, padding=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="padding='same' needs stride 1"):
        layers.KernelNorm2d(3, stride=2, padding="same")
    with pytest.raises(ValueError, match=r"KernelNorm2d takes \(N, C, \*\) .* got shape \(2, 3\)"):
        layers.KernelNorm2d(3)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="leave one value"):
        layers.KernelNorm2d()(torch.randn(2, 1, 3, 3))
