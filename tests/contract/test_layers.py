"""What every layer must satisfy, over the rows of `cases.LAYERS`."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config

from anybatch import layers
from contract.cases import HALVES, LAYERS, last_format
from contract.kinds import LayerCase
from helpers import assert_error_within, error

WITH_EPS = [
    case
    for case in LAYERS
    for kind in [type(case.make())]
    if case.name.startswith(kind.__name__) and "eps" in inspect.signature(kind).parameters
]
MAPS = [case for case in LAYERS if len(case.shape) in (4, 5)]


def test_every_public_layer_has_a_row() -> None:
    public = {name for name, value in vars(layers).items() if inspect.isclass(value)}
    public -= {"Recomputed"}  # a sequence of others
    assert public == {type(case.make()).__name__ for case in LAYERS}


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_repr_shows_the_arguments(case: LayerCase) -> None:
    shown = repr(case.make())
    for text in case.shown:
        assert text in shown


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_equal_and_separate(case: LayerCase, duplicate) -> None:
    layer, x = case.make(), case.input()
    expected = layer(x).detach().clone()
    again = duplicate(layer)
    assert repr(again) == repr(layer)
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for p in again.parameters():
            p.mul_(3)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_state_dict_round_trip(case: LayerCase) -> None:
    layer, other, x = case.make(), case.make(), case.input()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1).mul_(-2)
    if list(other.parameters()):
        assert error(other(x), layer(x)) > 1e-3
    other.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_device_and_dtype_reach_the_parameters(case: LayerCase) -> None:
    assert {(p.device.type, p.dtype) for p in case.make(device="meta", dtype=torch.float64).parameters()} <= {
        ("meta", torch.float64)
    }
    assert {p.dtype for p in case.make(dtype=torch.float16).parameters()} <= {torch.float16}


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_the_meta_device_gives_the_shape(case: LayerCase) -> None:
    x = case.input()
    assert case.make(device="meta")(x.to("meta")).shape == case.make()(x).shape


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_an_empty_batch_leaves_the_state_as_it_was(case: LayerCase) -> None:
    layer, x = case.make().train(), case.input()
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    assert layer(x[:0]).shape == layer.eval()(x)[:0].shape
    for name, values in layer.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(values, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf"), "1e-5", True])
@pytest.mark.parametrize("case", WITH_EPS, ids=str)
def test_an_eps_that_is_no_number_of_0_or_more_is_refused(case: LayerCase, eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps={eps!r} is not a number from 0"):
        case.make(eps=eps)


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_in_half_precision_out(case: LayerCase, dtype: torch.dtype) -> None:
    x = case.input(dtype).requires_grad_()
    layer = case.make()
    y = layer.to(dtype)(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert {t.grad.dtype for t in (x, *layer.parameters()) if t.grad is not None} == {dtype}
    exact = copy.deepcopy(layer).double()(x.detach().double())
    terms = max(
        (p[0].numel() for p in layer.parameters() if p.dim()), default=1
    )  # rounding of each product of a convolution
    eps = torch.finfo(dtype).eps
    assert_error_within(y, exact, eps * (2 * exact.abs().max().item() + 2 * terms**0.5))


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_channels_last_stays_channels_last(case: LayerCase) -> None:
    x = case.input()
    expected = case.make()(x)
    layer = case.make().to(memory_format=last_format(x))
    y = layer(x.contiguous(memory_format=last_format(x)))
    assert y.is_contiguous(memory_format=last_format(x))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_batch_of_one_equals_the_sample_in_a_batch(case: LayerCase) -> None:
    layer, x = case.make(dtype=torch.float64), case.input(torch.float64)
    together = layer(x)
    for i in range(len(x)):
        torch.testing.assert_close(layer(x[i : i + 1]), together[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_vmap_over_samples_gives_what_the_batch_gives(case: LayerCase) -> None:
    layer, x = case.make(dtype=torch.float64), case.input(torch.float64)
    expected = layer(x)
    got = torch.func.vmap(lambda sample: layer(sample[None])[0])(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in LAYERS if case.name.partition("-")[0].endswith("d")], ids=str)
def test_layers_of_known_dimensions_take_one_sample_without_a_batch(case: LayerCase) -> None:
    layer, x = case.make(dtype=torch.float64), case.input(torch.float64)
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.14159, 1000.0])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_constant_input_gives_finite_output_and_gradients(case: LayerCase, value: float) -> None:
    layer, x = case.make(), torch.full(case.shape, value, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    for t in (x, *layer.parameters()):
        assert t.grad is None or t.grad.isfinite().all()


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_an_input_of_mean_1000_costs_three_digits_and_no_more(case: LayerCase) -> None:
    # A mean's rounding counts 1000-fold behind the division by the deviation; a difference of squares would err by 1.
    layer, x = case.make(), case.input() + 1000
    exact = copy.deepcopy(layer).double()(x.double())
    terms = max((p[0].numel() for p in layer.parameters() if p.dim()), default=1)
    eps = torch.finfo(torch.float32).eps
    assert_error_within(layer(x), exact, 8 * 1001 * eps * max(exact.abs().max().item() / 1001, terms**0.5, 3))


@pytest.mark.parametrize("case", [case for case in LAYERS if case.batch_independent], ids=str)
def test_train_and_eval_are_the_same_and_draw_nothing(case: LayerCase) -> None:
    layer, x = case.make(), case.input()
    expected = layer.train()(x)
    state = torch.get_rng_state()
    torch.testing.assert_close(layer.eval()(x), expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_gradients_in_double_precision(case: LayerCase) -> None:
    layer = case.make(dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = case.input(torch.float64).requires_grad_()
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_compiles_to_one_graph(case: LayerCase) -> None:
    layer, x = case.make(), case.input()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_what_the_compiler_makes_of_it_gives_the_same(case: LayerCase) -> None:
    """By torch's own compiler, forward and backward, with the random numbers of eager code."""
    layer, x = case.make(), case.input(batch=5).requires_grad_()
    asked = [x, *layer.parameters()]

    def passed(call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        y = call(x)
        found = torch.autograd.grad(y, asked, torch.linspace(-1, 1, y.numel()).view_as(y), materialize_grads=True)
        return [y.detach(), *found]

    with torch._inductor.config.patch(fallback_random=True):
        compiled = passed(torch.compile(layer, fullgraph=True))
    for got, expected in zip(compiled, passed(layer), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_exports(case: LayerCase) -> None:
    layer, x = case.make().eval(), case.input()
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(program.module()(x[:2]), layer(x[:2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_torchscript_traces_it(case: LayerCase) -> None:
    layer, x = case.make().eval(), case.input(batch=3)
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(layer, x), file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x[:2]), layer(x[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_autocast_gives_finite_values_near_float32(case: LayerCase) -> None:
    layer, x = case.make(), case.input()
    exact = layer.double()(x.double())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    y.float().sum().backward() if y.requires_grad else None
    terms = max((p[0].numel() for p in layer.parameters() if p.dim()), default=1)
    eps = torch.finfo(torch.bfloat16).eps
    assert_error_within(y, exact, eps * (2 * exact.abs().max().item() + 2 * terms**0.5))
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
