"""Norms in C as operators of torch.library: what torch asks of one, and who calls them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from anybatch.dispatch import backend
from anybatch.functional import (
    batch_channel_norm,
    filter_response_norm,
    group_norm,
    local_context_norm,
    positional_norm,
)
from anybatch.kernels import native_common, native_operator
from anybatch.layers import (
    BatchChannelNorm2d,
    FilterResponseNorm2d,
    GroupNorm,
    LocalContextNorm2d,
    PositionalNorm,
)
from helpers import assert_error_within

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


class Case(NamedTuple):
    """An operator, its arguments behind ``x``, of which letters stand for tensors, and the op in formulas."""

    operator: str
    rest: tuple[Any, ...]
    formulas: Callable[..., Tensor]


class Drawn(NamedTuple):
    """A tensor of so many values, positive or not."""

    size: int
    positive: bool = False


C, G = Drawn(6), Drawn(2)
BATCH = (C, Drawn(6, positive=True), C, C)
CASES = {
    "group_norm": Case(
        "channel_norm",
        (*[None] * 4, C, C, 2, 1e-3, True),
        lambda x, w, b: group_norm.reference(x, 2, w, b, eps=1e-3, activation="relu"),
    ),
    "group_norm_alone": Case(
        "channel_norm", (*[None] * 6, 6, 1e-3, False), lambda x: group_norm.reference(x, 6, eps=1e-3)
    ),
    "batch_channel_norm": Case(
        "channel_norm",
        (*BATCH, G, G, 2, 1e-3, True),
        lambda x, *p: batch_channel_norm.reference(x, 2, *p, eps=1e-3, activation="relu"),
    ),
    "positional_norm": Case(
        "positional_norm",
        (C, C, 1e-3, True, True),
        lambda x, w, b: positional_norm.reference(x, w, b, eps=1e-3, unbiased=True, activation="relu"),
    ),
    "positional_norm_alone": Case(
        "positional_norm", (None, None, 1e-3, False, False), lambda x: positional_norm.reference(x, eps=1e-3)
    ),
    "filter_response_norm": Case(
        "filter_response_norm", (C, C, C, Drawn(1), 1e-3), lambda x, *p: filter_response_norm.reference(x, *p, eps=1e-3)
    ),
    "filter_response_norm_alone": Case(
        "filter_response_norm", (*[None] * 4, 1e-3), lambda x: filter_response_norm.reference(x, eps=1e-3)
    ),
    "local_context_norm": Case(
        "local_context_norm",
        (C, C, [3, 2], 3, 1e-3, "gelu"),
        lambda x, w, b: local_context_norm.reference(x, (3, 2), 3, w, b, eps=1e-3, activation="gelu"),
    ),
    "local_context_norm_alone": Case(
        "local_context_norm",
        (None, None, [3, 2], 3, 1e-3, "relu"),
        lambda x: local_context_norm.reference(x, (3, 2), 3, eps=1e-3, activation="relu"),
    ),
}
NAMES = pytest.mark.parametrize("name", CASES)
LAID_OUT = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if reason := native_common.refused_c():
        pytest.skip(reason)


def given(name: str, layout: str, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    args: list[Any] = [LAYOUTS[layout]((drawn(2, 6, 5, 4) + 1).to(dtype)).requires_grad_()]
    for value in CASES[name].rest:
        if isinstance(value, Drawn):
            t = drawn(value.size)
            args.append((t.abs() + 0.5 if value.positive else t).to(dtype).requires_grad_())
        else:
            args.append(value)
    return args


def operator(name: str, suffix: str = "") -> Any:
    return getattr(torch.ops.anybatch, CASES[name].operator + suffix)


def of(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which opcheck looks at
@LAID_OUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@NAMES
def test_it_passes_opcheck(name: str, layout: str, dtype: torch.dtype) -> None:
    args = given(name, layout, dtype)
    torch.library.opcheck(operator(name).default, tuple(args))
    x, *rest = (t.detach() if isinstance(t, Tensor) else t for t in args)
    y, *moments = of(operator(name)(x, *rest))
    backward = (torch.ones_like(y), x, *(moments or [None]), *rest)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator(name, "_backward").default, backward, test_utils=tests)


@LAID_OUT
@NAMES
def test_numbers_are_those_of_float64(name: str, layout: str) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        args = given(name, layout, dtype)
        asked = [t for t in args if isinstance(t, Tensor)]
        y = of(operator(name)(*args))[0] if dtype == torch.float32 else CASES[name].formulas(*asked)
        found.append([y, *torch.autograd.grad(y.sin().sum(), asked)])
    assert found[0][0].stride() == torch.empty_like(args[0]).stride()
    for got, exact in zip(*found, strict=True):
        assert_error_within(got, exact, 64 * torch.finfo(torch.float32).eps * exact.abs().max().item())


def layers() -> dict[str, nn.Module]:
    return {
        "gn": GroupNorm(6, 2),
        "in": GroupNorm(6, 6),
        "bcn": BatchChannelNorm2d(6, 2),
        "pn": PositionalNorm(6),
        "frn": FilterResponseNorm2d(6, learnable_eps=True),
        "lcn": LocalContextNorm2d(6, window=3),
    }


LAYERS = pytest.mark.parametrize("name", layers())


def called_by(module: nn.Module, x: Tensor) -> list[str]:
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    torch.compile(module, backend=look, fullgraph=True)(x)
    return [name for name in names if "anybatch" in name]


@LAYERS
def test_compiled_code_calls_it_and_exported_programs_hold_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layers()[name].eval(), torch.randn(2, 6, 5, 4)
    assert called_by(layer, x)
    assert not called_by(layers()[name].eval().double(), x.double())
    program = torch.export.export(layer, (x,))
    assert not any("anybatch" in str(node.target) for node in program.graph.nodes)
    with backend("reference"):
        assert not called_by(layer, x)
    monkeypatch.setattr(native_operator, "refused_c", lambda: "none here")
    assert not called_by(layer, x)


def test_silu_is_left_to_the_compiler() -> None:
    layer = GroupNorm(6, 2)
    assert layer.take_activation(nn.SiLU())
    assert not called_by(layer, torch.randn(2, 6, 5, 4))


@LAYERS
def test_a_batch_without_images_passes(name: str) -> None:
    layer, x = layers()[name].eval(), torch.randn(0, 6, 5, 4, requires_grad=True)
    torch.compiler.reset()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    learned = [p for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y.sum(), [x, *learned])
    assert [g.shape for g in gradients] == [x.shape, *(p.shape for p in learned)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dynamic", [False, True])
@LAYERS
def test_a_compiled_training_step_has_the_gradients_of_eager_code(name: str, dynamic: bool) -> None:
    torch.compiler.reset()
    net: Any = nn.Sequential(nn.Conv2d(3, 6, 3), layers()[name], nn.ReLU(), nn.Conv2d(6, 8, 1))
    net = net.to(memory_format=torch.channels_last)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (3, 2):
        x = torch.randn(n, 3, 7, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
        inputs = [x, *net.parameters()]
        state = {key: value.clone() for key, value in net.state_dict().items()}
        eager = torch.autograd.grad(net(x).square().sum(), inputs)
        net.load_state_dict(state)
        got = torch.autograd.grad(compiled(x).square().sum(), inputs)
        size = max(g.abs().max().item() for g in eager)
        for g, expected in zip(got, eager, strict=True):
            torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-6 * math.ceil(size))
        assert got[0].stride() == x.stride()
