"""Local context normalization's Triton kernels against its reference in float64, interpreted or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import backend, explain
from anybatch.functional import group_norm, local_context_norm
from helpers import saved_tensors
from kernels.common import (
    DEVICE,
    VIEWS,
    Called,
    assert_errs_little,
    gradient,
    images,
    launched,
    needs_triton,
    parameters,
    passed,
)

pytestmark = needs_triton

Window = int | tuple[int, ...]

CASES: dict[str, tuple[tuple[int, ...], Window, int]] = {
    "odd": ((2, 6, 5, 7), 3, 2),
    "three channels a group": ((1, 12, 5, 7), (3, 4), 3),
    "one channel a group": ((1, 5, 6, 5), 3, 1),
    "one group": ((1, 6, 5, 7), 3, 6),
    "more channels a group than a program sees of two": ((1, 1030, 2, 3), 2, 515),
    "even windows": ((1, 4, 6, 9), (2, 6), 2),
    "almost whole": ((1, 4, 6, 9), (5, 8), 2),
    "one position along a dimension": ((1, 4, 5, 7), (1, 3), 2),
    "one position along the other": ((1, 4, 5, 7), (3, 1), 2),
    "one position along both": ((1, 6, 3, 4), 1, 3),
    "larger than a dimension": ((1, 4, 5, 7), (9, 3), 2),
    "larger than the other": ((1, 4, 5, 7), (3, 9), 2),
    "larger than the map": ((2, 4, 5, 7), 9, 2),
    "several chunks": ((1, 2, 35, 18), (5, 3), 2),
    "several chunks of windows of more than a chunk": ((1, 2, 50, 3), (37, 2), 2),
    "many groups and positions": ((1, 36, 2, 40), (2, 3), 1),
    "one row": ((1, 4, 1, 9), 3, 2),
    "one column": ((1, 4, 9, 1), 3, 2),
    "1d": ((2, 4, 23), 5, 2),
    "1d and one channel": ((1, 1, 20), 4, 1),
    "3d": ((2, 4, 3, 4, 5), (3, 2, 3), 2),
    "4d": ((1, 2, 2, 3, 3, 2), 2, 2),
}


def local(x: Tensor, window: Window = 3, each: int = 2, *, affine: bool = True, **options: Any) -> Called:
    return local_context_norm, (window, each, *(parameters(x.shape[1], "weight", "bias") if affine else ())), options


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_all_it_gives_is_right(case: str, last: bool) -> None:
    shape, window, each = CASES[case]
    if last and not 4 <= len(shape) <= 5:
        pytest.skip("has no channels_last")
    x = images(shape, torch.float32, last=last)
    assert "runs" in explain(local_context_norm, x, window, each)["triton"]
    # Where a window holds few values one may hardly vary, through which a rounding passes enlarged.
    assert_errs_little(local(x, window, each, eps=0.1), x, gradient(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(3, 4), 9])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations(activation: str, last: bool, window: Window, dtype: torch.dtype) -> None:
    x = images((2, 6, 5, 7), dtype, last=last)
    called = local(x, window, 3, activation=activation, eps=0.1)
    for g in (gradient(x), gradient(x).contiguous()):
        assert_errs_little(called, x, g, torch.float32)


def test_relu_keeps_nan_and_passes_nothing_at_0() -> None:
    x = images((1, 4, 5, 7), torch.float32)
    x[0, 0, 0, 0] = float("nan")
    bias = torch.zeros(4, device=DEVICE)
    with backend("triton"):
        y = local_context_norm(x, 3, 2, None, bias, activation="relu")
        flat = torch.ones((1, 4, 5, 7), device=DEVICE, requires_grad=True)
        bias.requires_grad_()
        (g,) = torch.autograd.grad(local_context_norm(flat, 3, 2, None, bias, activation="relu").sum(), bias)
    assert y[0, 0, 0, 0].isnan()
    assert not g.any()


@pytest.mark.parametrize("given", ["none", "weight", "bias"])
def test_parameters_that_are_left_out(given: str) -> None:
    x = images((2, 6, 5, 7), torch.float32)
    weight, bias = parameters(6, "weight", "bias")
    others = (weight if given == "weight" else None, bias if given == "bias" else None)
    for activation in ("none", "relu"):
        options = {"eps": 1e-2, "activation": activation}
        assert_errs_little((local_context_norm, (3, 2, *others), options), x, gradient(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("window", [3, 9])
def test_half_precision_with_parameters_in_float32(window: int, dtype: torch.dtype, last: bool) -> None:
    x = images((2, 6, 5, 7), dtype, last=last)
    assert_errs_little(local(x, window), x, gradient(x), torch.float32)


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("window", [(3, 2), (17, 3), 40])
def test_large_means(window: Window, mean: float) -> None:
    x = images((1, 6, 18, 4), torch.float32, last=window == (3, 2), mean=mean)
    assert_errs_little(local(x, window, 3), x, gradient(x))


def test_one_far_value_leaves_windows_that_do_not_hold_it_as_exact_as_they_were() -> None:
    x = images((1, 4, 3, 20), torch.float32)
    with backend("triton"):
        as_it_was = local_context_norm(x, 3)
        x[0, 0, 0, 0] = -1e6  # as where an image has no data
        got = local_context_norm(x, 3)
    torch.testing.assert_close(got[..., 4:], as_it_was[..., 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("value", [0.0, 3.14159, 1e3])
def test_what_is_constant_becomes_the_bias(value: float, each: int) -> None:
    x = torch.full((1, 6, 5, 20), value, device=DEVICE)
    bias = torch.linspace(-1, 1, 6, device=DEVICE)
    with backend("triton"):
        y = local_context_norm(x, 3, each, None, bias)
    torch.testing.assert_close(y, bias.view(1, 6, 1, 1).expand_as(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_sample_is_the_same_to_the_last_bit_alone_and_in_a_batch(last: bool) -> None:
    x = images((2, 6, 18, 3), torch.float32, last=last)
    called, g = local(x), gradient(x)
    alone, together = (passed("triton", called, x[:n], g[:n]) for n in (1, 2))
    for name in ("output", "gradient 0"):
        assert torch.equal(alone[name], together[name][:1]), name


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x = VIEWS[view](images((2, 12, 6, 8), torch.float32))
    if "runs" not in explain(local_context_norm, x, 2, 3)["triton"]:
        assert view == "turned"
        return
    assert_errs_little(local(x, (2, 3), 3), x, gradient(x))


def test_gradients_that_lie_otherwise_and_are_expanded() -> None:
    x = images((2, 6, 5, 7), torch.float32, last=True)
    for g in (torch.ones((), device=DEVICE).expand(x.shape), gradient(x).contiguous()):
        assert_errs_little(local(x), x, g)


@pytest.mark.parametrize(
    ("shape", "boxed"), [((2, 8, 6, 7), ["boxed"]), ((2, 8, 9), ["boxed"]), ((1, 8, 5, 6, 7), ["boxed", "boxed"])]
)
def test_it_takes_few_launches_and_keeps_its_input(
    shape: tuple[int, ...], boxed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(shape, torch.bfloat16)
    with launched(monkeypatch) as launches, saved_tensors() as kept:
        passed("triton", local(x), x, gradient(x), torch.float32)
    moments = ["pixel_moments", *boxed]
    assert launches == [*moments, "normalized", *moments, "pulled", *boxed, "combined", "added_up"]
    assert {t.data_ptr() for t in kept if t.numel() > x.shape[1]} == {x.data_ptr()}


def test_windows_that_cover_the_map_are_group_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images((2, 8, 6, 7), torch.float32)
    with launched(monkeypatch) as launches, backend("triton"):
        y = local_context_norm(x, (6, 9), 4)
        assert torch.equal(y, group_norm(x, 2))
    assert "normalized" not in launches


def test_second_derivatives_are_those_of_the_reference() -> None:
    x = images((2, 4, 3, 4), torch.float32)

    def curvature(how: str) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        with backend(how):
            y = local_context_norm(leaf, 3, eps=0.1)
        (slope,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature("triton"), curvature("reference"), rtol=1e-3, atol=1e-3)


def test_what_it_refuses_says_why() -> None:
    x = images((2, 4, 3, 4), torch.float32)

    def told(x: Tensor, *others: Any, **options: Any) -> str:
        return explain(local_context_norm, x, *others, **options)["triton"]

    assert told(x, 3, 2, torch.ones(4, device=DEVICE)) == "runs"
    assert "float64" in told(x.double(), 3)
    assert "neither contiguous nor channels last" in told(x.transpose(2, 3), 3)
    assert "released=True" in told(x, 3, released=True)
    assert "no positions" in told(x[..., 0, 0], 3)
    assert "channels_per_group=3 does not divide" in told(x, 3, 3)
    assert "window=(3, 3, 3) is for 3 dimensions" in told(x, (3, 3, 3))
    assert "window=0 must be 1 or more" in told(x, 0)
    assert "one value" in told(x, 1, 1)
    assert "5000 channels" in told(x[:, :1].expand(-1, 5000, -1, -1), 3, 5000)
    assert "not one number a channel" in told(x, 3, 2, torch.ones(3, device=DEVICE))
    assert "activation='tanh' is none of" in told(x, 3, activation="tanh")


@pytest.mark.parametrize("shape", [(0, 4, 3, 4), (2, 0, 3, 4), (2, 4, 0, 4)])
def test_no_values(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    assert "no values" in explain(local_context_norm, x, 2)["triton"]
    assert local_context_norm(x, 2).shape == shape
