"""Filters standardized by Triton kernels, one by one and all at once, interpreted or on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anybatch import layers
from anybatch.dispatch import backend, explain
from anybatch.methods.filters import StandardizedFilter, reuse_filters, standardize_together
from helpers import assert_error_within, error
from kernels.common import DEVICE, launched, needs_triton, roundoff

pytestmark = needs_triton

MADE: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "odd": (layers.WSConv2d, (3, 5, 3), {}),
    "rows at 16 bytes": (layers.WSConv2d, (16, 4, 1), {}),
    "long rows": (layers.WSConv2d, (240, 3, 3), {"variant": "bcn"}),
    "eps outside": (layers.WSConv2d, (64, 4, 3), {"variant": "paper"}),
    "scaled": (layers.ScaledWSConv2d, (16, 4, 3), {}),
    "scaled, a constant beside": (layers.ScaledWSConv1d, (7, 4, 3), {"gamma": 1.7, "eps_rule": "add"}),
    "linear": (layers.WSLinear, (7, 3), {}),
    "transposed": (layers.WSConvTranspose2d, (4, 6, 3), {"groups": 2}),
    "with a scale and a shift": (layers.WSConv2d, (6, 4, 3), {"variant": "aws"}),
    "scaled, with a scale and a shift": (layers.ScaledWSConv2d, (6, 4, 3), {"affine": True}),
}


def made(name: str, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> StandardizedFilter:
    kind, args, options = MADE[name]
    torch.manual_seed(1)
    layer = kind(*args, **options).double()
    for p in layer.parameters():
        nn.init.normal_(p, mean if p.dim() > 1 else 1.0, 0.3)
    layer = layer.to(DEVICE, dtype)
    assert isinstance(layer, StandardizedFilter)
    return layer


def learned(some: list[StandardizedFilter]) -> list[Tensor]:
    return [p for layer in some for name, p in layer.named_parameters() if name != "bias"]


def passed(how: str, some: list[StandardizedFilter], *, together: bool) -> list[Tensor]:
    """The filters, and all gradients."""
    with backend(how):
        filters = standardize_together(some) if together else [layer.standardized() for layer in some]
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for w in filters]
    return [*(w.detach() for w in filters), *torch.autograd.grad(filters, learned(some), gradients)]


def assert_errs_little(some: list[StandardizedFilter], how: str, *, together: bool) -> None:
    wide = [copy.deepcopy(layer).double() for layer in some]
    exact, naive = (passed("reference", s, together=False) for s in (wide, some))
    like = [layer.weight for layer in some]
    like += [layer.weight for layer in some for name, _ in layer.named_parameters() if name != "bias"]
    for got, truth, plain, weight in zip(passed(how, some, together=together), exact, naive, like, strict=True):
        assert got.dtype == plain.dtype
        assert_error_within(got, truth, 2 * error(plain, truth) + roundoff(weight.detach(), truth))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 300.0])
def test_all_filters_at_once(mean: float, last: bool) -> None:
    some = [made(name, mean=mean) for name in MADE]
    if last:
        some = [layer.to(memory_format=torch.channels_last) for layer in some]  # pyright: ignore[reportCallIssue]
    assert_errs_little(some, "auto", together=True)


def test_what_is_made_lies_in_memory_as_the_weight() -> None:
    some = [made("odd"), made("long rows").to(memory_format=torch.channels_last)]  # pyright: ignore[reportCallIssue]
    filters = standardize_together(some)
    assert [w.stride() for w in filters] == [layer.weight.stride() for layer in some]
    gradients = torch.autograd.grad(filters, learned(some), [torch.ones_like(w) for w in filters])
    assert [w.stride() for w in gradients] == [layer.weight.stride() for layer in some]


@pytest.mark.parametrize("name", [name for name in MADE if name != "transposed"])
def test_one_by_one(name: str) -> None:
    assert_errs_little([made(name)], "triton", together=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_side_by_side(dtype: torch.dtype) -> None:
    some = [made("odd"), made("rows at 16 bytes", dtype), made("scaled", dtype), made("long rows")]
    scaled = made("scaled", dtype)
    scaled.gain = nn.Parameter(scaled.gain.detach().float())
    assert_errs_little([*some, scaled], "auto", together=True)


def test_few_launches_and_none_for_what_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [made(name) for name in ("odd", "rows at 16 bytes", "long rows", "scaled") for _ in range(3)]
    with launched(monkeypatch) as launches:
        filters = standardize_together(some)
    assert launches == ["standardize_all"] * 4
    with launched(monkeypatch) as launches:
        (filters[0].sum() + filters[1].square().sum()).backward()
    assert launches == ["pull_all"]
    assert all((layer.weight.grad is None) == (i > 1) for i, layer in enumerate(some))
    alone = copy.deepcopy(some[1])
    alone.weight.grad = None
    with backend("reference"):
        alone.standardized().square().sum().backward()
    torch.testing.assert_close(some[1].weight.grad, alone.weight.grad, rtol=1e-4, atol=1e-4)


def test_gradients_that_lie_otherwise_and_are_expanded() -> None:
    layer, found = made("rows at 16 bytes"), {}
    for how in ("auto", "reference"):
        with backend(how):
            (w,) = standardize_together([layer])
        turned = torch.arange(64.0, device=DEVICE).view(16, 4, 1, 1).transpose(0, 1)
        found[how] = [
            torch.autograd.grad(w, layer.weight, g, retain_graph=True)[0] for g in (turned, torch.ones_like(w))
        ]
        found[how].append(torch.autograd.grad(w, layer.weight, turned[:, :1].expand_as(w))[0])
    torch.testing.assert_close(found["auto"], found["reference"], rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_the_reference() -> None:
    some = [made("odd"), made("scaled")]

    def curvature(how: str, *, together: bool) -> list[Tensor]:
        with backend(how):
            filters = standardize_together(some) if together else [layer.standardized() for layer in some]
        slopes = torch.autograd.grad(sum(w.pow(3).sum() for w in filters), learned(some), create_graph=True)
        return list(torch.autograd.grad(sum(s.square().sum() for s in slopes), learned(some)))

    expected = curvature("reference", together=False)
    for how, together in (("auto", True), ("triton", False)):
        torch.testing.assert_close(curvature(how, together=together), expected, rtol=1e-3, atol=1e-3)


class Network(nn.Module):
    """Two stages, which may be computed a second time within backward."""

    def __init__(self, *, again: bool | None = None) -> None:
        super().__init__()
        self.again = again  # which kind of checkpoint, or None
        torch.manual_seed(3)
        self.first = nn.Sequential(layers.WSConv2d(3, 8, 3), nn.Tanh(), layers.WSConv2d(8, 8, 1))
        self.second = nn.Sequential(layers.ScaledWSConv2d(8, 4, 3), nn.Tanh())
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.first, self.second):
            x = (
                stage(x)
                if self.again is None or not torch.is_grad_enabled()
                else checkpoint(stage, x, use_reentrant=self.again)
            )
        return x.flatten(1).square().mean()


def trained(model: Network) -> list[Tensor]:
    """The parameters behind steps of two batches each, with an evaluation in between."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        for i in range(2):
            x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(10 * step + i)).to(DEVICE)
            model(x.requires_grad_()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(x)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("again", [None, False, True], ids=["plainly", "checkpoints", "reentrant checkpoints"])
def test_a_network_trains_in_the_context_as_without_it(again: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network(again=again)
    with reuse_filters(model), launched(monkeypatch) as launches:
        got = trained(model)
    torch.testing.assert_close(got, trained(Network()), rtol=1e-4, atol=1e-5)
    kinds = 2  # of filters: with a gain or without
    assert launches.count("standardize_all") == 4 * kinds
    assert set(launches) == {"standardize_all", "pull_all"}
    assert not model._forward_pre_hooks


def test_layers_by_themselves_and_copies_in_the_context() -> None:
    model, x = Network(), torch.randn(1, 3, 5, 5, device=DEVICE)
    with reuse_filters(model):
        loss = model(x)
        for called in (model, copy.deepcopy(model)):
            called.zero_grad()
            called.first(x).sum().backward()  # with the filters of the pass under way, and of none
        loss.backward(retain_graph=False) if model.first[0].weight.grad is None else None
        model.first(x).sum().backward()  # the pass is over
        assert all(torch.isfinite(p.grad).all() for p in model.first.parameters())
        with torch.no_grad():
            model.first[0].weight.mul_(2)
        torch.testing.assert_close(model.first(x), copy.deepcopy(model).first(x))


def test_what_it_refuses_says_why() -> None:
    assert explain(standardize_together, [made("odd")])["triton"] == "runs"
    assert "no layers" in explain(standardize_together, [])["triton"]
    if DEVICE == "cuda":
        assert "several devices" in explain(standardize_together, [made("odd"), made("odd").cpu()])["triton"]


def test_weights_may_move_between_forward_and_backward() -> None:
    some = [made(name) for name in ("odd", "rows at 16 bytes", "scaled")]
    at_rest = passed("triton", some, together=True)
    with backend("triton"):
        filters = standardize_together(some)
    others = []
    for p in learned(some):  # as sharding frees and gathers them
        values, storage = p.detach().clone(), p.untyped_storage()
        size, address = storage.nbytes(), p.data_ptr()
        storage.resize_(0)
        while not others or others[-1].data_ptr() == address:
            others.append(torch.full_like(values, torch.nan))
        storage.resize_(size)
        p.data.copy_(values)
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for w in filters]
    found = torch.autograd.grad(filters, learned(some), gradients)
    for got, right in zip(found, at_rest[len(filters) :], strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0)
