"""Batch-Channel Norm: the order of its update, no gradient through estimates, rates, both variants, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.functional import batch_channel_norm, group_norm
from anybatch.layers import BatchChannelNorm1d, BatchChannelNorm2d, BatchChannelNorm3d
from anybatch.models.blocks import Pieces
from helpers import assert_error_within, saved_tensors


def offset_input(*shape: int) -> Tensor:
    """Samples and channels with means and scales of their own."""
    x = torch.randn(shape, dtype=torch.float64)
    own = (shape[0], shape[1], *(1 for _ in shape[2:]))
    return x * (0.5 + torch.rand(own, dtype=torch.float64)) + 3 * torch.randn(own, dtype=torch.float64)


def layer_with_random_parameters(num_channels: int = 6, num_groups: int = 3, **options: object) -> BatchChannelNorm2d:
    layer = BatchChannelNorm2d(num_channels, num_groups, dtype=torch.float64, **options)
    for p in layer.parameters():
        nn.init.normal_(p, 1.0)
    return layer


# The function


def test_by_hand() -> None:
    # Batch part, scales 1: channel 0 holds (1, 3, 5, 7) - 1 over 2 = 0, 1, 2, 3; channel 1 the same times -1 plus 3.
    # The group holds 0, 1, 2, 3, 3, 2, 1, 0: mean 1.5, variance 1.25.
    x = torch.tensor([[[1.0, 3.0, 5.0, 7.0], [1.0, 3.0, 5.0, 7.0]]], dtype=torch.float64)
    one, three = torch.ones(2, dtype=torch.float64), torch.tensor([4.0, 4.0], dtype=torch.float64)
    batch_weight = torch.tensor([1.0, -1.0], dtype=torch.float64)
    batch_bias = torch.tensor([0.0, 3.0], dtype=torch.float64)
    weight, bias = torch.tensor([1.25**0.5]).double(), torch.tensor([10.0]).double()
    y = batch_channel_norm(x, 1, one, three, batch_weight, batch_bias, weight, bias, eps=0.0)
    torch.testing.assert_close(y[0, 0], torch.tensor([8.5, 9.5, 10.5, 11.5]).double())
    torch.testing.assert_close(y[0, 1], torch.tensor([11.5, 10.5, 9.5, 8.5]).double())


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 12, 1, 1), (3, 12, 9), (2, 12, 2, 3, 3), (4, 12)])
def test_is_torchs_batch_norm_in_evaluation_and_its_group_norm(shape: tuple[int, ...]) -> None:
    x = offset_input(*shape)
    mean, batch_weight, batch_bias, weight, bias = torch.randn(5, 12, dtype=torch.float64)
    var = torch.rand(12, dtype=torch.float64) + 0.5
    z = F.batch_norm(x, mean, var, batch_weight, batch_bias, eps=1e-3)
    expected = F.group_norm(z, 3, weight, bias, 1e-3)
    got = batch_channel_norm(x, 3, mean, var, batch_weight, batch_bias, weight, bias, eps=1e-3)
    torch.testing.assert_close(got, expected)


def test_a_scale_of_a_group_is_that_of_each_of_its_channels() -> None:
    x, mean, var = offset_input(2, 6, 5, 7), torch.zeros(6).double(), torch.ones(6).double()
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    by_channel = [v.repeat_interleave(2) for v in (weight, bias)]
    torch.testing.assert_close(
        batch_channel_norm(x, 3, mean, var, None, None, weight, bias),
        batch_channel_norm(x, 3, mean, var, None, None, *by_channel),
    )


# Estimated statistics


def published_update(mean: Tensor, var: Tensor, x: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """As the released code orders it: both moments of the batch around 0 and around the old mean, then the averages."""
    x_cs = x.transpose(0, 1).flatten(1)
    batch_mean = x_cs.mean(1)
    batch_var = ((x_cs - mean[:, None]) ** 2).mean(1)
    return (1 - rate) * mean + rate * batch_mean, (1 - rate) * var + rate * batch_var


def test_statistics_are_updated_in_the_published_order_and_before_they_are_used() -> None:
    layer = layer_with_random_parameters(rate=0.3, warm_start=False)
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for _ in range(4):
        x = offset_input(2, 6, 5, 7)
        mean, var = published_update(mean, var, x, 0.3)
        y = layer(x)
        torch.testing.assert_close(layer.bn.running_mean, mean)
        torch.testing.assert_close(layer.bn.running_var, var)
        z = F.batch_norm(x, mean, var, layer.bn.weight, layer.bn.bias)
        parameters = (p.repeat_interleave(2) for p in (layer.weight, layer.bias))
        torch.testing.assert_close(y, F.group_norm(z, 3, *parameters))
    assert layer.bn.num_batches_tracked == 4


def test_evaluation_is_training_without_the_update() -> None:
    layer, x = layer_with_random_parameters(), offset_input(2, 6, 5, 7)
    y = layer(x)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), y, rtol=0, atol=0)
    layer(offset_input(2, 6, 5, 7))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_no_gradient_flows_through_the_estimates() -> None:
    layer, x = layer_with_random_parameters(), offset_input(2, 6, 5, 7).requires_grad_()
    g = torch.randn(x.shape, dtype=torch.float64)
    layer(x).backward(g)
    got, x.grad = x.grad, None
    layer.eval()(x).backward(g)  # the same estimates, which are constants there
    torch.testing.assert_close(got, x.grad, rtol=0, atol=0)


def test_the_first_update_leaves_next_to_nothing_of_the_initial_values() -> None:
    x = offset_input(2, 6, 5, 7) + 1000
    layer = BatchChannelNorm2d(6, 3, rate=1e-3).double()
    layer(x)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(layer.bn.running_mean, mean * 70 / 71, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.bn.running_var, (var * 70 + 1) / 71, rtol=1e-13, atol=1e-13)


def test_the_warm_start_averages_the_first_batches_alike() -> None:
    layer, total = BatchChannelNorm2d(6, 3, rate=1e-3).double(), torch.zeros(6).double()
    for _ in range(20):
        x = offset_input(2, 6, 5, 7)
        layer(x)
        total += x.mean((0, 2, 3))
    # The initial mean 0 counts as one value of the 70 in a batch's channel.
    torch.testing.assert_close(layer.bn.running_mean, total / (20 + 1 / 70), rtol=1e-13, atol=1e-13)


def test_the_warm_start_ends_where_the_rate_is_larger() -> None:
    layer = BatchChannelNorm2d(6, 3, rate=0.25).double()
    for step in range(6):
        before, x = layer.bn.running_mean.clone(), offset_input(2, 6, 5, 7)
        layer(x)
        rate = max(0.25, 1 / (step + 1 + 1 / 70))
        torch.testing.assert_close(
            layer.bn.running_mean, before + rate * (x.mean((0, 2, 3)) - before), rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize("images", [1, 8, 256])
def test_the_default_rate_halves_a_batch_after_200_images(images: int) -> None:
    layer = BatchChannelNorm2d(2, 1).double()
    layer.bn.num_batches_tracked.fill_(10_000)
    layer.bn.running_mean.fill_(1.0)
    x = torch.randn(images, 2, 3, 3, dtype=torch.float64)
    layer(x)
    rate = 1 - 0.5 ** (images / 200)
    torch.testing.assert_close(layer.bn.running_mean, 1 - rate + rate * x.mean((0, 2, 3)))
    # One batch of 8 reaches as far as 8 batches of 1.
    assert math.isclose((1 - 0.5 ** (8 / 200)), 1 - (0.5 ** (1 / 200)) ** 8)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 6, 3, 3)])
def test_the_first_step_takes_one_value_and_a_constant(shape: tuple[int, ...]) -> None:
    layer = BatchChannelNorm2d(6, 3)
    x = torch.full(shape, 5.0, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    # One value in each channel is not erased, as it would be if the first batch became its own estimate.
    assert (BatchChannelNorm2d(6, 3)(torch.arange(6.0).reshape(1, 6, 1, 1)).abs() > 0.9).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])  # the second keeps the statistics for backward
def test_a_second_batch_may_come_before_the_backward_of_the_first(dtype: torch.dtype) -> None:
    layer = layer_with_random_parameters().to(dtype)
    again = copy.deepcopy(layer)
    a, b = (offset_input(2, 6, 5, 7).to(dtype).requires_grad_() for _ in range(2))
    g = torch.randn(a.shape).to(dtype)
    layer(a).backward(g)
    expected, a.grad = a.grad, None
    first = again(a)
    again(b)
    first.backward(g)
    torch.testing.assert_close(a.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", ["estimate", "batch"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient_and_one_update(statistics: str, reentrant: bool) -> None:
    x = offset_input(2, 6, 5, 7).requires_grad_()
    layer = layer_with_random_parameters(statistics=statistics)
    again = copy.deepcopy(layer)
    g = torch.randn(x.shape, dtype=torch.float64)
    layer(x).backward(g)
    expected, x.grad = x.grad, None
    checkpoint(again, x, use_reentrant=reentrant).backward(g)
    torch.testing.assert_close(x.grad, expected)
    if statistics == "estimate":  # with "batch" it is torch's BatchNorm, which updates again
        torch.testing.assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("statistics", ["estimate", "batch"])
def test_training_compiles_to_one_graph_with_the_same_updates(statistics: str) -> None:
    layer = layer_with_random_parameters(statistics=statistics)
    again = copy.deepcopy(layer)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    for n in (2, 3, 5):
        x = offset_input(n, 6, 5, 7).requires_grad_()
        y, z = layer(x), compiled(x)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(torch.autograd.grad(z.square().sum(), x), torch.autograd.grad(y.square().sum(), x))
    torch.testing.assert_close(again.state_dict(), layer.state_dict())


def test_several_networks_train_under_vmap() -> None:
    layers = [layer_with_random_parameters() for _ in range(3)]
    values, buffers = torch.func.stack_module_state(layers)
    x = torch.stack([offset_input(2, 6, 5, 7) for _ in layers])
    base = copy.deepcopy(layers[0])
    got = torch.func.vmap(lambda v, b, x: torch.func.functional_call(base, (v, b), (x,)))(values, buffers, x)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(got[i], layer(x[i]))
        torch.testing.assert_close(buffers["bn.running_var"][i], layer.bn.running_var)


def test_half_precision_keeps_its_input_alone_and_float32_statistics() -> None:
    x = (torch.randn(2, 8, 9, 9) + 30).bfloat16().requires_grad_()
    layer = BatchChannelNorm2d(8, 4)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors() as kept:
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.bn.running_mean.dtype == torch.float32
    assert_error_within(layer.bn.running_mean, x.double().mean((0, 2, 3)) * 162 / 163, 1e-4)
    large = {(t.data_ptr(), t.dtype) for t in kept if t.numel() >= x.numel()}
    assert large == {(x.data_ptr(), torch.bfloat16)}


# Statistics of the batch


def test_batch_statistics_are_torchs_batch_norm_and_group_norm() -> None:
    layer = layer_with_random_parameters(statistics="batch", rate=0.2)
    theirs = nn.BatchNorm2d(6, momentum=0.2, dtype=torch.float64)
    theirs.load_state_dict(layer.bn.state_dict(), strict=True)
    for training in (True, True, False):
        layer.train(training)
        theirs.train(training)
        x = offset_input(2, 6, 5, 7).requires_grad_()
        parameters = (p.repeat_interleave(2) for p in (layer.weight, layer.bias))
        y, expected = layer(x), F.group_norm(theirs(x), 3, *parameters)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
        )
    torch.testing.assert_close(layer.bn.state_dict(), theirs.state_dict())


# Parameters, schemes and refusals


@pytest.mark.parametrize(("channel_affine", "scales"), [("group", 4), ("channel", 12)])
def test_which_scales_there_are(channel_affine: str, scales: int) -> None:
    layer = BatchChannelNorm2d(12, 4, channel_affine=channel_affine)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"weight": (scales,), "bias": (scales,), "bn.weight": (12,), "bn.bias": (12,)}
    assert not list(BatchChannelNorm2d(12, 4, affine=False, channel_affine=channel_affine).parameters())


def test_names_in_the_state_dict_are_those_of_batch_norm_inside() -> None:
    inside = {f"bn.{name}" for name in nn.BatchNorm2d(6).state_dict()}
    for statistics in ("estimate", "batch"):
        assert set(BatchChannelNorm2d(6, 3, statistics=statistics).state_dict()) == {"weight", "bias", *inside}


def test_the_last_norm_of_a_branch_starts_at_0_by_the_scale_of_its_groups() -> None:
    norm = Pieces(anybatch.scheme("bcn:4"), zero_init_residual=True).norm(12, last_in_branch=True)
    assert not norm.weight.any()
    assert (norm.bn.weight == 1).all()
    assert not norm(torch.randn(2, 12, 5, 7)).any()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_options_of_the_part_reach_the_layers(dims: int) -> None:
    spec = "bcn(groups=4,statistics=batch,rate=0.2,channel_affine=channel,eps=0.001)"
    layer = Pieces(anybatch.scheme(spec), dims=dims).norm(12)
    assert type(layer) is (BatchChannelNorm1d, BatchChannelNorm2d, BatchChannelNorm3d)[dims - 1]
    assert (layer.num_groups, layer.statistics, layer.channel_affine, layer.eps) == (4, "batch", "channel", 1e-3)
    assert (layer.bn.momentum, layer.bn.eps) == (0.2, 1e-3)
    assert Pieces(anybatch.scheme("bcn/4")).norm(12).num_groups == 3
    assert not anybatch.scheme(spec).batch_independent


def test_the_channel_part_normalizes_each_sample_over_its_groups() -> None:
    layer, x = BatchChannelNorm2d(6, 3).double(), offset_input(4, 6, 5, 7)
    y = layer(x)
    torch.testing.assert_close(y.unflatten(1, (3, 2)).mean((2, 3, 4)), torch.zeros(4, 3).double())
    z = (x - layer.bn.running_mean.reshape(1, 6, 1, 1)) / (layer.bn.running_var.reshape(1, 6, 1, 1) + 1e-5).sqrt()
    torch.testing.assert_close(y, group_norm(z, 3))


@pytest.mark.parametrize("statistics", ["estimate", "batch"])
@pytest.mark.parametrize("x", [torch.ones(2, 6, 1, 1), torch.ones(2, 6, 3, 3, dtype=torch.uint8)], ids=["1x1", "uint8"])
def test_what_is_refused_does_not_enter_the_statistics(x: torch.Tensor, statistics: str) -> None:
    layer = BatchChannelNorm2d(6, 6, statistics=statistics)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((ValueError, TypeError), match=r"leaves one value in each group|must be floating point"):
        layer(x)
    for name, values in layer.state_dict().items():
        torch.testing.assert_close(values, before[name], rtol=0, atol=0)


def test_maps_without_positions_do_not_enter_the_estimates() -> None:
    layer = BatchChannelNorm2d(6, 3)
    layer.bn(torch.ones(2, 6, 0, 3))
    assert layer.bn.running_var.eq(1).all()
    assert layer.bn.num_batches_tracked == 0


def test_parameters_and_estimates_are_reset_behind_the_meta_device() -> None:
    layer = BatchChannelNorm2d(6, 3, device="meta").to_empty(device="cpu")
    for module in layer.modules():
        module.reset_parameters()
    for name, values in BatchChannelNorm2d(6, 3).state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchChannelNorm2d(48), "groups=32 does not divide 48 channels"),
        (lambda: BatchChannelNorm2d(6, 3, statistics="both"), "statistics='both' is neither 'estimate' nor 'batch'"),
        (lambda: BatchChannelNorm2d(6, 3, channel_affine="all"), "channel_affine='all' is neither 'group' nor"),
        (lambda: BatchChannelNorm2d(6, 3, rate=2.0), "rate=2.0 is not a number from 0 to 1"),
        (lambda: anybatch.scheme("bcn(rate=-1)"), "rate=-1 is not a number from 0 to 1"),
        (lambda: anybatch.scheme("bcn(statistics=none)"), "statistics='none' is neither"),
        (lambda: anybatch.scheme("bcn:0"), "groups=0 is neither a number above 0 nor 'auto'"),
        (lambda: BatchChannelNorm2d(6, 6)(torch.zeros(2, 6, 1, 1)), "leaves one value in each group"),
        (lambda: BatchChannelNorm2d(6, 6)(torch.zeros(2, 6, 3)[None, None]), "takes .* with 2 spatial dimensions"),
        (lambda: BatchChannelNorm2d(6, 3)(torch.zeros(2, 5, 3, 3)), "is made for 6 channels, got x of shape"),
        (
            lambda: BatchChannelNorm2d(6, 3, statistics="batch")(torch.zeros(1, 6, 1, 1)),
            r"needs two values or more in each channel in training, got x of shape \(1, 6, 1, 1\)",
        ),
        (
            lambda: batch_channel_norm(torch.zeros(2, 5, 3), 1, torch.zeros(6), torch.ones(6)),
            r"mean is of 6 channels, x of shape \(2, 5, 3\) has 5",
        ),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_op_takes_its_arguments_by_name_and_statistics_that_broadcast() -> None:
    x, mean, var = torch.randn(2, 4, 3, 3), torch.randn(4), torch.rand(4) + 0.5
    expected = batch_channel_norm.reference(x, 2, mean, var)
    torch.testing.assert_close(batch_channel_norm(x, 2, mean=mean, var=var), expected)
    torch.testing.assert_close(batch_channel_norm(x, 2, mean.view(1, 4, 1, 1), var.view(1, 4, 1, 1)), expected)
