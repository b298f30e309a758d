"""Torch's own layer as the baseline, its form for many processes, and its form of constants."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import anybatch
from anybatch.dispatch import backend
from anybatch.functional import frozen_batch_norm
from anybatch.layers import FrozenBatchNorm, SyncBatchNorm
from anybatch.methods.batch_norm import channel_moments, shared_moments
from anybatch.models.blocks import Pieces
from helpers import assert_error_within, error, run_two_ranks, saved_tensors
from methods.sync_worker import SHARINGS, Sharing


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
def test_each_number_of_dimensions_gets_its_layer(dims: int, kind: type[nn.Module]) -> None:
    layer = Pieces(anybatch.scheme("bn(momentum=0.25,eps=0.5)"), dims=dims).norm(6)
    assert type(layer) is kind
    assert (layer.num_features, layer.momentum, layer.eps) == (6, 0.25, 0.5)


def test_defaults_are_torchs() -> None:
    ours, theirs = Pieces(anybatch.scheme("bn")).norm(6), nn.BatchNorm2d(6)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("part", ["bn", "syncbn"])
def test_by_hand(part: str) -> None:
    # The channel holds 1, 3, 5, 7 over batch and positions: mean 4, biased variance 5, unbiased 20/3.
    layer = Pieces(anybatch.scheme(f"{part}(eps=4.0,momentum=0.5)")).norm(1)
    y = layer(torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]]))
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))
    torch.testing.assert_close(layer.running_mean, torch.tensor([2.0]))
    torch.testing.assert_close(layer.running_var, torch.tensor([0.5 * 1 + 0.5 * 20 / 3]))
    layer.eval()
    torch.testing.assert_close(
        layer(torch.tensor([[[[4.0]]]])).flatten(), torch.tensor([2.0]) / (0.5 + 10 / 3 + 4) ** 0.5
    )


def test_claims_of_batch_independence() -> None:
    assert not anybatch.scheme("bn").batch_independent
    assert not anybatch.scheme("ws+bn").batch_independent
    assert not anybatch.scheme("syncbn").batch_independent
    assert anybatch.scheme("frozenbn").batch_independent


@pytest.mark.parametrize("part", ["bn", "syncbn"])
def test_one_value_in_a_channel_is_refused_in_training(part: str) -> None:
    layer = Pieces(anybatch.scheme(part)).norm(6)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got .*\[1, 6, 1, 1\]"):
        layer(torch.zeros(1, 6, 1, 1))
    assert layer.eval()(torch.zeros(1, 6, 1, 1)).shape == (1, 6, 1, 1)


# Moments


def test_moments_of_channels_are_those_of_float64_at_a_large_mean() -> None:
    x = (torch.randn(3, 6, 5, 7) + 1000).requires_grad_()
    mean, squares = channel_moments(x)
    var, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert_error_within(mean, exact, 1000 * torch.finfo(torch.float32).eps)
    assert_error_within(squares / 105, var, 1e-5)
    samples, count, mean, var = shared_moments(x.detach())
    assert (samples, count) == (3, 105)


# Across processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes found for its part of every `Sharing`, over gloo."""
    folder = tmp_path_factory.mktemp("ddp")
    run_two_ranks(Path(__file__).with_name("sync_worker.py"), folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARINGS)
def test_two_ranks_with_part_of_a_batch_equal_one_with_all(
    name: str, two_ranks: list[dict[str, dict[str, Tensor]]]
) -> None:
    sharing = SHARINGS[name]
    first, second = (rank[name] for rank in two_ranks)
    eps = torch.finfo(sharing.dtype).eps
    for what, value in sharing.run(None).items():
        if what.startswith(("output", "gradient")):
            got = torch.cat([first[what], second[what]])
        elif what.startswith("sum"):
            got = first[what] + second[what]
        else:
            got = first[what]
            torch.testing.assert_close(second[what], got, rtol=0, atol=0)
        size = max(value.abs().max().item(), 1.0)
        allowed = {torch.float64: 1e-12, torch.float32: 4 * 1001 * eps, torch.bfloat16: 4 * eps}[sharing.dtype]
        assert_error_within(got, value, allowed * size, what)


def test_the_sharings_differ_from_layers_that_share_nothing() -> None:
    for name, sharing in SHARINGS.items():
        if sharing.positions != (1, 1) and 0 not in sharing.first:
            whole = sharing.run(None)
            assert error(sharing.run(0)["gradient 0"], whole["gradient 0"][: sharing.first[0]]) > 1e-3, name


