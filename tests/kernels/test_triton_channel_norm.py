"""Norms by channel moments as Triton kernels against their references in float64, interpreted or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import backend, explain
from anybatch.functional import batch_channel_norm, filter_response_norm, group_norm
from anybatch.kernels import layouts, triton_channel_plans
from anybatch.methods.batch_channel_norm import estimated_batch_channel_norm
from anybatch.methods.batch_norm import channel_moments
from helpers import assert_error_within, error, saved_tensors
from kernels.common import (
    DEVICE,
    VIEWS,
    Called,
    assert_errs_little,
    assert_estimates_take_batches_in,
    gradient,
    images,
    in_format,
    launched,
    needs_triton,
    parameters,
    passed,
    roundoff,
)

pytestmark = needs_triton

SHAPES: dict[str, tuple[int, ...]] = {
    "odd": (2, 12, 5, 7),
    "chunks": (2, 4, 40, 41),
    "wide": (1, 136, 3, 3),
    "one channel": (2, 1, 6, 5),
    "one position": (3, 8, 1, 1),
    "no positions": (3, 8),
    "1d": (2, 4, 33),
    "3d": (2, 4, 3, 4, 5),
}


def group(x: Tensor, activation: str = "none") -> Called:
    groups = 4 if x.shape[1] % 4 == 0 else 1
    return group_norm, (groups, *parameters(x.shape[1], "weight", "bias")), {"activation": activation}


def layer(x: Tensor, activation: str = "none") -> Called:
    return group_norm, (1,), {"activation": activation}


def batch(x: Tensor, activation: str = "none") -> Called:
    c = x.shape[1]
    mean = parameters(c, "mean")[0] + x.double().mean().cpu()
    var = parameters(c, *"ab")[1].square() + 0.1
    groups = 2 if c % 2 == 0 else 1
    of_batch, of_groups = parameters(c, *"abc")[:2], parameters(groups, *"abcd")[:2]
    return batch_channel_norm, (groups, mean, var, *of_batch, *of_groups), {"activation": activation}


def response(x: Tensor, activation: str = "none") -> Called:
    c = x.shape[1]
    weight, bias, tau, _ = parameters(c, *"abcd")
    return filter_response_norm, (weight, bias, tau if activation == "relu" else None, parameters(1, "e")[0]), {}


WAYS: dict[str, Callable[..., Called]] = {"group": group, "layer": layer, "batch": batch, "response": response}


def with_limits(monkeypatch: pytest.MonkeyPatch, **limits: int) -> Iterator[None]:
    """Within this, programs of other sizes."""
    plans = triton_channel_plans
    caches = (plans.forward, plans.backward, plans.whole_forward, plans.whole_backward)
    for name, value in limits.items():
        monkeypatch.setattr(plans, name, value)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No program holds a group whole."""
    yield from with_limits(monkeypatch, _WHOLE=0)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs that read so little at once that maps of a test take many chunks of several tiles."""
    yield from with_limits(monkeypatch, _TILE=64)


@pytest.fixture(params=["whole", "in steps"])
def held(request: pytest.FixtureRequest) -> str:
    """Whether one program holds groups whole."""
    if request.param == "in steps":
        request.getfixturevalue("in_steps")
    elif request.node.callspec.params.get("way") == "response":
        pytest.skip("takes steps anyway")
    return request.param


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_it_gives_is_right(shape: str, way: str, last: bool) -> None:
    if last and len(SHAPES[shape]) < 4:
        pytest.skip("has no channels_last")
    x = images(SHAPES[shape], torch.float32, last=last)
    if way == "layer" and x[0].numel() == x.shape[1] == 1:
        pytest.skip("one value")
    assert_errs_little(WAYS[way](x), x, gradient(x))


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("way", ["group", "batch", "response"])
def test_activations_and_thresholds(way: str, activation: str) -> None:
    x = images((2, 12, 5, 7), torch.float32, last=True)
    called = WAYS[way](x, activation)
    if way == "response" and activation != "relu":
        pytest.skip("has a threshold alone")
    near = None
    if activation == "relu":  # where rounding decides what passes
        op, others, options = WAYS[way](x)
        wide = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in others]
        near = op.reference(x.double(), *wide, **options)
        near = near - called[1][2].to(DEVICE).view(-1, 1, 1) if way == "response" else near
    assert_errs_little(called, x, gradient(x, near))


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_with_parameters_in_float32(way: str, dtype: torch.dtype) -> None:
    x = images((2, 12, 5, 7), dtype, last=True)
    assert_errs_little(WAYS[way](x), x, gradient(x), torch.float32)


@pytest.mark.parametrize("whole", [8192, 0], ids=["whole", "in steps"])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_scale_and_a_shift_of_all_channels(samples: int, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images((samples, 8, 5, 4), torch.float32)
    op, (_, mean, var, *of_batch), options = batch(x)
    called = op, (1, mean, var, *of_batch[:2], *parameters(1, *"abcd")[:2]), options
    for _ in with_limits(monkeypatch, _WHOLE=whole):
        assert_errs_little(called, x, gradient(x))


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("way", ["group", "batch"])
def test_large_means(way: str, mean: float, last: bool) -> None:
    x = images((2, 4, 40, 41), torch.float32, last=last, mean=mean)
    assert_errs_little(WAYS[way](x), x, gradient(x))


def test_a_black_corner_far_from_the_mean() -> None:
    """What subtracted the first position's value before it squared would lose the variance."""
    x = images((1, 4, 40, 41), torch.float32, mean=1000.0)
    x[..., 0, 0] = 0.0
    assert_errs_little(group(x), x, gradient(x))


