"""Kernels in C: how they come to be, and what the tables of the contract do not ask of them."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from anybatch.dispatch import Op, backend, explain
from anybatch.functional import (
    batch_channel_norm,
    filter_response_norm,
    group_norm,
    kn_conv,
    local_context_norm,
    positional_norm,
)
from anybatch.kernels import native_common
from anybatch.layers import BatchChannelNorm2d
from anybatch.methods.batch_channel_norm import EstimatedStatistics
from anybatch.methods.batch_norm import channel_moments
from helpers import assert_error_within, error
from kernels.common import assert_estimates_take_batches_in

SHAPES = {"small": (3, 6, 5, 7), "one_position": (2, 8, 1, 1), "many_positions": (2, 4, 70, 90), "wide": (1, 600, 3, 3)}


def norm_parameters(c: int, count: int, generator: torch.Generator) -> list[Tensor]:
    noise = 0.3 * torch.randn(count, c, generator=generator, dtype=torch.float64)
    return [noise[0] + 1, noise[1]] if count == 2 else [noise[0], noise[1].abs() + 1, noise[2] + 1, *noise[3:]]


def _conv(x: Tensor, w: Tensor, b: Tensor, r: Tensor, act: str = "relu", **options: Any) -> Tensor:
    return kn_conv(x, w, b, padding=1, residual=r, activation=act, **options)


CALLS: dict[str, tuple[Op, Callable[..., Tensor], Callable[[tuple[int, ...], torch.Generator], list[Tensor]]]] = {
    "kn_conv": (
        kn_conv,
        _conv,
        lambda s, g: [
            0.2 * torch.randn(5, s[1], 3, 3, generator=g, dtype=torch.float64),
            torch.randn(5, generator=g, dtype=torch.float64),
            torch.randn(s[0], 5, *s[2:], generator=g, dtype=torch.float64),
        ],
    ),
    "kn_conv_dropout": (
        kn_conv,
        lambda *a, act="relu": _conv(*a, act=act, p=0.3, seed=torch.tensor(-(2**62) + 11)),
        lambda s, g: CALLS["kn_conv"][2](s, g),
    ),
    "kn_conv_groups": (
        kn_conv,
        lambda *a, act="relu": _conv(*a, act=act, groups=2, p=0.3, seed=torch.tensor(3)),
        lambda s, g: [
            0.2 * torch.randn(6, s[1] // 2, 3, 3, generator=g, dtype=torch.float64),
            torch.randn(6, generator=g, dtype=torch.float64),
            torch.randn(s[0], 6, *s[2:], generator=g, dtype=torch.float64),
        ],
    ),
    "group_norm": (
        group_norm,
        lambda x, w, b, act="relu": group_norm(x, 2, w, b, activation=act),
        lambda s, g: norm_parameters(s[1], 2, g),
    ),
    "batch_channel_norm": (
        batch_channel_norm,
        lambda x, *p, act="relu": batch_channel_norm(x, 2, *p, activation=act),
        lambda s, g: norm_parameters(s[1], 6, g),
    ),
    "filter_response_norm": (
        filter_response_norm,
        # A threshold that cuts off nothing in place of none, whose gradient is 0.
        lambda x, w, b, t, e, act="relu": filter_response_norm(x, w, b, t if act == "relu" else t - 50, e),
        lambda s, g: norm_parameters(s[1], 4, g),
    ),
    "positional_norm": (
        positional_norm,
        lambda x, w, b, act="relu": positional_norm(x, w, b, activation=act),
        lambda s, g: norm_parameters(s[1], 2, g),
    ),
    "local_context_norm": (
        local_context_norm,
        lambda x, w, b, act="relu": local_context_norm(x, 3, 2, w, b, activation=act),
        lambda s, g: norm_parameters(s[1], 2, g),
    ),
}
NAMES = pytest.mark.parametrize("name", CALLS)
FORMATS = pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if reason := native_common.refused_native(torch.ones(1, 2)):
        pytest.skip(reason)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def given(name: str, shape: tuple[int, ...], mean: float, format: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
    others = CALLS[name][2](shape, generator)
    if name == "batch_channel_norm":
        others[0] = others[0] + mean
    return [t.contiguous(memory_format=format) if t.dim() == 4 and t.shape[0] == shape[0] else t for t in (x, *others)]


def passed(name: str, args: list[Tensor], dtype: torch.dtype, which: str, act: str = "relu") -> list[Tensor]:
    """The output and the gradients of all inputs."""
    args = [t.to(dtype).detach().requires_grad_() for t in args]
    with backend(which):
        y = CALLS[name][1](*args, act=act)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        return [y.detach(), *torch.autograd.grad(y, args, g.to(dtype))]


@FORMATS
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name, shape in itertools.product(CALLS, SHAPES)
        if name != "local_context_norm" or shape in ("small", "many_positions")  # elsewhere a window covers the map
    ],
)
@pytest.mark.parametrize("mean", [0, 10, 100, 1000])
def test_outputs_and_gradients_are_those_of_float64(
    name: str, format: torch.memory_format, shape: str, mean: float
) -> None:
    act = "relu" if mean < 100 else "none"  # roundings of large means decide which side of 0 some values are on
    args = given(name, SHAPES[shape], mean, format)
    # What float32 holds of them, so that no error is the input's.
    args = [t.float().double() for t in args]
    exact = passed(name, args, torch.float64, "reference", act)
    naive = passed(name, args, torch.float32, "reference", act)
    for got, right, plain in zip(passed(name, args, torch.float32, "native", act), exact, naive, strict=True):
        size = right.abs().max().item()
        roundoff = 64 * torch.finfo(torch.float32).eps * (1 + mean / 10) * size
        assert_error_within(got, right, 2 * error(plain, right) + roundoff)


@NAMES
@FORMATS
def test_results_do_not_depend_on_threads_nor_on_other_samples(
    name: str, format: torch.memory_format, threads: Callable[[int], None]
) -> None:
    args = [t.float() for t in given(name, (3, 8, 40, 50), 1, format)]
    threads(1)
    alone = passed(name, args, torch.float32, "native")
    if name not in ("kn_conv_dropout", "kn_conv_groups"):  # whose masks differ from sample to sample
        last = [t[2:] if t.dim() == 4 and len(t) == 3 else t for t in args]
        with backend("native"):
            single = CALLS[name][1](*last)
        if not name.startswith("kn_conv"):  # torch's convolution rounds in another order
            torch.testing.assert_close(single, alone[0][2:], rtol=0, atol=0)
    threads(2)
    torch.testing.assert_close(passed(name, args, torch.float32, "native")[:2], alone[:2], rtol=2e-5, atol=2e-5)
    if not name.startswith("kn_conv"):
        torch.testing.assert_close(passed(name, args, torch.float32, "native")[0], alone[0], rtol=0, atol=0)


@NAMES
@FORMATS
def test_views_at_odd_addresses_and_gradients_of_any_layout(name: str, format: torch.memory_format) -> None:
    args = [t.float() for t in given(name, (2, 6, 5, 7), 1, format)]
    shifted = []
    for t in args:
        place = torch.empty(t.numel() + 1)[1:].as_strided(t.size(), t.stride())
        shifted.append(place.copy_(t))
    expected = passed(name, args, torch.float32, "native")
    torch.testing.assert_close(passed(name, shifted, torch.float32, "native"), expected, rtol=1e-5, atol=1e-5)
    asked = [t.requires_grad_() for t in shifted]
    with backend("native"):
        y = CALLS[name][1](*asked)
    (one,) = torch.autograd.grad(y, asked[0], torch.ones(()).expand_as(y), retain_graph=True)
    turned = torch.ones(y.transpose(2, 3).shape).transpose(2, 3)
    torch.testing.assert_close(torch.autograd.grad(y, asked[0], turned)[0], one, rtol=1e-5, atol=1e-6)


def of_any_layout(x: Tensor) -> dict[str, Tensor]:
    """Maps of (2, 6, 5, 7) of which values lie apart, or several at one place, in ways that tensors seldom do."""
    wide = torch.cat([x, x.flip(1)], 1)
    return {
        "part of channels": wide[:, 3:9],
        "part of channels that are last": wide.contiguous(memory_format=torch.channels_last)[:, 3:9],
        "every second sample": torch.cat([x, x])[::2],
        "one position everywhere": x[:, :, :1, :1].expand_as(x),
        "one position everywhere, its channels last": x[:, :, 0, 0].contiguous()[:, :, None, None].expand_as(x),
        "one sample": x[:1].expand_as(x),
        "one sample whose channels are last": x[:1].contiguous(memory_format=torch.channels_last).expand_as(x),
        "overlapping rows": x.flatten().as_strided((2, 6, 5, 7), (60, 1, 7, 1)),
        "overlapping channels": x.flatten().as_strided((2, 6, 5, 7), (60, 3, 7, 1)),
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "samples behind channels": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


def test_which_layouts_the_kernels_take() -> None:
    maps = of_any_layout(torch.zeros(2, 6, 5, 7))
    refused = {layout for layout, x in maps.items() if explain(group_norm, x, 2)["native"] != "runs"}
    everywhere = {"one position everywhere", "one position everywhere, its channels last"}
    assert refused == {*everywhere, "overlapping rows", "overlapping channels", "turned"}


@pytest.mark.parametrize("layout", of_any_layout(torch.zeros(2, 6, 5, 7)))
@NAMES
def test_layouts_that_are_seldom(name: str, layout: str) -> None:
    x, *others = (t.float() for t in given(name, (2, 6, 5, 7), 0, torch.contiguous_format))
    x = of_any_layout(x + torch.arange(6.0)[:, None, None] / 8)[layout].detach().requires_grad_()
    others = [t.requires_grad_() for t in others]
    found = {}
    for dtype in (torch.float32, torch.float64):
        args = [t if dtype == torch.float32 else t.double() for t in (x, *others)]
        y = CALLS[name][1](*args) if dtype == torch.float32 else with_formulas(name, args)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(dtype)
        found[dtype] = [y, *torch.autograd.grad(y, args, g)]
    for got, right in zip(found[torch.float32], found[torch.float64], strict=True):
        assert_error_within(got, right, 64 * torch.finfo(torch.float32).eps * max(1, right.abs().max().item()))


def with_formulas(name: str, args: list[Tensor]) -> Tensor:
    with backend("reference"):
        return CALLS[name][1](*args)


@NAMES
def test_several_gradients_at_once(name: str) -> None:
    args = [t.float().requires_grad_() for t in given(name, (2, 6, 5, 7), 1, torch.contiguous_format)]
    y = CALLS[name][1](*args)
    several = torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, args, several, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(several):
        expected = torch.autograd.grad(y, args, one, retain_graph=True)
        torch.testing.assert_close([g[i] for g in got], list(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), ((1, 2), (2, 0), (2, 1)), (1, "valid", 2)]
)
def test_kn_conv_in_groups_of_any_geometry(groups: int, stride: Any, padding: Any, dilation: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(s, generator=generator) for s in ((2, 6, 9, 8), (12, 6 // groups, 3, 2), (12,))]
    seed = torch.tensor(5)
    found = []
    for dtype, which in ((torch.float32, "native"), (torch.float64, "reference")):
        args = [t.to(dtype).requires_grad_() for t in tensors]
        with backend(which):
            y = kn_conv(*args, stride, padding, dilation, groups, p=0.2, seed=seed)
        found.append([y, *torch.autograd.grad(y.sin().sum(), args)])
    for got, right in zip(*found, strict=True):
        assert_error_within(got, right, 64 * torch.finfo(torch.float32).eps * right.abs().max().item())


@pytest.mark.parametrize(
    "bias", [torch.arange(12.0)[::2], torch.ones(1).expand(6), torch.zeros(1), torch.zeros(6).double()]
)
def test_a_bias_that_is_not_one_number_a_filter_is_left_to_formulas(bias: Tensor) -> None:
    x, w = torch.randn(2, 6, 5, 5), torch.randn(6, 2, 3, 3)
    assert "bias is not one number" in explain(kn_conv, x, w, bias, groups=3)["native"]


def frn_gradients(which: str, dtype: torch.dtype, eps_l: Tensor, eps: float) -> list[Tensor]:
    """Of a map with many values at the threshold, and second ones."""
    x = torch.tensor([-1.0, 0.0, 0.0, 2.0, 0.0, 1.0]).repeat(2, 3, 4, 1).to(dtype)
    args = [x, torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3), torch.zeros(3), eps_l]
    args = [t.to(dtype).requires_grad_() for t in args]
    weights = torch.arange(x.numel()).reshape(x.shape).to(dtype) / x.numel()
    with backend(which):
        y = filter_response_norm(*args, eps=eps)
        found = torch.autograd.grad(y, args, weights, create_graph=True)
        return [y, *found, *torch.autograd.grad(found[0].square().sum(), args[:2])]


@pytest.mark.parametrize("eps_l", [torch.tensor([0.3]), torch.tensor([0.3, -0.2, 0.1])])
def test_filter_response_norm_at_its_threshold_and_with_one_number_for_all_channels(eps_l: Tensor) -> None:
    got = frn_gradients("native", torch.float32, eps_l, 0.1)
    for one, right in zip(got, frn_gradients("reference", torch.float64, eps_l, 0.1), strict=True):
        assert_error_within(one, right, 64 * torch.finfo(torch.float32).eps * right.abs().max().item())


def test_filter_response_norm_takes_one_number_for_all_channels_as_eps_alone() -> None:
    one = torch.ones(1)
    x = torch.randn(2, 5, 3, 3)
    assert "not one number a channel" in explain(filter_response_norm, x, one, None, None, one)["native"]


@NAMES
@FORMATS
def test_what_is_not_a_number_stays_so(name: str, format: torch.memory_format) -> None:
    args = [t.float() for t in given(name, (2, 6, 5, 7), 0, format)]
    args[0][1, 2, 2, 3] = torch.nan
    got = passed(name, args, torch.float32, "native")
    assert got[0][0].isfinite().all()
    assert got[0][1].isnan().any()


@FORMATS
def test_many_rows_are_added_up_without_losing_digits(format: torch.memory_format) -> None:
    x = torch.randn(4, 2, 300, 300, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=format)
    weight, bias = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    with backend("native"):
        y = positional_norm(x, weight, bias)
        _, g = torch.autograd.grad(y, (weight, bias), torch.full_like(y, 1.1))
    torch.testing.assert_close(g, torch.full((2,), 1.1 * 360_000), rtol=5e-6, atol=0)


@FORMATS
def test_moments_of_channels_at_a_large_mean(format: torch.memory_format) -> None:
    x = torch.randn(3, 5, 40, 50, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=format) + 1000
    with backend("native"):
        mean, squares = channel_moments(x)
    exact_mean, exact_squares = channel_moments.reference(x.double())
    assert_error_within(mean, exact_mean, 1000 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(squares.double(), exact_squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [0, 10, 1000])
@pytest.mark.parametrize("filter_mean", [0.0, 0.5])
def test_kn_conv_of_filters_with_a_mean_errs_no_more_than_a_convolution_and_batch_norm(
    mean: int, filter_mean: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, 12, 12, generator=generator) + mean
    w = 0.05 * (torch.randn(64, 64, 3, 3, generator=generator) + filter_mean)

    def conv_bn(x: Tensor, w: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, w), None, None, training=True)

    def relative(call: Callable[[Tensor, Tensor], Tensor]) -> float:
        exact = call(x.double(), w.double())
        return ((call(x, w) - exact).norm() / exact.norm()).item()

    assert explain(kn_conv, x, w)["native"] == "runs"
    assert relative(kn_conv) <= 2 * relative(conv_bn)


@FORMATS
@pytest.mark.parametrize(
    ("channels", "each", "sizes", "window"),
    [
        (5, 1, (6, 7), 3),
        (9, 3, (8, 5), (2, 5)),
        (48, 4, (7, 9), (7, 3)),
        (54, 2, (7, 6), 3),  # 27 groups: registers of them, and some left over
        (70, 2, (12, 9), 4),
        (40, 5, (3, 11), (1, 10)),
        (70, 2, (3, 300), (2, 7)),
    ],
)
def test_local_context_norm_of_groups_and_windows_of_any_size(
    channels: int, each: int, sizes: tuple[int, int], window: Any, format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, channels, *sizes, generator=generator, dtype=torch.float64).contiguous(memory_format=format)
    args = [(x + 10).float().double(), *norm_parameters(channels, 2, generator)]
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def both_ways(dtype: torch.dtype, which: str) -> list[Tensor]:
        asked = [t.to(dtype).requires_grad_() for t in args]
        with backend(which):
            y = local_context_norm(asked[0], window, each, *asked[1:])
            return [y, *torch.autograd.grad(y, asked, g.to(dtype))]

    exact, naive = both_ways(torch.float64, "reference"), both_ways(torch.float32, "reference")
    for got, right, plain in zip(both_ways(torch.float32, "native"), exact, naive, strict=True):
        roundoff = 64 * torch.finfo(torch.float32).eps * right.abs().max().item()
        assert_error_within(got, right, 2 * error(plain, right) + roundoff)


@pytest.mark.parametrize("size", [96, 144, 240, 256])
@pytest.mark.parametrize("unlike", ["a margin", "a column", "a corner", "a row"])
def test_a_part_unlike_the_rest_costs_local_context_norm_no_digits_elsewhere(size: int, unlike: str) -> None:
    """Sums are taken of values less a constant near their mean, which few positions tell: not all of one such part."""
    x = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)) + 1e3
    part = {
        "a margin": (..., slice(24)),
        "a column": (..., 0),
        "a corner": (..., 0, 0),
        "a row": (..., 0, slice(None)),
    }
    x[part[unlike]] = 0
    with backend("native"):
        got = local_context_norm(x, 5, 2)[..., 40:, 40:]
    exact, plain = (local_context_norm.reference(t, 5, 2)[..., 40:, 40:] for t in (x.double(), x))
    assert_error_within(got, exact, 2 * error(plain, exact) + 1e-6)


@FORMATS
@pytest.mark.parametrize("each", [1, 2])
def test_large_maps_of_local_context_norm_do_not_depend_on_threads_nor_on_other_samples(
    each: int, format: torch.memory_format, threads: Callable[[int], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 22, 257, 257, generator=generator).contiguous(memory_format=format) for _ in range(2))

    def both_ways(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        with backend("native"):
            y = local_context_norm(x, 7, each)
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    threads(1)
    all_by_one, one_by_one = both_ways(x, g), both_ways(x[:1], g[:1])
    threads(2)
    all_by_two, one_by_two = both_ways(x, g), both_ways(x[:1], g[:1])
    for i in range(2):
        assert torch.equal(all_by_one[i], all_by_two[i])
        assert torch.equal(all_by_one[i][:1], one_by_one[i])
        assert torch.equal(all_by_one[i][:1], one_by_two[i])


def test_local_context_norm_of_one_dimension() -> None:
    x = torch.randn(2, 6, 13, generator=torch.Generator().manual_seed(3))
    with backend("native"):
        got = local_context_norm(x, 5, 3)
    torch.testing.assert_close(got, local_context_norm.reference(x, 5, 3), rtol=1e-5, atol=1e-5)


@FORMATS
def test_batch_channel_norm_with_scales_of_groups(format: torch.memory_format) -> None:
    args = [t.float().double() for t in given("batch_channel_norm", (2, 6, 5, 7), 0, format)]
    args[5:] = [t[:2] for t in args[5:]]
    exact = passed("batch_channel_norm", args, torch.float64, "reference")
    naive = passed("batch_channel_norm", args, torch.float32, "reference")
    for got, right, plain in zip(
        passed("batch_channel_norm", args, torch.float32, "native"), exact, naive, strict=True
    ):
        roundoff = 64 * torch.finfo(torch.float32).eps * right.abs().max().item()
        assert_error_within(got, right, 2 * error(plain, right) + roundoff)


def negated(t: Tensor) -> Tensor:
    """The same values as a view of their opposites, such as ``x.conj().imag`` gives."""
    view = torch._neg_view(-t)
    assert view.is_neg()
    return view


@NAMES
@FORMATS
def test_views_of_opposites_have_their_sign(name: str, format: torch.memory_format) -> None:
    x, *others = (t.float() for t in given(name, (3, 6, 5, 7), 1, format))
    with backend("native"), pytest.raises(ValueError, match="view of its opposites"):
        CALLS[name][1](negated(x), *others)
    found = []
    for sign in (lambda t: t, negated):
        asked = [x.clone().requires_grad_(), *(sign(t.clone()).requires_grad_() for t in others)]
        with backend("native"):
            y = CALLS[name][1](*asked)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
        found.append([y, *torch.autograd.grad(y, asked, sign(g))])
        found.append(torch.autograd.grad(CALLS[name][1](*asked), asked, sign(g.new_ones(())).expand(g.shape)))
    for got, right in zip(itertools.chain(*found[2:]), itertools.chain(*found[:2]), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6)


def test_a_map_that_is_a_view_of_its_opposites_runs_formulas() -> None:
    x = torch.randn(2, 8, 1, 1, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    assert explain(group_norm, x, 2)["native"] == "x is a view of its opposites"
    torch.testing.assert_close(group_norm(x, 2), group_norm.reference(x.clone(), 2))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["parameters in float32", "all in half precision"])
@pytest.mark.parametrize("name", [name for name in CALLS if "conv" not in name])
def test_half_precision_is_float32_rounded(
    name: str, wide: bool, dtype: torch.dtype, format: torch.memory_format
) -> None:
    x, *others = (t.to(dtype) for t in given(name, (3, 6, 5, 7), 1, format))
    found = []
    for cast in (True, False):
        asked = [t.detach().requires_grad_() for t in (x, *(t.float() if wide else t for t in others))]
        with backend("native"):
            y = CALLS[name][1](*((t.float() for t in asked) if cast else asked)).to(dtype)
        found.append([y, *torch.autograd.grad(y.float().sin().sum(), asked)])
        assert [g.dtype for g in found[-1][1:]] == [t.dtype for t in asked]
    for got, right in zip(*found, strict=True):
        assert torch.equal(got, right)


@FORMATS
@pytest.mark.parametrize("rate", [None, 0.25])
@pytest.mark.parametrize("warm_start", [True, False])
def test_estimates_take_batches_in_as_formulas_do(
    rate: float | None, warm_start: bool, format: torch.memory_format
) -> None:
    assert_estimates_take_batches_in("native", rate, warm_start, format)


@pytest.mark.parametrize("watched", ["hook", "class", "everywhere"])
def test_who_watches_the_estimates_sees_them_called_in_training_too(watched: str) -> None:
    class Own(EstimatedStatistics):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            called.append(True)
            return super().forward(x)

    called: list[bool] = []
    layer = BatchChannelNorm2d(4, 2)
    if watched == "class":
        layer.bn = Own(4)
        layer(torch.randn(2, 4, 3, 3))
    else:
        register = layer.bn.register_forward_hook if watched == "hook" else register_module_forward_hook
        handle = register(lambda module, *_: called.append(True) if module is layer.bn else None)
        layer(torch.randn(2, 4, 3, 3))
        handle.remove()
    assert called == [True]


def test_estimates_of_the_next_batch_leave_backward_as_it_was() -> None:
    layer, x = BatchChannelNorm2d(4, 2), torch.randn(2, 4, 3, 3, requires_grad=True)
    found = []
    for between in (False, True):
        layer.reset_parameters()
        layer.bn.reset_parameters()
        with backend("native"):
            y = layer(x)
            if between:
                layer(x.detach() * 3 + 1)
        found.append(torch.autograd.grad(y.sin().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@NAMES
def test_second_derivatives_are_those_of_the_reference(name: str) -> None:
    args = [t.float().requires_grad_() for t in given(name, (2, 4, 4, 5), 0, torch.contiguous_format)]
    found = []
    for which in ("native", "reference"):
        with backend(which):
            y = CALLS[name][1](*args)
            (g,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), args[0])[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * found[1].abs().max().item())


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(2, 4, 3, 3, dtype=torch.float64), "x is torch.float64"),
        (torch.ones(2, 4, 3, 3, dtype=torch.complex64), "x is torch.complex64"),
        (torch.ones(0, 4, 3, 3), "no map with values"),
        (torch.ones(2, 4, 3, 6)[..., ::2], "neither contiguous nor channels last"),
        (torch.ones(2, 4, 3, 3, device="meta"), "x is on meta"),
    ],
)
def test_refusals_say_why(x: Tensor, reason: str) -> None:
    assert reason in explain(group_norm, x, 2)["native"]
    with backend("native"), pytest.raises(ValueError, match=reason):
        group_norm(x, 2)


# How the library comes to be


def told(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return run.stdout.strip()


ANSWER = (
    "import torch; from anybatch.functional import group_norm; from anybatch.dispatch import explain; "
    "x = torch.ones(2, 4, 3, 3); group_norm(x, 2); print(explain(group_norm, x, 2)['native'])"
)


def test_it_can_be_switched_off() -> None:
    assert told(ANSWER, ANYBATCH_NATIVE="0") == "ANYBATCH_NATIVE=0 switches kernels in C off"


def test_without_a_compiler_others_run(tmp_path: Path) -> None:
    assert "there is no C compiler" in told(ANSWER, PATH=str(tmp_path), CC="")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
    broken.chmod(0o755)
    answer = told(ANSWER, CC=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "failed: no room left" in answer
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_it_is_compiled_once_and_a_file_cut_short_is_made_anew(tmp_path: Path) -> None:
    """By a compiler that counts its calls and hands out what is compiled already, since compiling takes long."""
    compiler, calls, cache = tmp_path / "cc", tmp_path / "calls", tmp_path / "cache"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo 1; exit; fi\n'
        f"echo >> {shlex.quote(str(calls))}\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'cp {shlex.quote(str(native_common._path()))} "$2"\n'
    )
    compiler.chmod(0o755)

    def compilations() -> int:
        assert told(ANSWER, CC=str(compiler), XDG_CACHE_HOME=str(cache)) == "runs"
        return calls.read_text().count("\n")

    assert compilations() == 1
    (made,) = (cache / "anybatch").iterdir()
    whole, when = made.read_bytes(), made.stat().st_mtime_ns
    assert compilations() == 1
    assert made.stat().st_mtime_ns == when
    made.write_bytes(whole[:100])
    assert compilations() == 2
    assert made.read_bytes() == whole


@pytest.mark.slow
def test_the_compiler_of_this_machine_makes_it(tmp_path: Path) -> None:
    assert told(ANSWER, XDG_CACHE_HOME=str(tmp_path)) == "runs"
    assert len(list((tmp_path / "anybatch").iterdir())) == 1
