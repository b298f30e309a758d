"""Group and Batch-Channel Norm as an operator of torch.library: what torch asks of one, and who calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch.dispatch import backend, explain
from anybatch.functional import batch_channel_norm, group_norm
from anybatch.kernels import library_channel_norm, native_common
from anybatch.layers import BatchChannelNorm2d, GroupNorm
from helpers import assert_error_within

operator = torch.ops.anybatch.channel_norm
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}
PARTS = ("alone", "affine", "batch", "batch_of_groups")


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if reason := native_common.refused_c():
        pytest.skip(reason)


def given(part: str, layout: str, dtype: torch.dtype) -> list[Any]:
    """The operator's tensors; the variance is positive."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = LAYOUTS[layout]((drawn(2, 6, 5, 4) + 1).to(dtype)).requires_grad_()
    weight, bias = (drawn(2 if part == "batch_of_groups" else 6) for _ in range(2))
    batch = [drawn(6), drawn(6).abs() + 0.5, drawn(6), drawn(6)]
    others = [
        *([None, None] if part == "alone" else [weight, bias]),
        *([None] * 4 if part in ("alone", "affine") else batch),
    ]
    return [x, 2, *(None if t is None else t.to(dtype).requires_grad_() for t in others)]


def reference(args: list[Any], eps: float, activation: str) -> Tensor:
    x, groups, weight, bias, *batch = args
    if batch[0] is None:
        return group_norm.reference(x, groups, weight, bias, eps=eps, activation=activation)
    return batch_channel_norm.reference(x, groups, *batch, weight, bias, eps=eps, activation=activation)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which opcheck looks at
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", PARTS)
def test_it_passes_opcheck(part: str, layout: str) -> None:
    args = given(part, layout, torch.float32)
    torch.library.opcheck(operator.default, (*args, 1e-3, True))
    given_back = [t.detach() if isinstance(t, Tensor) else t for t in args]
    y, mean, rstd = operator(*given_back, 1e-3, True)
    tests = ("test_schema", "test_faketensor")
    backward = torch.ops.anybatch.channel_norm_backward.default
    torch.library.opcheck(backward, (torch.ones_like(y), *given_back, mean, rstd, 1e-3, True), test_utils=tests)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_numbers_are_those_of_float64(part: str, layout: str, activation: str) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        args = given(part, layout, dtype)
        asked = [t for t in args if isinstance(t, Tensor)]
        if dtype == torch.float32:
            y = operator(*args, 1e-3, activation == "relu")[0]
        else:
            y = reference(args, 1e-3, activation)
        found.append([y, *torch.autograd.grad(y.sin().sum(), asked)])
    for got, exact in zip(*found, strict=True):
        assert_error_within(got, exact, 64 * torch.finfo(torch.float32).eps * exact.abs().max().item())


def called_by(module: nn.Module, x: Tensor) -> list[str]:
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    torch.compile(module, backend=look, fullgraph=True)(x)
    return [name for name in names if "anybatch" in name]


@pytest.mark.parametrize("layer", [GroupNorm(6, 2), GroupNorm(6, 6), BatchChannelNorm2d(6, 2).eval()], ids=repr)
def test_compiled_code_calls_it_and_exported_programs_hold_formulas(layer: nn.Module) -> None:
    x = torch.randn(2, 6, 5, 4)
    assert called_by(layer, x)
    assert not called_by(layer.to(torch.float64), x.double())
    layer.to(torch.float32)
    with backend("reference"):
        assert not called_by(layer, x)
    program = torch.export.export(layer, (x,))
    assert not any("anybatch" in str(node.target) for node in program.graph.nodes)


def test_silu_is_left_to_the_compiler() -> None:
    layer = GroupNorm(6, 2)
    assert layer.take_activation(nn.SiLU())
    assert not called_by(layer, torch.randn(2, 6, 5, 4))


def test_without_kernels_in_c_the_compiler_gets_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_channel_norm, "refused_c", lambda: "none here")
    assert not called_by(GroupNorm(6, 2), torch.randn(2, 6, 5, 4))


def test_a_batch_without_images_passes() -> None:
    layer, x = GroupNorm(6, 2), torch.randn(0, 6, 5, 4, requires_grad=True)
    torch.compiler.reset()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert [g.shape for g in gradients] == [x.shape, (6,), (6,)]
    assert not any(g.any() for g in gradients)


def test_eager_code_does_not_call_it() -> None:
    assert explain(group_norm, torch.randn(2, 6, 5, 4), 2)["library"] == "nothing is compiled"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_training_step_has_the_gradients_of_eager_code(dynamic: bool) -> None:
    torch.compiler.reset()
    norm = GroupNorm(6, 2)
    norm.take_activation(nn.ReLU())
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 8, 1), BatchChannelNorm2d(8, 2), nn.ReLU())
    layers = layers.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (3, 2):
        x = torch.randn(n, 3, 7, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
        inputs = [x, *layers.parameters()]
        state = {name: value.clone() for name, value in layers.state_dict().items()}
        eager = torch.autograd.grad(layers(x).square().sum(), inputs)
        layers.load_state_dict(state)
        got = torch.autograd.grad(compiled(x).square().sum(), inputs)
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-5)
        assert all(g.stride() == t.stride() for g, t in zip(got[:2], inputs[:2], strict=True))
