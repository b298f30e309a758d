"""Layers whose intermediate results are computed anew: the numbers of a sequence, with half of what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from anybatch.layers import (
    BatchChannelNorm2d,
    GroupNorm,
    LocalContextNorm2d,
    LocalContextNorm3d,
    PositionalNorm,
    Recomputed,
)
from anybatch.measure import saved_bytes
from anybatch.methods.common import Taken, TakesActivation


def unit(norm: nn.Module) -> list[nn.Module]:
    return [norm, nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)]


def passed(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def fused(norm: nn.Module) -> list[nn.Module]:
    """A norm that applies the activation itself, of which no checkpoint is made."""
    assert norm.take_activation(nn.SiLU())
    return [norm, Taken(), nn.Conv2d(8, 8, 3, padding=1)]


@pytest.mark.parametrize("layers", [unit, fused])
@pytest.mark.parametrize("norm", [lambda: GroupNorm(8, 4), lambda: BatchChannelNorm2d(8, 4), lambda: PositionalNorm(8)])
def test_numbers_are_those_of_a_sequence(norm, layers) -> None:
    plain = nn.Sequential(nn.Conv2d(8, 8, 1), *layers(norm()))
    ours = nn.Sequential(copy.deepcopy(plain[0]), Recomputed(*copy.deepcopy(plain[1:])))
    x = torch.randn(3, 8, 6, 5, requires_grad=True)
    for got, expected in zip(passed(ours, x), passed(plain, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for (name, got), (_, expected) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=f"{name}: a batch came in twice")


@pytest.mark.parametrize("layers", [unit, fused])
def test_a_chain_keeps_one_map_for_each_convolution(layers) -> None:
    def units() -> list[list[nn.Module]]:
        return [layers(GroupNorm(8, 4)) for _ in range(3)]

    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    size = x.numel() * 4
    plain = nn.Sequential(*(layer for some in units() for layer in some))
    ours = nn.Sequential(*(Recomputed(*some) for some in units()))
    assert saved_bytes(plain, lambda: plain(x)) > 5.9 * size
    assert saved_bytes(ours, lambda: ours(x)) < 3.1 * size


def test_the_convolution_is_not_run_again() -> None:
    class Counted(nn.Conv2d):
        runs = 0

        def forward(self, input: Tensor) -> Tensor:
            type(self).runs += 1
            return super().forward(input)

    norm_runs = []
    norm, conv = GroupNorm(8, 4), Counted(8, 8, 3)
    norm.register_forward_hook(lambda *_: norm_runs.append(1))
    ends = []
    conv.register_forward_hook(lambda *_: ends.append(1))
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    Recomputed(norm, nn.ReLU(), conv)(x).sum().backward()
    assert len(norm_runs) == 2
    assert len(ends) == 1, "it ended a second time"


def test_second_derivatives_of_a_fused_norm() -> None:
    plain = nn.Sequential(*fused(GroupNorm(8, 4))).double()
    ours = Recomputed(*copy.deepcopy(plain))
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)

    def twice(model: nn.Module) -> list[Tensor]:
        first = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], create_graph=True)
        moving = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(moving, [x, *model.parameters()]))

    for got, expected in zip(twice(ours), twice(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_layer_that_overwrites_what_it_takes() -> None:
    layer = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(8, 8, 3))
    plain = nn.Sequential(*fused(GroupNorm(8, 4))[:2], layer)
    ours, x = Recomputed(*copy.deepcopy(plain)), torch.randn(2, 8, 6, 6, requires_grad=True)
    for got, expected in zip(passed(ours, x), passed(plain, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [[], [nn.Conv2d(8, 8, 3)]], ids=len)
def test_fewer_than_two_layers(layers: list[nn.Module]) -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    torch.testing.assert_close(Recomputed(*layers)(x), nn.Sequential(*layers)(x), rtol=0, atol=0)


def test_an_input_that_was_overwritten_is_an_error() -> None:
    x = torch.randn(2, 8, 4, 4)
    y = Recomputed(*fused(GroupNorm(8, 4)))(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="overwritten before backward"):
        y.sum().backward()


@pytest.mark.parametrize("layers", [unit, fused])
def test_autocast_gives_the_numbers_of_a_sequence(layers) -> None:
    plain = nn.Sequential(*layers(GroupNorm(8, 4)))
    ours, x = Recomputed(*copy.deepcopy(plain)), torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(x), plain(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    got.float().sum().backward()
    expected.float().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_evaluation_and_names_are_a_sequences() -> None:
    layers = unit(GroupNorm(8, 4))
    ours, x = Recomputed(*layers).eval(), torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), nn.Sequential(*layers)(x), rtol=0, atol=0)
    assert list(ours.state_dict()) == list(nn.Sequential(*layers).state_dict())


def test_torchs_batchnorm_is_refused() -> None:
    with pytest.raises(ValueError, match="BatchNorm2d would let each batch into its running averages twice"):
        Recomputed(*unit(nn.BatchNorm2d(8)))


@pytest.mark.parametrize(
    ("norm", "shape", "dtype"),
    [
        (LocalContextNorm2d(8, 5), (2, 8, 16, 16), torch.float32),
        (LocalContextNorm2d(8, 5), (2, 8, 16, 16), torch.float64),
        (LocalContextNorm2d(8, 5, released=True), (2, 8, 16, 16), torch.float32),
        (LocalContextNorm2d(8, 16), (2, 8, 16, 16), torch.float32),
        (LocalContextNorm3d(8, 3), (2, 8, 6, 6, 6), torch.float32),
    ],
    ids=["in C", "double", "released", "whole map", "3d"],
)
def test_the_input_alone_is_kept_where_formulas_run_too(
    norm: TakesActivation, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert isinstance(norm, nn.Module)
    norm, x = copy.deepcopy(norm).to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    assert norm.take_activation(nn.ReLU())
    conv = (nn.Conv2d if len(shape) == 4 else nn.Conv3d)(8, 8, 1, dtype=dtype)
    ours, plain = Recomputed(norm, conv), nn.Sequential(norm, conv)
    size = x.numel() * x.element_size()
    assert saved_bytes(ours, lambda: ours(x)) < 1.3 * size
    g = torch.randn_like(ours(x))
    found = [torch.autograd.grad(net(x), [x, *net.parameters()], g) for net in (ours, plain)]
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right)
