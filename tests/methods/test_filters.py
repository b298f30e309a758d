"""Filters that are standardized once and used for many batches: how often, when anew, and to what result."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.layers import (
    ScaledWSConv2d,
    ScaledWSLinear,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    WSLinear,
    reuse_filters,
)
from anybatch.methods import filters
from anybatch.methods.filters import StandardizedFilter
from anybatch.methods.weight_standardization import VARIANTS
from helpers import assert_same_gradients, gradients


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of each layer whose filter is standardized, in order, in a context or outside of one."""
    calls: list[str] = []
    inside = filters._computed

    def in_context(layer: StandardizedFilter, *args: Any) -> Any:
        calls.append(type(layer).__name__)
        return inside(layer, *args)

    monkeypatch.setattr(filters, "_computed", in_context)
    for kind in (WSConv2d, ScaledWSConv2d, WSLinear, ScaledWSLinear):

        def anew(self: StandardizedFilter, *args: Tensor, before: Callable[..., Tensor] = kind.standardize) -> Tensor:
            calls.append(type(self).__name__)
            return before(self, *args)

        monkeypatch.setattr(kind, "standardize", anew)
    return calls


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        WSConv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        ScaledWSConv2d(8, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        ScaledWSLinear(4 * 6 * 6, 5),
    )
    return model.to(dtype)


LAYERS = 3


