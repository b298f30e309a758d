"""Batch Renormalization: values by hand, batch normalization as its limit, no gradient through r and d, schedule."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.functional import batch_renorm, renorm_correction
from anybatch.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from anybatch.models.blocks import Pieces
from helpers import assert_error_within

NO_SCHEDULE = {"start": 0, "r_end": 0, "d_end": 0}


def input_with_offsets(*shape: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    own = (1, shape[1], *(1 for _ in shape[2:]))
    return x * (0.5 + torch.rand(own, dtype=torch.float64)) + 3 * torch.randn(own, dtype=torch.float64)


def renorm(kind: type[nn.Module] = BatchRenorm2d, **options: float) -> nn.Module:
    layer = kind(6, dtype=torch.float64, **options)
    for t in (*layer.parameters(), layer.running_mean):
        nn.init.normal_(t, 1.0)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def test_by_hand() -> None:
    # The channel holds 1, 3, 5, 7: mean 4, biased variance 5; with eps 4 its deviation is 3. Running: mean 2, variance
    # 0, deviation 2. So r = 3 / 2 and d = (4 - 2) / 2 = 1, and y = (x - 4) / 3 * 3 / 2 + 1 = (x - 2) / 2.
    x = torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]])
    mean, var, two, nil = (torch.tensor([v]) for v in (4.0, 5.0, 2.0, 0.0))
    r, d = renorm_correction(mean.requires_grad_(), var.requires_grad_(), two, nil, eps=4.0)
    assert not any(t.requires_grad for t in (r, d))
    torch.testing.assert_close((r, d), (torch.tensor([1.5]), torch.tensor([1.0])))
    torch.testing.assert_close(batch_renorm(x, r, d, eps=4.0), (x - 2) / 2)
    torch.testing.assert_close(batch_renorm(x, r, d, torch.tensor([10.0]), torch.tensor([7.0]), eps=4.0), 5 * x - 3)
    r, d = renorm_correction(mean, var, two, nil, 1.2, 0.25, eps=4.0)
    torch.testing.assert_close((r, d), (torch.tensor([1.2]), torch.tensor([0.25])))
    r, d = renorm_correction(two, nil, mean, var, 1.2, 0.25, eps=4.0)
    torch.testing.assert_close((r, d), (torch.tensor([1 / 1.2]), torch.tensor([-0.25])))


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (BatchRenorm1d, nn.BatchNorm1d, (4, 6, 7)),
        (BatchRenorm2d, nn.BatchNorm2d, (2, 6, 5, 7)),
        (BatchRenorm3d, nn.BatchNorm3d, (2, 6, 2, 3, 3)),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{"r_max": 1.0, "d_max": 0.0, **NO_SCHEDULE}, {}], ids=["no correction", "start"])
def test_is_batch_norm_while_nothing_may_be_corrected(ours, theirs, shape, momentum, options) -> None:
    layer, other = renorm(ours, momentum=momentum, **options), theirs(6, momentum=momentum, dtype=torch.float64)
    other.load_state_dict(layer.state_dict(), strict=True)
    for training in (True, True, False):
        layer.train(training)
        other.train(training)
        x = input_with_offsets(*shape).requires_grad_()
        g = torch.randn(shape, dtype=torch.float64)
        inputs = (x, *layer.parameters()), (x, *other.parameters())
        y, expected = layer(x), other(x)
        torch.testing.assert_close(y, expected)
        got, wanted = (torch.autograd.grad(out, t, g) for out, t in zip((y, expected), inputs, strict=True))
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


def test_unclipped_training_computes_what_evaluation_does_with_the_gradient_of_batch_norm() -> None:
    layer, x = renorm(r_max=1e9, d_max=1e9, **NO_SCHEDULE), input_with_offsets(2, 6, 5, 7).requires_grad_()
    evaluated = copy.deepcopy(layer).eval()(x)
    y = layer(x)
    torch.testing.assert_close(y, evaluated)
    g = torch.randn(y.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, g)
    # Orthogonal to what the batch's statistics take away, as evaluation's gradient is not.
    torch.testing.assert_close(gradient.sum((0, 2, 3)), torch.zeros(6).double(), rtol=0, atol=1e-12)
    assert torch.autograd.grad(evaluated, x, g)[0].sum((0, 2, 3)).abs().max() > 0.1


def test_the_correction_takes_the_averages_of_before_and_then_updates_them() -> None:
    layer, x = renorm(momentum=0.2, **NO_SCHEDULE), input_with_offsets(2, 6, 5, 7)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    batch_var, batch_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    r, d = renorm_correction(batch_mean, batch_var, mean, var, 3.0, 5.0)
    z = F.batch_norm(x, batch_mean, batch_var)
    expected = (z * r.reshape(1, 6, 1, 1) + d.reshape(1, 6, 1, 1)) * layer.weight.reshape(1, 6, 1, 1)
    torch.testing.assert_close(layer(x), expected + layer.bias.reshape(1, 6, 1, 1))
    torch.testing.assert_close(layer.running_mean, 0.8 * mean + 0.2 * batch_mean)
    torch.testing.assert_close(layer.running_var, 0.8 * var + 0.2 * batch_var * 70 / 69)


def test_the_bounds_grow_as_scheduled() -> None:
    layer = BatchRenorm2d(6, r_max=3.0, d_max=5.0, start=2, r_end=6, d_end=4)
    seen = []
    for _ in range(9):
        seen.append((round(layer._progress(layer.r_end).item(), 6), round(layer._progress(layer.d_end).item(), 6)))
        layer(torch.randn(2, 6, 3, 3))
    assert [r for r, _ in seen] == [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    assert [d for _, d in seen] == [0, 0, round(1 / 3, 6), round(2 / 3, 6), 1, 1, 1, 1, 1]
    assert layer.num_batches_tracked == 9


def test_the_bounds_reach_the_correction() -> None:
    layer, x = renorm(affine=False, r_max=2.0, d_max=0.5, start=0, r_end=1, d_end=1), input_with_offsets(4, 6, 5, 7)
    layer.running_mean.fill_(-100)
    layer.running_var.fill_(1e-4)
    for bound in (0.5, 1.0):  # half of the way at the first batch, all of it at the second
        y = layer(x)
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.full((6,), 0.5 * bound).double())
        std = y.std((0, 2, 3), correction=0)
        torch.testing.assert_close(std, torch.full((6,), 1 + bound).double(), rtol=1e-4, atol=0)
        layer.running_mean.fill_(-100)
        layer.running_var.fill_(1e-4)


def test_a_large_mean_costs_no_more_than_its_rounding() -> None:
    x = torch.randn(2, 6, 9, 9) + 1000
    layer = BatchRenorm2d(6, **NO_SCHEDULE)
    layer.running_mean.fill_(1000.1)
    exact = copy.deepcopy(layer).double()(x.double())
    assert_error_within(layer(x), exact, 8 * 1001 * torch.finfo(torch.float32).eps)
    last = layer.train()(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("fresh_compiler")
def test_training_compiles_to_one_graph_with_the_same_updates() -> None:
    layer = renorm(r_max=2.0, d_max=1.0, start=1, r_end=3, d_end=3)
    again = copy.deepcopy(layer)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    for n in (2, 3, 5):
        x = input_with_offsets(n, 6, 5, 7).requires_grad_()
        y, z = layer(x), compiled(x)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(torch.autograd.grad(z.square().sum(), x), torch.autograd.grad(y.square().sum(), x))
    torch.testing.assert_close(again.state_dict(), layer.state_dict())


def test_a_batch_enters_the_averages_once_under_checkpointing() -> None:
    layer, x = renorm(**NO_SCHEDULE), input_with_offsets(2, 6, 5, 7).requires_grad_()
    again = copy.deepcopy(layer)
    layer(x).sum().backward()
    checkpoint(again, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_options_of_the_part_reach_the_layers() -> None:
    spec = "brn(momentum=0.05,r_max=1.5,d_max=0.5,start=10,r_end=30,d_end=20,eps=0.001)"
    for dims, kind in enumerate((BatchRenorm1d, BatchRenorm2d, BatchRenorm3d), 1):
        layer = Pieces(anybatch.scheme(spec), dims=dims).norm(6)
        assert type(layer) is kind
        assert repr(layer).endswith(
            "(6, eps=0.001, momentum=0.05, affine=True, r_max=1.5, d_max=0.5, start=10, r_end=30, d_end=20)"
        )
    assert not anybatch.scheme("brn").batch_independent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchRenorm2d(6, r_max=0.5), "r_max=0.5 is not a number of 1 or more"),
        (lambda: BatchRenorm2d(6, d_max=-1.0), "d_max=-1.0 is not a number from 0"),
        (lambda: BatchRenorm2d(6, r_max=float("inf")), "r_max=inf is not a number of 1 or more"),
        (lambda: anybatch.scheme("brn(r_max=x)"), "r_max='x' is not a number of 1 or more"),
        (lambda: anybatch.scheme("brn(start=x)"), "start='x' and r_end=40000 are not batches in this order"),
        (lambda: BatchRenorm2d(0), "num_features must be a whole number of 1 or more, got 0"),
        (lambda: BatchRenorm2d(6, momentum=2), "momentum=2 is not a number from 0 to 1"),
        (lambda: BatchRenorm2d(6, start=10, d_end=5), "start=10 and d_end=5 are not batches in this order"),
        (lambda: anybatch.scheme("brn(start=-1)"), "start=-1 and r_end=40000 are not batches in this order"),
        (lambda: BatchRenorm2d(6)(torch.zeros(1, 6, 1, 1)), r"two values or more in each channel in training, got x"),
        (lambda: BatchRenorm2d(6)(torch.zeros(2, 5, 3, 3)), r"with 6 channels and 2 spatial dimensions, got shape"),
        (lambda: BatchRenorm1d(6)(torch.zeros(6)), r"with 6 channels and 1 spatial dimensions, got shape"),
        (lambda: batch_renorm(torch.zeros(2, 5, 3), torch.ones(6), torch.ones(6)), "r and d are of 6 channels, x of"),
        (lambda: batch_renorm(torch.zeros(5), torch.ones(5), torch.ones(5)), r"x must be \(N, C, \*\)"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
