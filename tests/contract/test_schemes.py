"""What every scheme must satisfy in a small network, over the rows of `cases.SCHEMES`: the promises, one by one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.methods.common import ChannelLayer
from anybatch.schemes import PARTS
from contract.cases import BATCH_BOUND, BATCH_FREE, DROPPING, SCHEMES, images
from contract.kinds import SchemeCase
from helpers import assert_error_within, assert_same_gradients, error, gradients, run_two_ranks

NORMALIZING = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, ChannelLayer)
LABELS = torch.tensor([0, 3, 1, 4])
REPEATS = {"gn:auto", "gn/8", "ws+ln", "ws+bn", "ws+bcn:8", "nf+agc"}
"""What they trace others do too: other numbers of groups, two parts that others have apart, AGC, which is no layer."""
TRACED = [pytest.param(case, marks=pytest.mark.slow) if str(case) in REPEATS else case for case in SCHEMES]


def batch_gradient(model: nn.Module, x: Tensor, labels: Tensor, portion: int) -> dict[str, Tensor]:
    """The gradient of the mean loss, accumulated over portions of the batch."""
    model.zero_grad()
    for some, wanted in zip(x.split(portion), labels.split(portion), strict=True):
        (F.cross_entropy(model(some), wanted) * len(some) / len(x)).backward()
    return gradients(model)


def assert_alone_is_as_in_a_batch(model: nn.Module, x: Tensor) -> None:
    together = model(x)
    for i in range(len(x)):
        alone = model(x[i : i + 1])
        assert_error_within(alone, together[i : i + 1], 1e-12 * together.abs().max().item(), f"sample {i}")


def assert_accumulation_gives_the_same_gradient(model: nn.Module, x: Tensor) -> None:
    expected = batch_gradient(model, x, LABELS, len(x))
    assert_same_gradients(batch_gradient(model, x, LABELS, 1), expected, relative=1e-12)


def test_every_part_has_a_row() -> None:
    used = {part.split("(")[0] for case in SCHEMES for part in anybatch.scheme(case.scheme).name.split("+")}
    assert used == set(PARTS)


def test_only_schemes_with_batch_normalization_claim_nothing() -> None:
    assert {str(case) for case in BATCH_BOUND} == {"bcn:8", "bn", "brn", "evob0", "syncbn", "ws+bcn:8", "ws+bn"}


# Promise 1: batch-free means batch-free.


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize(
    ("case", "training"),
    [(case, training) for case in BATCH_FREE for training in (True, False)]
    + [(case, False) for case in DROPPING if case.claims_batch_independence],
    ids=str,
)
def test_a_sample_alone_equals_the_sample_in_a_batch(case: SchemeCase, training: bool, choice: str) -> None:
    with anybatch.backend(choice):
        assert_alone_is_as_in_a_batch(case.network(torch.float64).train(training), images(4, dtype=torch.float64))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("case", BATCH_FREE, ids=str)
def test_one_batch_of_4_gives_the_gradient_of_4_accumulated(case: SchemeCase, choice: str) -> None:
    with anybatch.backend(choice):
        assert_accumulation_gives_the_same_gradient(case.network(torch.float64), images(4, dtype=torch.float64))


@pytest.mark.parametrize("case", BATCH_BOUND, ids=str)
def test_batch_normalization_fails_both_of_these_tests(case: SchemeCase) -> None:
    model, x = case.network(torch.float64), images(4, size=16, dtype=torch.float64)
    with pytest.raises(AssertionError, match="sample 0: error"):
        assert_alone_is_as_in_a_batch(model, x)
    with pytest.raises(AssertionError, match="gradient of"):
        assert_accumulation_gives_the_same_gradient(model, x)


@pytest.mark.parametrize("case", BATCH_FREE, ids=str)
def test_training_computes_what_evaluation_computes(case: SchemeCase) -> None:
    model, x = case.network(), images(3)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0, atol=0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Gradients by scheme from two processes with one image each, averaged by DDP over gloo."""
    folder = tmp_path_factory.mktemp("ddp")
    run_two_ranks(Path(__file__).with_name("ddp_worker.py"), folder)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*BATCH_FREE, *(case for case in BATCH_BOUND if case.synchronized)], ids=str)
def test_2_ranks_of_batch_1_equal_1_rank_of_batch_2(case: SchemeCase, two_ranks: dict[str, dict[str, Tensor]]) -> None:
    x = images(2, dtype=torch.float64)
    expected = batch_gradient(case.network(torch.float64), x, LABELS[:2], 2)
    # Shared statistics are summed in another order, which a network of 9 layers passes on.
    assert_same_gradients(two_ranks[case.scheme], expected, relative=1e-10 if case.synchronized else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in BATCH_BOUND if not case.synchronized], ids=str)
