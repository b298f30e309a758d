"""Clipping of all gradients at once by Triton kernels against a loop in float64, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from anybatch.dispatch import backend, explain
from anybatch.kernels.triton_tables import table
from anybatch.methods.adaptive_gradient_clipping import Clipped, Units, adaptive_clip_grad_, clip_alike
from anybatch.methods.parameters import places
from helpers import assert_error_within
from kernels.common import DEVICE, launched, needs_triton

pytestmark = needs_triton


def network(dtype: torch.dtype = torch.float32, *, last: bool = False, transposed: bool = True) -> nn.Sequential:
    """Units of 4 to 1152 values, at 16 bytes and not, vectors, and those of a transposed convolution in groups."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(16, 8, 3),
        nn.Conv2d(128, 4, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(3, 5, 2, bias=False),
        nn.Linear(4, 3),
    ]
    model = nn.Sequential(*layers, *([nn.ConvTranspose2d(4, 6, 3, groups=2)] if transposed else []))
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.1)
        # Some units are above the threshold and some below, none near it.
        sizes = torch.where(torch.arange(len(p)) % 2 == 0, 1e-4, 1.0).view(-1, *[1] * (p.dim() - 1))
        p.grad = torch.randn_like(p) * sizes * (10.0 if p.dim() == 1 and i % 2 else 1.0)
    if last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for p in model.parameters():
            if p.dim() == 4 and p.shape[1] % 2 == 0:  # some gradients lie as their weights, some not
                p.grad = p.grad.contiguous(memory_format=torch.channels_last)
    grads = [p.grad.to(dtype).to(DEVICE) for p in model.parameters()]
    model = model.to(DEVICE, dtype)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    return model


def clipped_by(how: str, model: nn.Module, **options: float) -> tuple[list[Tensor], Clipped]:
    with backend(how):
        found = adaptive_clip_grad_(model, **options)
    return [p.grad for p in model.parameters()], found


def in_double(model: nn.Module) -> nn.Module:
    grads = [p.grad.double() for p in model.parameters()]
    wide = network(torch.float64)
    for q, p, grad in zip(wide.parameters(), model.parameters(), grads, strict=True):
        q.data, q.grad = p.data.double(), grad
    return wide


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_and_what_is_told_are_right(dtype: torch.dtype, last: bool) -> None:
    model = network(dtype, last=last)
    exact, truth = clipped_by("reference", in_double(model))
    got, found = clipped_by("triton", model)
    for (name, _), a, b in zip(model.named_parameters(), got, exact, strict=True):
        assert_error_within(a, b, (torch.finfo(dtype).eps + 1e-6) * b.abs().max().item(), name)
    assert (found.names, found.sizes) == (truth.names, truth.sizes)
    assert torch.equal(found.over, truth.over)
    assert 0 < int(found.clipped) < found.units
    torch.testing.assert_close(found.ratios, truth.ratios.float(), rtol=1e-5, atol=0)


def test_dtypes_side_by_side_and_gradients_that_are_still_scaled() -> None:
    model = network()
    for p in list(model.parameters())[:2]:
        p.data, grad = p.data.bfloat16(), p.grad.bfloat16()
        p.grad = grad
    wide = in_double(model)
    units, of_wide = ([Units.at(place) for place in places(m)] for m in (model, wide))
    scale = torch.tensor(64.0, device=DEVICE)
    with backend("triton"):
        found = clip_alike(units, 0.01, 1e-3, scale, torch.float32)
    truth = clip_alike.reference(of_wide, 0.01, 1e-3, scale, torch.float64)
    assert torch.equal(found.over, truth.over)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert_error_within(p.grad, q.grad, (torch.finfo(p.dtype).eps + 1e-6) * q.grad.abs().max().item())


def test_what_is_not_finite_or_0_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(DEVICE)
    layer = model[0]
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.weight.grad[0, 0], layer.weight.grad[1, 1] = torch.inf, torch.nan
    layer.weight.grad[2] = 0
    before = layer.weight.grad.clone()
    _, found = clipped_by("triton", model)
    torch.testing.assert_close(layer.weight.grad[:3], before[:3], equal_nan=True, rtol=0, atol=0)
    assert found.over.tolist() == [False, False, False, True]
    assert (layer.weight.grad[3] < 1).all()


def test_few_launches_and_the_table_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(transposed=False)
    table.cache_clear()  # of other tests, whose tensors may have lain at the same addresses
    with launched(monkeypatch) as launches:
        clipped_by("triton", model)
    assert 1 <= len(launches) <= 4
    assert table.cache_info().misses == len(launches)
    clipped_by("triton", model)
    assert table.cache_info().misses == len(launches)


def test_what_it_refuses_says_why() -> None:
    units = [Units.at(place) for place in places(network(torch.float64))]
    assert "float64" in explain(clip_alike, units, 0.01, 1e-3, None, torch.float64)["triton"]
