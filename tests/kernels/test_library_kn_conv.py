"""KNConv as an operator of torch.library: what torch asks of one, and that tools get the numbers of the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch.dispatch import backend
from anybatch.functional import kn_conv
from anybatch.layers import KNConv2d
from helpers import assert_error_within, error

operator = torch.ops.anybatch.kn_conv


def given(
    dtype: torch.dtype, *, residual: bool, groups: int = 1, layout: torch.memory_format = torch.contiguous_format
) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 6, 6, 5), (3, 6 // groups, 3, 3), (3,), (2, 3, 3, 3)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    x, weight, bias, added = (t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in made)
    return [t.requires_grad_() for t in (x, weight, bias)] + [added.requires_grad_() if residual else None]


def geometry(p: float, relu: bool, groups: int = 1) -> tuple[Any, ...]:
    return [2, 2], [1, 1], [1, 1], groups, p, 1e-3, relu


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which opcheck looks at
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_passes_opcheck(dtype: torch.dtype, p: float, residual: bool, groups: int) -> None:
    x, weight, bias, added = given(dtype, residual=residual, groups=groups)
    seed = torch.tensor(7) if p else None
    torch.library.opcheck(operator.default, (x, weight, bias, added, seed, *geometry(p, residual, groups)))


@pytest.mark.parametrize("groups", [1, 3])
def test_its_backward_passes_opcheck(groups: int) -> None:
    x, weight, bias, added = (t.detach() for t in given(torch.float32, residual=True, groups=groups))
    seed = torch.tensor(7)
    *where, p, eps, relu = geometry(0.2, True, groups)
    y, *kept = operator(x, weight, bias, added, seed, *where, p, eps, relu)
    args = (torch.ones_like(y), x, weight, bias, added, seed, y, *kept, *where, p, relu, [True, False])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.anybatch.kn_conv_backward.default, args, test_utils=tests)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 3])
def test_numbers_are_those_of_float64(layout: torch.memory_format, p: float, groups: int) -> None:
    seed = torch.tensor(11) if p else None
    found = []
    for dtype in (torch.float32, torch.float64):
        args = given(dtype, residual=True, groups=groups, layout=layout)
        if dtype == torch.float32:
            y = operator(*args, seed, *geometry(p, True, groups))[0]
        else:
            options = {"p": p, "seed": seed, "eps": 1e-3, "activation": "relu", "residual": args[3]}
            y = kn_conv.reference(*args[:3], 2, 1, 1, groups, **options)
        found.append([y, *torch.autograd.grad(y.sin().sum(), args)])
    for got, exact in zip(*found, strict=True):
        assert_error_within(got, exact, 64 * torch.finfo(torch.float32).eps * exact.abs().max().item())


def test_compiled_code_calls_it_and_exported_programs_hold_formulas() -> None:
    torch.compiler.reset()
    layer, x = KNConv2d(4, 3, 3, padding=1, p=0.0), torch.randn(2, 4, 6, 5)
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend=look, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
    assert any("anybatch.kn_conv" in name for name in called)
    program = torch.export.export(layer, (x,))
    assert not any("anybatch" in str(node.target) for node in program.graph.nodes)
    with backend("reference"):
        called.clear()
        torch.compiler.reset()
        torch.compile(layer, backend=look, fullgraph=True)(x)
    assert not any("anybatch" in name for name in called)


def test_a_compiled_training_step_has_the_gradients_of_eager_code() -> None:
    torch.compiler.reset()
    layers = nn.Sequential(KNConv2d(4, 6, 3, padding=1, p=0.0), nn.ReLU(), KNConv2d(6, 3, 1, p=0.0))
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    inputs = [x, *layers.parameters()]
    eager = torch.autograd.grad(layers(x).square().sum(), inputs)
    compiled = torch.autograd.grad(torch.compile(layers, backend="aot_eager", fullgraph=True)(x).square().sum(), inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_vmap_gives_what_a_loop_gives(p: float) -> None:
    """Of both operators; `torch.func.grad` takes none of torch.library, and gets formulas from `kn_conv`."""
    x, weight, bias, _ = (None if t is None else t.detach() for t in given(torch.float64, residual=False))
    seed = torch.tensor(5) if p else None
    weights = torch.stack([weight, 2 * weight])
    *where, rate, eps, relu = geometry(p, relu=True)

    def call(one: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, *kept = operator(one.unsqueeze(0), weight, bias, None, seed, *where, rate, eps, relu)
        tensors = (one.unsqueeze(0), weight, bias, None, seed, y, *kept)
        more = torch.ops.anybatch.kn_conv_backward(torch.ones_like(y), *tensors, *where, rate, relu, [True, True])
        return y, *more[:3]

    together = torch.func.vmap(call)(x, weights)
    for i, (one, weight) in enumerate(zip(x, weights, strict=True)):
        torch.testing.assert_close(tuple(t[i] for t in together), call(one, weight), rtol=1e-12, atol=1e-12)


def test_autocast_rounds_what_is_convolved() -> None:
    x, weight, bias, added = (t.detach() for t in given(torch.float32, residual=True))
    exact = operator(*(t.double() for t in (x, weight, bias, added)), None, *geometry(0.0, relu=False))[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = operator(x, weight, bias, added, None, *geometry(0.0, relu=False))[0]
    assert y.dtype == torch.bfloat16
    assert error(y, exact) < 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