def test_2_ranks_of_batch_1_differ_under_batch_normalization(
    case: SchemeCase, two_ranks: dict[str, dict[str, Tensor]]
) -> None:
    expected = batch_gradient(case.network(torch.float64), images(2, dtype=torch.float64), LABELS[:2], 2)
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same_gradients(two_ranks[case.scheme], expected, relative=1e-3)


# Promise 2: batch 1 never crashes.


@pytest.mark.parametrize("case", [case for case in BATCH_FREE if case.one_position], ids=str)
def test_batch_1_with_maps_of_one_position_trains(case: SchemeCase) -> None:
    model = case.network().train()
    assert model.forward_features(images(1, size=4)).shape[2:] == (1, 1)
    F.cross_entropy(model(images(1, size=4)), LABELS[:1]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize("case", [case for case in BATCH_FREE if not case.one_position], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_maps_that_a_norm_would_erase_are_refused(case: SchemeCase, batch: int) -> None:
    with pytest.raises(ValueError, match=r"leaves one value in each group of x of shape \(.*\), which would erase it"):
        case.network().train()(images(batch, size=4))


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("case", SCHEMES, ids=str)
def test_a_constant_image_gives_finite_values(case: SchemeCase, value: float) -> None:
    model, x = case.network().train(), torch.full((2, 3, 8, 8), value, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Promise 4: evaluation is deterministic.


@pytest.mark.parametrize("case", [*SCHEMES, *DROPPING], ids=str)
def test_evaluation_draws_no_random_numbers(case: SchemeCase) -> None:
    model, x = case.network().eval(), images(2)
    state = torch.get_rng_state()
    first, second = model(x), model(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# Promise 5: memory formats, half precision, and what wraps a network.


@pytest.mark.parametrize("case", SCHEMES, ids=str)
def test_channels_last_reaches_every_layer(case: SchemeCase) -> None:
    x = images(2)
    expected = case.network()(x)
    model = case.network().to(memory_format=torch.channels_last)
    lost: list[str] = []
    seen: list[str] = []

    def watch(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            seen.append(name)
            if not y.is_contiguous(memory_format=torch.channels_last):
                lost.append(name)

        model.get_submodule(name).register_forward_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, NORMALIZING):
            watch(name)
    y = model(x.contiguous(memory_format=torch.channels_last))
    assert len(seen) >= 9
    assert not lost
    # Convolutions sum in another order; a network of 9 layers passes that on.
    assert_error_within(y, expected, 1e-4 * expected.abs().max().item())
    y.sum().backward()
    assert model.layer1[0].conv2.weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", SCHEMES, ids=str)
def test_bfloat16_in_bfloat16_out(case: SchemeCase) -> None:
    model = case.network(torch.bfloat16)
    y = model(images(2, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


@pytest.mark.parametrize("case", SCHEMES, ids=str)
def test_autocast_keeps_activations_in_half_precision(case: SchemeCase) -> None:
    model = case.network()
    wide: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, NORMALIZING):
            module.register_forward_hook(
                lambda _module, _args, y, name=name: wide.append(name) if y.dtype != torch.bfloat16 else None
            )
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images(2))
    F.cross_entropy(y.float(), LABELS[:2]).backward()
    assert not wide
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", TRACED, ids=str)
def test_compiles_to_one_graph(case: SchemeCase) -> None:
    model, x = case.short(torch.float64), images(2, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected = batch_gradient(model, x, LABELS[:2], 2)
    assert_same_gradients(
        {name.removeprefix("_orig_mod."): g for name, g in batch_gradient(compiled, x, LABELS[:2], 2).items()},
        expected,
        relative=1e-10,
    )
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("case", TRACED, ids=str)
def test_exports_with_any_batch_size(case: SchemeCase) -> None:
    model, x = case.short(torch.float64).eval(), images(3, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for n in (3, 2):
        torch.testing.assert_close(program.module()(x[:n]), model(x[:n]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", SCHEMES, ids=str)
def test_a_network_survives_copying_pickling_and_its_state_dict(case: SchemeCase) -> None:
    model, x = case.network().eval(), images(2)
    expected = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    torch.manual_seed(99)
    other = anybatch.create_model(case.model, case.scheme, **case.options).eval()
    assert error(other(x), expected) > 1e-3
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", SCHEMES, ids=str)
def test_a_scheme_survives_pickling(case: SchemeCase) -> None:
    scheme = anybatch.scheme(case.scheme)
    again = pickle.loads(pickle.dumps(scheme))
    assert (again.name, again.filled, again.batch_independent) == (scheme.name, scheme.filled, scheme.batch_independent)
    built = anybatch.create_model(case.model, again, **case.options)
    assert repr(built) == repr(anybatch.create_model(case.model, scheme, **case.options))
