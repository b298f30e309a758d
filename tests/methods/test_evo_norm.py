"""What is special about EvoNorm: values by hand, timm's layers, limits, running variances, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch.functional import batch_variance, evo_norm_b0, evo_norm_s0
from anybatch.layers import EvoNormB0, EvoNormS0
from anybatch.models.blocks import Pieces
from helpers import saved_tensors


def test_s0_by_hand() -> None:
    # The group holds 1, 3, 5, 7: biased variance 5, with eps 4 the root is 3. sigmoid(log 3 / x * x) = 3 / 4.
    x = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]], dtype=torch.float64)
    v = torch.log(torch.tensor([3.0], dtype=torch.float64)) / x.flatten()
    weight = torch.tensor([4.0, 4.0, 8.0, 8.0], dtype=torch.float64)
    y = evo_norm_s0(x, 1, v, weight, torch.ones(4, dtype=torch.float64), eps=4.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([2.0, 4.0, 11.0, 15.0], dtype=torch.float64))


def test_b0_by_hand() -> None:
    # 1, 7 in one sample: variance 9, with eps 16 the root is 5; the batch's 20 + 16 has 6. v x + 5 is 4, -2; 6, 12.
    x = torch.tensor([[[1.0, 7.0]]], dtype=torch.float64)
    var = torch.tensor([20.0], dtype=torch.float64)
    y = evo_norm_b0(x, var, -torch.ones(1), eps=16.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([1 / 6, 7 / 6], dtype=torch.float64))
    y = evo_norm_b0(x, var, eps=16.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([1 / 6, 7 / 12], dtype=torch.float64))


@pytest.mark.parametrize("options", [{"groups": 3}, {"group_size": 3}, {"apply_act": False}], ids=str)
def test_s0_is_timms_layer_and_loads_its_state_dict(options: dict[str, int | bool]) -> None:
    theirs_of = pytest.importorskip("timm.layers.evo_norm").EvoNorm2dS0
    theirs = theirs_of(6, **{"groups": 2, **options}, eps=1e-2)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours_options = {"num_groups": options.get("groups", 2), "group_size": options.get("group_size")}
    ours = EvoNormS0(6, eps=1e-2, apply_act=options.get("apply_act", True), **ours_options)  # pyright: ignore[reportArgumentType]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 6, 5, 7) + 0.5
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("apply_act", [True, False])
def test_b0_with_its_eps_and_unbiased_running_variance_is_timms_layer(apply_act: bool) -> None:
    theirs = pytest.importorskip("timm.layers.evo_norm").EvoNorm2dB0(6, apply_act=apply_act)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = EvoNormB0(6, 1e-3, unbiased=True, apply_act=apply_act)
    ours.load_state_dict({k: t for k, t in theirs.state_dict().items() if apply_act or k != "running_var"}, strict=True)
    for _ in range(3):
        x = 2 * torch.randn(2, 6, 5, 7) + 0.5
        torch.testing.assert_close(ours(x), theirs(x))
    if apply_act:
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_b0_averages_the_biased_variance_it_normalizes_with() -> None:
    x = 2 * torch.randn(3, 4, 5, 7, dtype=torch.float64) + 0.5
    var = x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(batch_variance(x), var)
    layer = EvoNormB0(4, momentum=0.25).double()
    torch.testing.assert_close(layer(x), evo_norm_b0(x, var))
    torch.testing.assert_close(layer.running_var, 0.75 + 0.25 * var)
    torch.testing.assert_close(layer.eval()(x), evo_norm_b0(x, 0.75 + 0.25 * var))
    torch.testing.assert_close(layer.running_var, 0.75 + 0.25 * var)
    layer.reset_parameters()
    torch.testing.assert_close(layer.running_var, torch.ones(4, dtype=torch.float64))


def test_b0_lets_a_batch_in_once_under_checkpointing() -> None:
    layer, x = EvoNormB0(4).double(), torch.randn(3, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    again = copy.deepcopy(layer)
    layer(x).sum().backward()
    checkpoint(again, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(again.running_var, layer.running_var, rtol=0, atol=0)


def test_b0_passes_gradients_through_the_statistic_of_the_batch() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = EvoNormB0(3).double()
    assert torch.autograd.gradcheck(layer, (x,))
    together, alone = (torch.autograd.grad(layer(some)[0].sum(), x)[0][0] for some in (x, x[:1]))
    assert (together - alone).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_b0_in_training_keeps_no_wide_copy_of_half_precision(dtype: torch.dtype) -> None:
    layer, x = EvoNormB0(6).to(dtype), torch.randn(2, 6, 9, 9).to(dtype).requires_grad_()
    with saved_tensors() as kept:
        y = layer(x)
    assert y.dtype == dtype
    assert not [t for t in kept if t.dtype.itemsize > 2 and t.numel() >= x.numel()]
    y.float().square().sum().backward()
    wide = x.detach().double().requires_grad_()
    EvoNormB0(6).double()(wide).square().sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0.05, atol=0.05)


def test_s0_on_large_values_is_a_relu_over_the_deviation_of_the_group() -> None:
    x_ngs = 1e6 * torch.randn(2, 3, 70, dtype=torch.float64)  # the sigmoid is 0 or 1
    y = evo_norm_s0(x_ngs.reshape(2, 6, 5, 7), 3, eps=0.0).reshape(2, 3, 70)
    torch.testing.assert_close(y, x_ngs.relu() / x_ngs.std(2, correction=0, keepdim=True))


@pytest.mark.parametrize("kind", [EvoNormS0, EvoNormB0])
def test_without_activation_only_scale_and_shift_remain(kind: type[EvoNormS0 | EvoNormB0]) -> None:
    layer, x = kind(32, apply_act=False), torch.randn(2, 32, 3, 3)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=0)
    assert set(layer.state_dict()) == {"weight", "bias"}
    nn.init.constant_(layer.weight, 2.0)  # pyright: ignore[reportArgumentType]
    nn.init.constant_(layer.bias, 1.0)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(layer(x), 2 * x + 1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="groups=4 does not divide the 6 channels of x"):
        evo_norm_s0(torch.zeros(2, 6, 3, 3), 4)
    with pytest.raises(ValueError, match=r"groups=6 leaves one value in each group of x of shape \(2, 6, 1, 1\)"):
        evo_norm_s0(torch.zeros(2, 6, 1, 1), 6)
    with pytest.raises(ValueError, match="groups=32 does not divide 48 channels; use groups='auto'"):
        EvoNormS0(48)
    for call in (EvoNormB0(6), batch_variance):
        with pytest.raises(ValueError, match=r"x of shape \(1, 6, 1, 1\) has one value in each channel"):
            call(torch.zeros(1, 6, 1, 1))
    assert EvoNormB0(6).eval()(torch.ones(1, 6, 1, 1)).isfinite().all()
    with pytest.raises(ValueError, match="momentum=2 is not a number from 0 to 1"):
        EvoNormB0(6, momentum=2)
    for call in (lambda x: evo_norm_s0(x, 1), lambda x: evo_norm_b0(x, torch.ones(1)), batch_variance):
        with pytest.raises(ValueError, match=r"x must be \(N, C, \*\), got shape \(5,\)"):
            call(torch.zeros(5))


def test_parts() -> None:
    groups = {
        spec: Pieces(anybatch.scheme(spec)).norm_act(64)[0].num_groups
        for spec in ("evos0", "evos0:16", "evos0/8", "evos0:auto")
    }
    assert groups == {"evos0": 32, "evos0:16": 16, "evos0/8": 8, "evos0:auto": 32}
    layer = Pieces(anybatch.scheme("evob0(momentum=0.3, eps=0.5)")).norm_act(64)[0]
    assert (layer.momentum, layer.eps, layer.apply_act) == (0.3, 0.5, True)
    assert not Pieces(anybatch.scheme("evob0")).norm(64).apply_act
    assert not anybatch.scheme("evob0").batch_independent
    assert anybatch.scheme("evos0").batch_independent
    with pytest.raises(ValueError, match="groups='many' is neither a number above 0 nor 'auto'"):
        anybatch.scheme("evos0:many")