def batch(i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(5, (2,), generator=generator)


def accumulate(model: nn.Module, first: int = 0, batches: int = 4) -> None:
    dtype = next(model.parameters()).dtype
    for i in range(first, first + batches):
        x, y = batch(i, dtype)
        (F.cross_entropy(model(x), y) / batches).backward()


def test_once_a_step_under_accumulation(computed: list[str]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with reuse_filters(model):
        for step in range(3):
            optimizer.zero_grad()
            accumulate(model)
            assert len(computed) == LAYERS * (step + 1)
            optimizer.step()
    computed.clear()
    accumulate(model)
    assert len(computed) == LAYERS * 4  # outside of the context, for each batch


@pytest.mark.parametrize("without_gradient", [torch.no_grad, torch.inference_mode])
def test_once_an_evaluation(computed: list[str], without_gradient: Callable[[], Any]) -> None:
    model = network().eval()
    expected = [model(batch(i)[0]) for i in range(5)]
    computed.clear()
    with reuse_filters(model), without_gradient():
        for i in range(5):
            torch.testing.assert_close(model(batch(i)[0]), expected[i], rtol=1e-12, atol=1e-12)
    assert len(computed) == LAYERS


def test_training_behind_an_evaluation_in_inference_mode() -> None:
    model, plain = network(), network()
    with reuse_filters(model):
        with torch.inference_mode():
            model(batch(0)[0])
        accumulate(model)
    accumulate(plain)
    assert_same_gradients(gradients(model), gradients(plain), relative=1e-12)


def with_constants() -> nn.Module:
    layer = ScaledWSConv2d(3, 5, 3, affine=True)
    layer.restore_filters()
    return layer


VARIANT_LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    *((f"ws-{v}", lambda v=v: WSConv2d(3, 5, 3, variant=v), (2, 3, 6, 6)) for v in VARIANTS),  # pyright: ignore[reportArgumentType]
    *((f"linear-{v}", lambda v=v: WSLinear(6, 5, variant=v), (2, 6)) for v in VARIANTS),  # pyright: ignore[reportArgumentType]
    ("ws1d", lambda: WSConv1d(4, 6, 3, groups=2), (2, 4, 6)),
    ("ws3d", lambda: WSConv3d(2, 3, 2), (2, 2, 4, 3, 3)),
    ("transposed", lambda: WSConvTranspose2d(4, 6, 3, groups=2, eps=0.1), (2, 4, 5, 5)),
    ("transposed-paper", lambda: WSConvTranspose2d(4, 6, 3, variant="paper"), (2, 4, 5, 5)),
    ("scaled", lambda: ScaledWSConv2d(3, 5, 3, gamma=1.7), (2, 3, 6, 6)),
    ("scaled-floored", lambda: ScaledWSConv2d(3, 5, 3, eps=1.0), (2, 3, 6, 6)),  # above some filters' norms
    ("scaled-affine", with_constants, (2, 3, 6, 6)),
    ("scaled-add", lambda: ScaledWSConv2d(3, 5, 3, eps=0.01, eps_rule="add"), (2, 3, 6, 6)),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("make", "shape"), [case[1:] for case in VARIANT_LAYERS], ids=[c[0] for c in VARIANT_LAYERS])
def test_values_and_gradients_are_those_without_the_context(make, shape: tuple[int, ...], channels_last: bool) -> None:
    layer = make().double()
    if channels_last and len(shape) == 4:
        layer = layer.to(memory_format=torch.channels_last)
    for p in layer.parameters():
        nn.init.normal_(p) if p.dim() == 1 else None
    again = copy.deepcopy(layer)
    with reuse_filters(layer):
        for i in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            y, expected = layer(x), again(x)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            g = torch.randn_like(y)
            y.backward(g)
            expected.backward(g)
            assert_same_gradients(gradients(layer), gradients(again), relative=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_constant_filter_has_a_finite_gradient(variant) -> None:
    for channels_last in (False, True):
        layer = WSConv2d(3, 2, 3, variant=variant)
        nn.init.constant_(layer.weight, 0.25)
        if channels_last:
            layer = layer.to(memory_format=torch.channels_last)
        again = copy.deepcopy(layer)
        x = torch.randn(1, 3, 3, 3)
        with reuse_filters(layer):
            layer(x).sum().backward()
        again(x).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.isfinite().all()
        torch.testing.assert_close(layer.weight.grad, again.weight.grad, rtol=1e-5, atol=1e-5)


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_trains_as_without_the_context(make: Callable[..., torch.optim.Optimizer]) -> None:
    def trained(model: nn.Module) -> nn.Module:
        optimizer = make(model.parameters())
        for step in range(3):
            optimizer.zero_grad()
            accumulate(model, first=4 * step)
            optimizer.step()
        return model

    model = network()
    with reuse_filters(model):
        trained(model)
    expected = dict(trained(network()).named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-10)


def changes(model: nn.Module) -> list[Callable[[], Any]]:
    other = network().state_dict()
    return [
        lambda: model.load_state_dict({name: 2 * v + 0.1 * torch.sin(v * 1e3) for name, v in other.items()}),
        lambda: model.load_state_dict({n: v.clone() + torch.cos(v) for n, v in other.items()}, assign=True),
        lambda: model.to(torch.float32),
        lambda: model.double(),
        lambda: model.to(memory_format=torch.channels_last),
        lambda: [p.data.copy_(p.data.sin()) for p in model.parameters()] and model.eval(),  # seen by the mode
        lambda: setattr(model[0], "eps", 0.5),
        lambda: setattr(model[0], "weight", nn.Parameter(torch.randn_like(model[0].weight))),
        lambda: [setattr(p, "data", p.data.cos()) for p in model.parameters()],
    ]


def test_every_change_is_seen() -> None:
    model = network()
    with reuse_filters(model), torch.no_grad():
        for i, change in enumerate(changes(model)):
            model(batch(0, next(model.parameters()).dtype)[0])
            change()
            x = batch(0, next(model.parameters()).dtype)[0]
            expected = copy.deepcopy(model)(x)
            torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6, msg=lambda m, i=i: f"change {i}: {m}")


def test_writes_through_data_need_forget() -> None:
    model = network()
    x = batch(0)[0]
    with reuse_filters(model) as forget, torch.no_grad():
        before = model[0](x)
        model[0].weight.data.copy_(torch.randn_like(model[0].weight))
        torch.testing.assert_close(model[0](x), before)  # what the docstring warns of
        forget()
        torch.testing.assert_close(model[0](x), copy.deepcopy(model[0])(x))


def test_layers_of_a_copy_are_not_in_the_context(computed: list[str]) -> None:
    model = network()
    with reuse_filters(model):
        expected = model(batch(0)[0])
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            computed.clear()
            for _ in range(2):
                torch.testing.assert_close(again(batch(0)[0]), expected, rtol=1e-12, atol=1e-12)
            assert len(computed) == 2 * LAYERS
        assert model.state_dict().keys() == network().state_dict().keys()


def test_contexts_nest_and_restore_on_every_exit(computed: list[str]) -> None:
    model = network()
    x = batch(0)[0]
    with torch.no_grad():
        with reuse_filters(model):
            model(x)
            with reuse_filters(model[0]):
                model(x)
            model(x)
            with pytest.raises(KeyError), reuse_filters(model):
                raise KeyError
            model(x)
        assert len(computed) == LAYERS
        model(x)
        assert len(computed) == 2 * LAYERS
    assert not filters._SLOTS


def test_a_step_of_any_optimizer_counts_only_in_the_context() -> None:
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    optimizer = torch.optim.SGD([p], lr=1.0)
    before = filters._steps
    with reuse_filters(network()):
        optimizer.step()
    assert filters._steps == before + 1
    optimizer.step()
    assert filters._steps == before + 1


@pytest.mark.parametrize("name", [case[0] for case in VARIANT_LAYERS if "linear" not in case[0]])
def test_second_derivatives(name: str) -> None:
    make, shape = next(case[1:] for case in VARIANT_LAYERS if case[0] == name)
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)

    def penalty(layer: nn.Module) -> list[Tensor]:
        (first,) = torch.autograd.grad(layer(x).sin().sum(), layer.weight, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), list(layer.parameters()), allow_unused=True))

    expected = penalty(copy.deepcopy(layer))
    with reuse_filters(layer):
        for got, wanted in zip(penalty(layer), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_a_filter_that_changed_are_refused() -> None:
    layer = WSConv2d(3, 4, 3, variant="bcn")
    with reuse_filters(layer):
        y = layer(torch.randn(1, 3, 5, 5)).square().sum()
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="a filter was changed in place before its gradient's graph was made"):
            torch.autograd.grad(y, layer.weight, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model = network(torch.float32)
    x = batch(0, torch.float32)[0]
    plain = copy.deepcopy(model)
    with reuse_filters(model):
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        torch.testing.assert_close(model(x), full, rtol=0, atol=0)
        model.to(dtype)
        half = model(x.to(dtype))
        half.sum().backward()
    assert (full.dtype, mixed.dtype, half.dtype) == (torch.float32, torch.bfloat16, dtype)
    torch.testing.assert_close(full, plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixed, plain(x), rtol=0.01, atol=0.01)
    plain.to(dtype)
    torch.testing.assert_close(half, plain(x.to(dtype)))
    plain(x.to(dtype)).sum().backward()
    # Sums of 36 positions and 8 inputs, each rounded.
    for name, p in plain.named_parameters():
        got = model.get_parameter(name).grad
        assert got is not None
        assert p.grad is not None
        torch.testing.assert_close(got, p.grad, rtol=0.05, atol=0.05 * p.grad.abs().max().item())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own jvp calls it
def test_transforms_and_swapped_weights_compute_anew() -> None:
    model = network()
    x = batch(0)[0]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = {name: p + p.sin() for name, p in weights.items()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x[None],)).square().sum()

    def closed(x: Tensor) -> Tensor:
        return model(x[None])[0]

    expected = [torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)["0.weight"] for w in (weights, other)]
    tangent = torch.func.jvp(lambda w: loss(w, x[0]), (weights,), (other,))[1]
    with reuse_filters(model):
        y = model(x)
        for w, wanted in zip((weights, other), expected, strict=True):
            got = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)["0.weight"]
            torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(torch.func.vmap(closed)(x), y)
        torch.testing.assert_close(torch.func.jvp(lambda w: loss(w, x[0]), (weights,), (other,))[1], tangent)
        torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), copy_with(model, other)(x))
        torch.testing.assert_close(model(x), y)


