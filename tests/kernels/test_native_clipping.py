"""Clipping of all gradients at once in C: to the last bit what torch's operations give, and what it leaves to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from anybatch.dispatch import backend, explain
from anybatch.kernels import native_clipping, native_common
from anybatch.methods.adaptive_gradient_clipping import LEAST_NORM, Clipped, Units, adaptive_clip_grad_, clip_alike
from anybatch.methods.parameters import places

KNOWN = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether torch adds in the kernel's order: known beforehand, so that a mistake in the kernel skips no test."""


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if reason := native_common.refused_c():
        pytest.skip(reason)
    if not KNOWN:
        pytest.skip("torch may add in another order here")


def test_torch_adds_in_the_kernel_s_order() -> None:
    assert native_clipping._adds_as_torch()


def test_a_look_at_norms_tells_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native_clipping._norms
    monkeypatch.setattr(native_clipping, "_norms", lambda *args: right(*args).nextafter(torch.tensor(torch.inf)))
    assert not native_clipping._adds_as_torch.__wrapped__()


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


def clipped_by(
    how: str, model: nn.Module, scale: Tensor | None = None, eps: float = 1e-3
) -> tuple[list[Tensor], Clipped]:
    with backend(how), torch.no_grad():
        found = clip_alike(units_of(model), 0.02, eps, scale, torch.float32)
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


def test_gradients_below_the_least_norm_are_divided_by_it() -> None:
    found = []
    for how in ("native", "reference"):
        model = nn.Linear(9, 6, bias=False)
        nn.init.zeros_(model.weight)
        model.weight.grad = torch.full_like(model.weight, 2e-7)
        grads, told = clipped_by(how, model, eps=1e-6)
        assert told.over.all()
        found.append(grads[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_dtype_and_device_do_not_matter(dtype: torch.dtype) -> None:
    model = network()
    truth = clipped_by("native", network())[1]
    native_clipping._adds_as_torch.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = clipped_by("native", model)[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.ratios, truth.ratios)
    assert torch.equal(found.over, truth.over)


def test_tied_weights_are_clipped_once() -> None:
    model = network()
    expected = slowly(model, 0.02, 1e-3)
    adaptive_clip_grad_([*model.parameters(), *list(model.parameters())[:3]], 0.02)
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)  # pyright: ignore[reportArgumentType]


def test_autograd_sees_that_gradients_have_changed() -> None:
    model = network()
    versions = [p.grad._version for p in model.parameters() if p.grad is not None]
    got, _ = clipped_by("native", model)
    assert all(g._version > before for g, before in zip(got, versions, strict=True))


def _said(model: nn.Module) -> dict[str, str]:
    return explain(clip_alike, units_of(model), 0.02, 1e-3, None, torch.float32)


def test_it_runs_where_it_can() -> None:
    assert _said(network(last=True))["native"] == "runs"


def _of(*shapes: tuple[int, ...], strided: str = "") -> nn.Module:
    """Parameters of these shapes and gradients of them; ``strided``: which of the two have gaps."""
    model = nn.Module()
    for i, shape in enumerate(shapes):
        doubled = torch.randn(*shape, 2)
        p = nn.Parameter(doubled[..., 0] if strided == "weight" else doubled[..., 0].contiguous())
        p.grad = torch.randn(*shape, 2)[..., 0] if strided == "gradient" else torch.randn(shape)
        model.register_parameter(f"p{i}", p)
    return model


def _transposed() -> nn.Module:
    model = nn.ConvTranspose2d(4, 6, 3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def _half() -> nn.Module:
    model = _of((4, 4)).bfloat16()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def _subclass() -> nn.Module:
    class Own(nn.Parameter):
        pass

    model = _of((4, 4))
    model.p0 = Own(torch.randn(4, 4))
    model.p0.grad = torch.randn(4, 4)
    return model


def _shared(kind: str) -> nn.Module:
    model = _of((4, 4), (4, 4))
    first, second = model.parameters()
    flat = torch.randn(24)
    if kind == "one gradient":
        first.grad = second.grad
    elif kind == "parts":
        first.grad, second.grad = flat[:16].view(4, 4), flat[8:].view(4, 4)
    else:
        first.grad = second.data
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_transposed, "no rows in memory"),
        (lambda: _of((40_000,)), "one unit that torch splits among threads"),
        (lambda: _of((4, 4), (0, 4)), "is empty"),
        (_half, "not float32"),
        (_subclass, "is a Own"),
        (lambda: _of((4, 4), strided="weight"), "no rows in memory"),
        (lambda: _of((4, 4), strided="gradient"), "no rows in memory"),
        (lambda: _shared("one gradient"), "share memory"),
        (lambda: _shared("parts"), "share memory"),
        (lambda: _shared("a weight"), "share memory"),
    ],
)
def test_what_it_leaves_to_torch_says_why_and_is_right(make: Callable[[], nn.Module], reason: str) -> None:
    found = []
    for how in ("auto", "reference"):
        torch.manual_seed(0)
        model = make()
        with backend(how):
            told = adaptive_clip_grad_(model, 0.02)
        found.append([told.ratios, *(p.grad for p in model.parameters())])
        assert told.clipped > 0
    assert reason in _said(make())["native"]
    for got, right in zip(*found, strict=True):
        assert torch.equal(got, right)


def test_gradients_side_by_side_in_one_buffer_are_taken() -> None:
    model = _of((4, 4), (4, 4))
    flat = torch.randn(32)
    for p, part in zip(model.parameters(), flat.view(2, 4, 4), strict=True):
        p.grad = part
    assert _said(model)["native"] == "runs"


def test_compiled_code_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile" in _said(network())["native"]


def test_where_torch_adds_in_another_order_it_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_clipping, "_adds_as_torch", lambda: False)
    assert _said(network())["native"] == "torch adds in another order here"