@pytest.mark.usefixtures("in_steps", "small_tiles")
def test_many_tiles_in_many_chunks() -> None:
    x = images((1, 36, 9, 11), torch.float32, last=True, mean=100.0)
    assert_errs_little(batch(x), x, gradient(x))


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("way", WAYS)
def test_a_sample_is_the_same_to_the_last_bit_alone_and_in_a_batch(way: str, last: bool) -> None:
    x = images((3, 4, 40, 41), torch.float32, last=last)
    called, g = WAYS[way](x), gradient(x)
    alone, together = (passed("triton", called, x[:n], g[:n]) for n in (1, 3))
    for name in ("output", "gradient 0"):
        assert torch.equal(alone[name], together[name][:1]), name


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x = VIEWS[view](images((2, 12, 6, 8), torch.float32))
    if "runs" not in explain(group_norm, x, 1)["triton"]:
        assert view == "turned"
        return
    assert_errs_little(group(x, "silu"), x, gradient(x))


def test_gradients_that_lie_otherwise_and_are_expanded() -> None:
    x = images((2, 12, 5, 7), torch.float32, last=True)
    called = group(x, "gelu")
    for g in (torch.ones((), device=DEVICE).expand(x.shape), gradient(x).contiguous(), gradient(x)[:, :1].expand_as(x)):
        assert_errs_little(called, x, g)


