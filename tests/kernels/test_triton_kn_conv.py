"""KNConv's Triton kernels against its reference in float64, in Triton's interpreter or on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch import layers
from anybatch.dispatch import backend, explain
from anybatch.functional import kn_conv
from anybatch.kernels.triton_common import INTERPRETED
from anybatch.kernels.triton_kn_conv import TritonStages
from anybatch.methods.windows import windows
from helpers import assert_error_within, empty_is_nan, error, saved_tensors

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET is not 1")


@pytest.fixture(autouse=True)
def _all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, and not in TF32 as a GPU does by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


SEED = torch.tensor(7, device=DEVICE)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    # shape of x, shape of the weight, stride, padding, dilation and groups
    "3x3": ((2, 20, 9, 7), (24, 20, 3, 3), (1, 1, 1)),
    "3x3 halved": ((2, 20, 9, 7), (24, 20, 3, 3), (2, 1, 1)),
    "1x1": ((3, 36, 5, 7), (20, 36, 1, 1), (1, 0, 1)),
    "1x1 halved": ((2, 33, 5, 7), (17, 33, 1, 1), (2, 0, 1)),
    "dilated": ((2, 5, 11, 9), (3, 5, 2, 3), ((2, 1), (1, 3), (3, 2))),
    "unread": ((1, 4, 8, 8), (4, 4, 2, 2), (3, 0, 1)),
    "one position": ((3, 40, 1, 1), (24, 40, 1, 1), (1, 0, 1)),
    "wide": ((1, 3, 150, 3), (2, 3, 1, 1), (1, 0, 1)),
    "many channels": ((1, 2060, 1, 3), (2052, 2060, 1, 1), (1, 0, 1)),
    "groups": ((2, 20, 9, 7), (24, 5, 3, 3), (1, 1, 1, 4)),
    "groups halved": ((2, 40, 9, 7), (6, 20, 1, 1), (2, 0, 1, 2)),
    "each channel": ((2, 70, 9, 7), (70, 1, 3, 3), (1, 1, 1, 70)),
    "each channel twice": ((2, 6, 11, 9), (12, 1, 2, 3), ((2, 1), (1, 3), (3, 2), 6)),
    "groups in 1d": ((2, 6, 19), (9, 2, 4), (2, 3, 1, 3)),
    "groups in 3d": ((2, 4, 4, 5, 3), (6, 2, 3, 2, 2), ((1, 2, 1), (1, 0, 1), 1, 2)),
    "groups of many channels": ((1, 180, 1, 3), (4, 90, 1, 1), (1, 0, 1, 2)),
    "1d": ((2, 6, 19), (5, 6, 4), (2, 3, 1)),
    "3d": ((2, 4, 4, 5, 3), (6, 4, 3, 2, 2), ((1, 2, 1), (1, 0, 1), 1)),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "joined": {"activation": "relu", "residual": True},
    "added": {"residual": True, "p": 0.25, "seed": SEED},
    "dropped": {"activation": "relu", "p": 0.25, "seed": SEED},
    "all": {"activation": "relu", "residual": True, "p": 0.25, "seed": SEED},
}


def inputs(
    geometry: str, dtype: torch.dtype, *, last: bool = False, mean: float = 0.0, weights: torch.dtype | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], Any, Tensor]:
    """What `kn_conv` takes, and the shape of what it gives as a tensor on the meta device."""
    shape, filters, places = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, filters))
    bias = torch.randn(len(weight), generator=generator, dtype=torch.float64)
    x, weight = (
        x + mean + torch.linspace(-1, 1, shape[1], dtype=torch.float64).view(-1, *[1] * (x.dim() - 2)),
        weight + 0.5,
    )
    x, weight, bias = x.to(dtype), weight.to(weights or dtype), bias.to(weights or dtype)
    if last and x.dim() in LAST:
        x, weight = (t.contiguous(memory_format=LAST[x.dim()]) for t in (x, weight))
    y = kn_conv.reference(x.float(), weight.float(), None, *places)
    other = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    return (x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)), places, other.to(DEVICE)


def passed(
    how: str,
    given: tuple[Tensor, ...],
    places: Any,
    other: Tensor,
    options: dict[str, Any],
    gradient: Tensor | None = None,
) -> dict[str, Tensor]:
    """The output and all gradients for that of the output, ``other`` by default, by one backend."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    names = ["x", "weight", "bias"]
    options = dict(options)
    if options.pop("residual", False):
        leaves.append(other.detach().flip(0).contiguous().requires_grad_())
        options["residual"] = leaves[-1]
        names.append("residual")
    with backend(how):
        y = kn_conv(*leaves[:3], *places, **options)
    found = torch.autograd.grad(y, leaves, (other if gradient is None else gradient).to(y.dtype))
    return {"output": y.detach(), **dict(zip(names, found, strict=True))}


def assert_errs_little(geometry: str, way: str, dtype: torch.dtype, **more: Any) -> None:
    given, places, other = inputs(geometry, dtype, **more)
    options = WAYS[way]
    with empty_is_nan():
        got = passed("triton", given, places, other, options)
    # Behind a ReLU values next to 0 may be let through here and not there: both get what this output lets through.
    through = other * (got["output"] > 0) if "activation" in options else other
    linear = {name: value for name, value in options.items() if name != "activation"}
    exact = passed("reference", tuple(t.double() for t in given), places, other.double(), linear, through)
    naive = passed("reference", given, places, other, linear, through)
    for found in (exact, naive):
        found["output"] = found["output"].relu() if "activation" in options else found["output"]
    for name, truth in exact.items():
        assert got[name].dtype == naive[name].dtype, name
        roundings = 2 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
        allowed = 2 * error(naive[name], truth) + roundings * truth.abs().max().item()
        assert_error_within(got[name], truth, allowed, f"{name} ({way})")
    if more.get("last") and given[0].dim() == 4 and other[0, 0].numel() > 1:
        assert got["output"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name != "many channels"])
