"""Positional normalization's Triton kernels against its reference in float64, interpreted or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import backend, explain
from anybatch.functional import positional_norm
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

SHAPES: dict[str, tuple[int, ...]] = {
    "odd": (2, 12, 5, 7),
    "two channels": (1, 2, 9, 4),
    "more channels than a program sees": (1, 2060, 1, 3),
    "300 channels": (1, 300, 5, 4),
    "many rows": (1, 3, 40, 41),
    "one position": (3, 8, 1, 1),
    "no positions": (3, 8),
    "1d": (2, 4, 33),
    "3d": (2, 4, 3, 4, 5),
}


def positional(x: Tensor, *, affine: bool = True, **options: Any) -> Called:
    return positional_norm, parameters(x.shape[1], "weight", "bias") if affine else (), options


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_it_gives_is_right(shape: str, last: bool) -> None:
    if last and len(SHAPES[shape]) < 4:
        pytest.skip("has no channels_last")
    x = images(SHAPES[shape], torch.float32, last=last)
    # Two channels normalize to 1 and -1, through which hardly a gradient passes.
    assert_errs_little(positional(x, eps=1.0 if x.shape[1] == 2 else 1e-5), x, gradient(x))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_and_no_parameters(activation: str, affine: bool) -> None:
    x = images((2, 12, 5, 7), torch.float32)
    called = positional(x, affine=affine, activation=activation, unbiased=True)
    near = None
    if activation == "relu":  # where rounding decides what passes
        near = positional_norm.reference(x.double(), *(p.to(DEVICE) for p in called[1]), unbiased=True)
    assert_errs_little(called, x, gradient(x, near))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_half_precision_with_parameters_in_float32(dtype: torch.dtype, last: bool) -> None:
    x = images((2, 12, 5, 7), dtype, last=last)
    assert_errs_little(positional(x), x, gradient(x), torch.float32)


@pytest.mark.parametrize(("channels", "mean"), [(12, 10.0), (12, 100.0), (12, 1000.0), (2060, 1000.0)])
def test_large_means(channels: int, mean: float) -> None:
    x = images((1, channels, 2, 3), torch.float32, last=True, mean=mean)
    assert_errs_little(positional(x), x, gradient(x))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_sample_is_the_same_to_the_last_bit_alone_and_in_a_batch(last: bool) -> None:
    x = images((3, 20, 20, 21), torch.float32, last=last)
    called, g = positional(x, activation="silu"), gradient(x)
    alone, together = (passed("triton", called, x[:n], g[:n]) for n in (1, 3))
    for name in ("output", "gradient 0"):
        assert torch.equal(alone[name], together[name][:1]), name


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x = VIEWS[view](images((2, 12, 6, 8), torch.float32))
    if "runs" not in explain(positional_norm, x)["triton"]:
        assert view == "turned"
        return
    assert_errs_little(positional(x), x, gradient(x))


def test_gradients_that_lie_otherwise_and_are_expanded() -> None:
    x = images((2, 12, 5, 7), torch.float32, last=True)
    for g in (torch.ones((), device=DEVICE).expand(x.shape), gradient(x).contiguous()):
        assert_errs_little(positional(x, activation="gelu"), x, g)


def test_it_takes_one_launch_forward_and_two_backward_and_keeps_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images((2, 16, 9, 7), torch.bfloat16, last=True)
    with launched(monkeypatch) as launches, saved_tensors() as kept:
        passed("triton", positional(x, activation="relu"), x, gradient(x), torch.float32)
    assert launches == ["normalized", "pulled", "added_up"]
    assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {x.data_ptr()}


def test_second_derivatives_are_those_of_the_reference() -> None:
    x = images((2, 4, 3, 3), torch.float32)

    def curvature(how: str) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        with backend(how):
            y = positional_norm(leaf, activation="silu")
        (slope,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature("triton"), curvature("reference"), rtol=1e-3, atol=1e-3)


def test_what_it_refuses_says_why() -> None:
    x = images((2, 4, 3, 4), torch.float32)

    def told(x: Tensor, *others: Any, **options: Any) -> str:
        return explain(positional_norm, x, *others, **options)["triton"]

    assert told(x, torch.ones(4, device=DEVICE)) == "runs"
    assert "float64" in told(x.double())
    assert "neither contiguous nor channels last" in told(x.transpose(2, 3))
    assert "no values" in told(x[:0])
    assert "no channels" in told(x[:, :1])
    assert "not one number a channel" in told(x, torch.ones(3, device=DEVICE))
    assert "'tanh'" in told(x, activation="tanh")