@pytest.mark.parametrize("way", WAYS)
def test_it_takes_few_launches_and_keeps_its_input(way: str, held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images((2, 16, 9, 7), torch.bfloat16, last=True)
    called = WAYS[way](x, "relu")
    with launched(monkeypatch) as launches, saved_tensors() as kept:
        passed("triton", called, x, gradient(x), torch.float32)
    if held == "whole":
        assert launches == ["whole_groups", "through_whole_groups", "added_up"]
    else:
        assert len(launches) == 6, launches
    large = [t for t in kept if t.numel() >= x.numel()]
    assert {t.data_ptr() for t in large} == {x.data_ptr()}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_which_groups_a_program_holds_whole(last: bool) -> None:
    """Those of ResNet-50 at 224 pixels in the last two stages; and others of few channels, where these are apart."""
    fits = []
    for channels, size in ((64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)):
        x = in_format(torch.empty(1, channels, size, size, dtype=torch.bfloat16), last)
        layout = layouts.layout_of(x.shape, x.stride())
        norm = triton_channel_plans.Norm(32, 1e-5, "relu")
        fits.append(triton_channel_plans._whole_tiles(norm, x.shape, layout, 2) is not None)
    assert fits == [not last, False, not last, False, True, True, True, True]


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_are_those_of_the_reference(way: str) -> None:
    x = images((2, 4, 3, 3), torch.float32)
    op, others, options = WAYS[way](x)
    given = [a.float().to(DEVICE) if isinstance(a, Tensor) else a for a in others]

    def curvature(how: str) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        with backend(how):
            y = op(leaf, *given, **options)
        (slope,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature("triton"), curvature("reference"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "mean"), [("odd", 0.0), ("chunks", 1000.0), ("one position", 10.0)])
def test_moments_of_channels_over_a_batch(shape: str, mean: float, last: bool) -> None:
    x = images(SHAPES[shape], torch.float32, last=last, mean=mean)
    with backend("triton"):
        got = channel_moments(x)
    exact, naive = (channel_moments.reference(t) for t in (x.double(), x))
    for some, truth, plain in zip(got, exact, naive, strict=True):
        assert_error_within(some, truth, 2 * error(plain, truth) + roundoff(x, truth))
    assert "gradient" in explain(channel_moments, x.requires_grad_())["triton"]


@pytest.mark.parametrize("rate", [None, 0.25])
@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_estimates_take_batches_in_as_formulas_do(
    rate: float | None, warm_start: bool, format: torch.memory_format
) -> None:
    assert_estimates_take_batches_in("triton", rate, warm_start, format)


def test_estimates_of_many_small_chunks_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images((3, 20, 40, 41), torch.bfloat16, last=True, mean=10.0)
    found = []
    with launched(monkeypatch) as names:
        for which, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            estimates = [torch.zeros(20, dtype=dtype), torch.ones(20, dtype=dtype), torch.tensor(0)]
            estimates = [t.to(DEVICE) for t in estimates]
            with backend(which):
                for _ in range(2):
                    estimated_batch_channel_norm(x.to(dtype) if which == "reference" else x, 4, *estimates, rate=1)
            found.append(estimates)
    assert names.count("let_in") == 2
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got.to(right.dtype), right, rtol=1e-6, atol=0)


def test_estimates_that_no_kernel_takes() -> None:
    x, (mean, var) = images((2, 4, 3, 3), torch.float32), (torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE))
    batches = torch.tensor(0, device=DEVICE)

    def told(*estimates: Tensor) -> str:
        return explain(estimated_batch_channel_norm, x, 2, *estimates)["triton"]

    assert told(mean, var, batches) == "runs"
    assert "not float32" in told(mean.half(), var.half(), batches)
    assert "not int64" in told(mean, var, batches.int())
    assert "one number a channel" in told(mean[:2], var[:2], batches)


def test_what_it_refuses_says_why() -> None:
    x = images((2, 4, 3, 4), torch.float32)
    weight = torch.ones(4, device=DEVICE)

    def told(x: Tensor, *others: Any) -> str:
        return explain(group_norm, x, *others)["triton"]

    assert told(x, 2, weight) == "runs"
    assert "float64" in told(x.double(), 2)
    assert "float64 on" in told(x, 2, weight.double())
    assert "neither contiguous nor channels last" in told(x.transpose(2, 3), 2)
    assert "no values" in told(x[:0], 2)
    assert "none that the op takes" in told(x, 3)
    assert "not one number a channel" in told(x, 2, weight[:2].contiguous())
    assert "more than 4096" in told(torch.ones(1, 8192, 2, device=DEVICE), 1)
    assert "not one number a channel" in explain(filter_response_norm, x, weight[:1])["triton"]
    with backend("triton"), pytest.raises(ValueError, match="'triton' kernel of group_norm refuses: x has no values"):
        group_norm(x[:0], 2)