def copy_with(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    again = copy.deepcopy(model)
    again.load_state_dict(weights)
    return again


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_and_exports_in_the_context() -> None:
    model = network()
    x = batch(0)[0]
    with reuse_filters(model):
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x), expected)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.sin())
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_a_parametrized_weight_computes_anew() -> None:
    layer = WSConv2d(3, 4, 3)
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(1, 3, 5, 5)
    with reuse_filters(layer):
        layer(x)
        with torch.no_grad():
            layer.parametrizations.weight.original1.add_(1)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


def test_a_backend_by_name_computes_anew(computed: list[str]) -> None:
    model = network().eval()
    with reuse_filters(model), anybatch.backend("reference"):
        for _ in range(2):
            model(batch(0)[0])
    assert len(computed) == 2 * LAYERS


def test_activation_checkpoints() -> None:
    model, plain = network(), network()
    with reuse_filters(model):
        for i in range(2):
            y = checkpoint(model, batch(i)[0], use_reentrant=False)
            assert isinstance(y, Tensor)
            y.square().sum().backward()
            plain(batch(i)[0]).square().sum().backward()
    assert_same_gradients(gradients(model), gradients(plain), relative=1e-12)


def test_a_graph_outlives_a_step_and_the_context() -> None:
    # Each batch holds the filter that it was computed with.
    model, plain = WSConv2d(3, 4, 3, variant="bcn").double(), WSConv2d(3, 4, 3, variant="bcn").double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    with reuse_filters(model):
        y = model(x).square().sum()
        with torch.no_grad():
            model.weight.add_(1.5)
        model(x)
    y.backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)


def test_frozen_weights_and_a_network_without_such_layers() -> None:
    layer = WSConv2d(3, 4, 3)
    layer.weight.requires_grad_(False)
    scaled = ScaledWSConv2d(4, 2, 1)
    scaled.weight.requires_grad_(False)
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    with reuse_filters(layer), reuse_filters(scaled), reuse_filters(nn.ReLU()):
        scaled(layer(x)).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert scaled.weight.grad is None
    assert scaled.gain.grad is not None
    (expected,) = torch.autograd.grad(scaled(layer(x)).sum(), scaled.gain)
    torch.testing.assert_close(scaled.gain.grad, expected)