@pytest.mark.slow
def test_one_rank_with_no_group_or_one_of_its_own_is_torchs_layer(
    two_ranks: list[dict[str, dict[str, Tensor]]],
) -> None:
    make = partial(SyncBatchNorm, momentum=0.2)
    theirs = Sharing(partial(nn.BatchNorm2d, momentum=0.2), (1,), (3,))
    ours = Sharing(make, (1,), (3,))
    for what, value in theirs.run(None).items():
        torch.testing.assert_close(ours.run(None)[what], value, rtol=0, atol=0)
        for rank in range(2):
            torch.testing.assert_close(two_ranks[rank]["sync-groups of one"][what], theirs.run(rank)[what])


def test_state_dicts_are_torchs_and_torchs_conversion_takes_the_layer() -> None:
    theirs, ours = nn.BatchNorm2d(6), SyncBatchNorm(6)
    nn.init.normal_(theirs.running_mean)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    torch.testing.assert_close(converted.running_mean, theirs.running_mean)


@pytest.mark.parametrize("shape", [(6,), (2, 5, 3, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, C, \*\)|made for 6 channels, got x of shape \(2, 5, 3, 3\)"):
        SyncBatchNorm(6)(torch.zeros(shape))


# Constants


def trained(kind: type[nn.Module] = nn.BatchNorm2d, channels: int = 6, **options: float) -> nn.Module:
    layer = kind(channels, **options)
    for t in (*layer.parameters(), layer.running_mean):
        nn.init.normal_(t)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    layer.num_batches_tracked.fill_(17)
    return layer.eval()


def test_frozen_by_hand() -> None:
    # (5 - 1) / sqrt(3 + 1) * 10 + 7 = 27
    (x, mean, var, weight, bias) = (torch.tensor([v]) for v in (5.0, 1.0, 3.0, 10.0, 7.0))
    torch.testing.assert_close(frozen_batch_norm(x[None], mean, var, weight, bias, eps=1.0), torch.tensor([[27.0]]))
    torch.testing.assert_close(frozen_batch_norm(x[None], mean, var, eps=1.0), torch.tensor([[2.0]]))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 1, 1), (2, 6, 2, 3, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_is_batch_norm_in_evaluation(shape: tuple[int, ...], training: bool) -> None:
    layer, x = trained(eps=1e-3).double(), torch.randn(shape, dtype=torch.float64)
    ours = FrozenBatchNorm(6, 1e-3).double().train(training)
    ours.load_state_dict(layer.state_dict(), strict=True)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-3)
    torch.testing.assert_close(ours(x), expected.detach())
    assert not list(ours.parameters())


def test_frozen_is_torchvisions_and_shares_its_state_dict() -> None:
    theirs, ours = FrozenBatchNorm2d(6, eps=0.01), FrozenBatchNorm(6, eps=0.01)
    for value in theirs.buffers():
        nn.init.uniform_(value, 0.5, 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_frozen_starts_as_the_identity_and_is_not_started_at_0() -> None:
    x = torch.randn(2, 6, 5, 7)
    layer = Pieces(anybatch.scheme("frozenbn(eps=0.0)"), zero_init_residual=True).norm(6, last_in_branch=True)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_keeps_nothing_for_the_gradient_of_its_input(dtype: torch.dtype) -> None:
    layer, x = FrozenBatchNorm(6).to(dtype), torch.randn(2, 6, 5, 7, dtype=dtype, requires_grad=True)
    with saved_tensors() as kept:
        y = layer(x)
    assert kept
    assert not [t.shape for t in kept if t.numel() >= x.numel()]
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 + 1e-5) ** -0.5)


def test_frozen_kernels_are_taken_where_statistics_ask_for_gradients() -> None:
    x, mean, var = torch.randn(2, 6, 3, 3).bfloat16(), torch.zeros(6, requires_grad=True), torch.ones(6)
    with backend("recompute"):
        assert frozen_batch_norm(x, mean, var).grad_fn is not None
        with pytest.raises(ValueError, match="x alone asks for a gradient"):
            frozen_batch_norm(x, mean.detach(), var)


def test_frozen_refuses_other_numbers_of_channels() -> None:
    with pytest.raises(ValueError, match=r"made for 6 channels, got x of shape \(2, 5, 3\)"):
        FrozenBatchNorm(6)(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"mean is of 6 channels, x of shape \(2, 5, 3\) has 5"):
        frozen_batch_norm(torch.zeros(2, 5, 3), torch.zeros(6), torch.ones(6))
    with pytest.raises(ValueError, match=r"x must be \(N, C, \*\)"):
        frozen_batch_norm(torch.zeros(5), torch.zeros(5), torch.ones(5))


def test_a_forward_within_backward_is_told() -> None:
    from anybatch.methods.batch_norm import recomputing

    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(recomputing())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(call, x, use_reentrant=False).sum().backward()
    call(x)
    assert seen == [False, True, False]
