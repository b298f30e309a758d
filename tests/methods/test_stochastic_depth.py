"""Stochastic depth: masks by sample, parity with torchvision and timm, refusals."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torchvision

from anybatch.functional import stochastic_depth
from anybatch.layers import StochasticDepth


def test_each_sample_is_kept_whole_or_dropped_whole() -> None:
    y = stochastic_depth(torch.ones(200, 3, 4, 5), 0.3)
    kept = y.flatten(1)
    assert ((kept == 0).all(1) | (kept == 1).all(1)).all()
    assert {0.0, 1.0} == set(y.unique().tolist())


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_masks_have_the_rate_asked_for(scale_by_keep: bool) -> None:
    n, p = 40_000, 0.2
    y = stochastic_depth(torch.ones(n, 1), p, scale_by_keep=scale_by_keep)
    deviation = (p * (1 - p) / n) ** 0.5  # of the share that is kept
    assert (y > 0).double().mean().item() == pytest.approx(1 - p, abs=5 * deviation)
    assert y.max().item() == pytest.approx(1 / (1 - p) if scale_by_keep else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_seeds_give_what_torchvision_and_timm_give(dtype: torch.dtype) -> None:
    x = torch.randn(64, 3, 4, 4).to(dtype)

    def drawn(call, *args, **kwargs):
        torch.manual_seed(7)
        return call(*args, **kwargs)

    scaled = drawn(stochastic_depth, x, 0.4, scale_by_keep=True)
    torch.testing.assert_close(scaled, drawn(torchvision.ops.stochastic_depth, x, 0.4, "row"), rtol=0, atol=0)
    torch.testing.assert_close(scaled, drawn(timm.layers.drop_path, x, 0.4, True), rtol=0, atol=0)
    plain = drawn(stochastic_depth, x, 0.4)
    torch.testing.assert_close(plain, drawn(timm.layers.drop_path, x, 0.4, True, False), rtol=0, atol=0)


def test_evaluation_and_rate_0_draw_nothing_and_copy_nothing() -> None:
    x, state = torch.randn(3, 4), torch.get_rng_state()
    assert StochasticDepth(0.5).eval()(x) is x
    assert StochasticDepth(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gradient_is_masked_as_the_branch_is() -> None:
    x = torch.randn(50, 3, requires_grad=True)
    y = stochastic_depth(x, 0.5, scale_by_keep=True)
    y.sum().backward()
    kept = (y != 0).any(1)
    assert x.grad is not None
    assert set(kept.tolist()) == {True, False}
    torch.testing.assert_close(x.grad, 2.0 * kept[:, None].expand(50, 3))


def test_channels_last_stays() -> None:
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    assert stochastic_depth(x, 0.5).is_contiguous(memory_format=torch.channels_last)


def test_each_sample_draws_its_own_under_vmap() -> None:
    y = torch.func.vmap(lambda x: stochastic_depth(x[None], 0.5)[0], randomness="different")(torch.ones(200, 2))
    assert 60 < y[:, 0].sum() < 140


@pytest.mark.parametrize("p", [1.0, -0.1, 2, float("nan"), True, "0.1"])
def test_other_rates_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"p=.* is not a probability from 0 to below 1"):
        StochasticDepth(p)
    with pytest.raises(ValueError, match=r"p=.* is not a probability"):
        stochastic_depth(torch.ones(2, 2), p)