def test_all_it_gives_is_right(geometry: str, way: str, last: bool) -> None:
    if last and len(GEOMETRIES[geometry][0]) == 3:
        pytest.skip("signals have no channels_last")
    assert_errs_little(geometry, way, torch.float32, last=last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("geometry", ["3x3 halved", "1x1", "groups", "each channel"])
def test_half_precision_with_parameters_in_float32(geometry: str, way: str, dtype: torch.dtype) -> None:
    assert_errs_little(geometry, way, dtype, last=True, weights=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_more_channels_than_a_program_sees(last: bool) -> None:
    assert_errs_little("many channels", "dropped", torch.float32, last=last)


@pytest.mark.parametrize("mean", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("way", ["joined", "dropped"])
@pytest.mark.parametrize("geometry", ["3x3", "groups"])
def test_large_means(geometry: str, way: str, mean: float) -> None:
    assert_errs_little(geometry, way, torch.float32, last=True, mean=mean)


@pytest.mark.parametrize("mean", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("geometry", ["3x3", "groups", "each channel"])
def test_large_means_in_half_precision(geometry: str, mean: float) -> None:
    assert_errs_little(geometry, "plain", torch.bfloat16, last=True, mean=mean, weights=torch.float32)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("geometry", ["3x3 halved", "groups"])
def test_a_sample_is_the_same_to_the_last_bit_alone_and_in_a_batch(geometry: str, p: float, last: bool) -> None:
    """Of all stages around the convolution, which itself may round otherwise in another batch."""
    (x, weight, bias), places, g = inputs(geometry, torch.float32, last=last)
    at, seed, stages = windows(2, 3, *places[:3]), SEED if p else None, TritonStages()
    groups = x.shape[1] // weight.shape[1]
    plain, z = groups > 1, torch.nn.functional.conv2d(x, weight, None, *places)
    g_x = torch.randn_like(x)

    def one(n: int) -> list[Tensor]:
        filters = stages.filters(weight, x.dtype)
        pixels = stages.pixels(x[:n], p, seed, plain)
        own = stages.group_means(x[:n], at, groups, z[:n]) if plain else None
        done = stages.normalized(z[:n].clone(), pixels, filters, own, bias, None, at, p, 1e-5, True)
        back = stages.pulled(g[:n], done, filters.total, own, bias, None, at, True)
        through = stages.through_moments(g_x[:n].clone(), x[:n], done, back, at, p, seed)
        found = [*pixels, done.y, done.mean, done.scale, done.apart, back.z, back.var, back.own, through]
        return [t[:1] for t in found if t is not None]

    for alone, together in zip(one(1), one(2), strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("geometry", ["3x3", "each channel"])
def test_it_keeps_its_input_its_output_and_maps_of_one_channel(geometry: str, p: float) -> None:
    (x, weight, bias), places, _ = inputs(geometry, torch.float32, last=True)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    with backend("triton"), saved_tensors() as kept:
        y = kn_conv(x, weight, bias, *places, activation="relu", p=p, seed=SEED if p else None)
    large = [t for t in kept if t.numel() >= x[:, :2].numel() and t.shape[0] == x.shape[0]]
    assert {t.data_ptr() for t in large} == {x.data_ptr(), y.data_ptr()}


def test_second_derivatives_are_those_of_the_reference() -> None:
    (x, weight, bias), places, _ = inputs("dilated", torch.float32)

    def curvature(how: str) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        with backend(how):
            y = kn_conv(leaf, weight, bias, *places)
        (slope,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature("triton"), curvature("reference"), rtol=1e-3, atol=1e-3)


def test_gradients_that_lie_otherwise_and_are_expanded() -> None:
    given, places, _ = inputs("3x3", torch.float32, last=True)
    found = {}
    for how in ("reference", "triton"):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        with backend(how):
            kn_conv(*leaves, *places, activation="relu").sum().backward()
        found[how] = [leaf.grad for leaf in leaves]
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-4)


def test_what_it_refuses_says_why() -> None:
    (x, weight, bias), places, _ = inputs("3x3", torch.float32)

    def told(x: Tensor, weight: Tensor = weight, *places: Any, **options: Any) -> str:
        return explain(kn_conv, x, weight, bias, *places, **options)["triton"]

    assert told(x, weight, *places) == "runs"
    assert "float64" in told(x.double(), weight.double())
    assert "neither contiguous nor channels last" in told(x[..., ::2])
    assert "no map" in told(x[:0])
    assert "norm_groups=2" in told(x, weight[:, :10], 1, 0, 1, 2, norm_groups=2)
    assert "more than 128" in told(torch.randn(1, 2, 12, 12, device=DEVICE), torch.randn(2, 2, 12, 12, device=DEVICE))
    with backend("triton"), pytest.raises(ValueError, match="'triton' kernel of kn_conv refuses: x is float64"):
        kn_conv(x.double(), weight.double(), bias.double())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_step_is_captured_as_a_graph_that_draws_a_new_mask_each_time() -> None:
    layer = layers.KNConv2d(32, 16, 3, padding=1, p=0.3, device="cuda")
    x = torch.randn(2, 32, 9, 9, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (g_x,) = torch.autograd.grad(y.square().sum(), x)
    graph.replay()
    first, g_first = y.clone(), g_x.clone()
    graph.replay()
    assert error(y, first) > 1e-3
    assert error(g_x, g_first) > 1e-3
    assert torch.isfinite(g_x).all()
