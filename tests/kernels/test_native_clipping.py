"""Clipping of all gradients at once in C: to the last bit what torch's operations give, and what it leaves to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from anybatch.dispatch import backend, explain
from anybatch.kernels import native_clipping, native_common
from anybatch.methods.adaptive_gradient_clipping import LEAST_NORM, Clipped, Units, adaptive_clip_grad_, clip_alike
from anybatch.methods.parameters import places


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if reason := native_common.refused_c():
        pytest.skip(reason)
    if not native_clipping._adds_as_torch():
        pytest.skip("torch adds in another order here")


@pytest.fixture
def threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def network(*, last: bool = False, seed: int = 0) -> nn.Sequential:
    """Units of 1 to 2304 values, some above the threshold and some below, vectors, and a number by itself."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 7, 3), nn.Conv2d(256, 65, 3), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(33), nn.Linear(13, 5)]
    model = nn.Sequential(*layers)
    model.register_parameter("gain", nn.Parameter(torch.tensor(0.5)))
    if last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
        sizes = torch.exp(3 * torch.randn(p.shape[:1] + (1,) * (p.dim() - 1)) - 3)
        p.grad = torch.randn_like(p) * sizes
    wide = next(p for p in model.parameters() if p.dim() == 4 and len(p) == 65)
    assert wide.grad is not None
    wide.grad = wide.grad.contiguous()  # lies otherwise than its weight
    return model


def units_of(model: nn.Module) -> list[Units]:
    return [Units.at(place) for place in places(model)]


def clipped_by(how: str, model: nn.Module, scale: Tensor | None = None) -> tuple[list[Tensor], Clipped]:
    with backend(how), torch.no_grad():
        found = clip_alike(units_of(model), 0.02, 1e-3, scale, torch.float32)
    return [p.grad for p in model.parameters() if p.grad is not None], found


def slowly(model: nn.Module, clip_factor: float, eps: float) -> list[Tensor]:
    """The literal loop over units."""
    made = []
    for p in model.parameters():
        assert p.grad is not None
        grad = p.grad.clone()
        whole = sum(n > 1 for n in p.shape) < 2  # one unit, whatever its dimensions
        for w, g in [(p.detach(), grad)] if whole else zip(p.detach(), grad, strict=True):
            most = clip_factor * torch.linalg.vector_norm(w).clamp_min(eps)
            norm = torch.linalg.vector_norm(g)
            if norm > most:
                g.mul_(most / norm.clamp_min(LEAST_NORM))
        made.append(grad)
    return made


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("seed", range(3))
def test_every_bit_is_that_of_the_literal_loop(last: bool, seed: int) -> None:
    model = network(last=last, seed=seed)
    expected = slowly(model, 0.02, 1e-3)
    got, found = clipped_by("native", model)
    assert 0 < int(found.clipped) < found.units
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [None, torch.tensor(3.0)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.usefixtures("threads")
def test_every_bit_is_that_of_torch_s_operations(last: bool, scale: Tensor | None) -> None:
    (got, found), (expected, truth) = (clipped_by(how, network(last=last), scale) for how in ("native", "reference"))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert (found.names, found.sizes) == (truth.names, truth.sizes)
    assert torch.equal(found.ratios, truth.ratios)
    assert torch.equal(found.over, truth.over)


def test_what_is_not_finite_or_0_stays() -> None:
    found = []
    for how in ("native", "reference"):
        model = nn.Linear(9, 6, bias=False)
        weight = model.weight
        nn.init.constant_(weight, 0.1)
        weight.data[4], weight.data[5] = 0, torch.nan
        weight.grad = torch.ones_like(weight)
        weight.grad[0, 0], weight.grad[1, 1], weight.grad[2] = torch.inf, torch.nan, 0
        grads, told = clipped_by(how, model)
        found.append((grads[0], told.ratios, told.over))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert found[0][2].tolist() == [False, False, False, True, True, False]


def test_autograd_sees_that_gradients_have_changed() -> None:
    model = network()
    versions = [p.grad._version for p in model.parameters() if p.grad is not None]
    got, _ = clipped_by("native", model)
    assert all(g._version > before for g, before in zip(got, versions, strict=True))


def _said(model: nn.Module) -> dict[str, str]:
    return explain(clip_alike, units_of(model), 0.02, 1e-3, None, torch.float32)


def test_it_runs_where_it_can() -> None:
    assert _said(network(last=True))["native"] == "runs"


def _transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 3))


def _large_vector() -> nn.Module:
    model = nn.Module()
    model.register_parameter("gain", nn.Parameter(torch.randn(40_000)))
    return model


def _half() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4)).bfloat16()


def _strided() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.randn(4, 8)[:, ::2])
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_transposed(), "no rows in memory"),
        (_large_vector(), "one unit that torch splits among threads"),
        (_half(), "not float32"),
        (_strided(), "no rows in memory"),
    ],
)
def test_what_it_leaves_to_torch_says_why_and_is_right(model: nn.Module, reason: str) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    assert reason in _said(model)["native"]
    assert adaptive_clip_grad_(model).clipped > 0


def test_where_torch_adds_in_another_order_it_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_clipping, "_adds_as_torch", lambda: False)
    assert _said(network())["native"] == "torch adds in another order here"
