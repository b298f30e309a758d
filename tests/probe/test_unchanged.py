"""A model is after a probe what it was before, also where the probe failed."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import anybatch
from anybatch import probe
from anybatch.convert import freeze_batchnorm
from probe.models import PROBES, Fails, assert_unchanged, small, state


def _used(model: nn.Module) -> nn.Module:
    """With gradients, a user's hooks, a frozen parameter and some modules in another mode."""
    model.train()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    next(model.parameters()).requires_grad_(False)
    list(model.modules())[-1].eval()
    model.register_forward_hook(lambda *_: None)
    list(model.children())[-1].register_full_backward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("scheme", ["bn", "ws+bcn(group_size=4)", "kn", "nf", "brn"])
def test_a_model_is_unchanged_by_a_probe(name: str, scheme: str) -> None:
    model = _used(anybatch.create_model("resnet8", scheme, num_classes=4))
    x = torch.randn(4, 3, 48, 48)
    before = state(model)
    PROBES[name](model, x)
    assert_unchanged(before, state(model))
    assert torch.equal(x, x.clone())


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("works", [0, 1])
def test_a_model_is_unchanged_by_a_probe_that_fails(name: str, works: int) -> None:
    model = Fails(10**6)
    _used(model)
    model.left[0] = works
    x = torch.randn(4, 3, 32, 32)
    before = state(model)
    with pytest.raises(ValueError, match="no more"):
        PROBES[name](model, x)
    assert_unchanged(before, state(model))


def test_whatever_happens_inside_is_put_back() -> None:
    model = _used(small(nn.BatchNorm2d, nn.Dropout(0.5)))
    before = state(model)

    def change() -> None:
        with probe.unchanged(model):
            assert all(p.grad is None for p in model.parameters())
            model.eval()
            for p in model.parameters():
                p.data.mul_(2)
                p.requires_grad_(True)
            model(torch.randn(2, 3, 8, 8)).sum().backward()
            model[1].running_mean = torch.ones(8)
            model[1].register_buffer("more", torch.ones(1))
            model[2] = nn.GELU()
            model.register_forward_pre_hook(lambda *_: None)
            random.random()
            np.random.rand()
            raise KeyError("left by an exception")

    with pytest.raises(KeyError, match="left by"):
        change()
    assert_unchanged(before, state(model))


def test_cuda_starts_from_the_seed_it_would_have_started_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    seeds: list[int] = []
    torch.manual_seed(17)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with probe.unchanged(nn.Linear(2, 2)):
        torch.manual_seed(3)
    assert seeds == [3, 17]


def test_a_model_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
        probe.smoothness(model, torch.randn(2, 2))


def test_frozen_batchnorm_stays_frozen() -> None:
    model = anybatch.create_model("resnet8", "bn", num_classes=4).train()
    freeze_batchnorm(model)
    x = torch.randn(4, 3, 32, 32)
    before = state(model)
    found = probe.batch_dependence(model, x)
    assert not found.mixes_in_training
    assert_unchanged(before, state(model))


def test_models_that_cannot_be_put_back_are_refused() -> None:
    with warnings.catch_warnings(action="ignore"):  # of its end
        scripted = torch.jit.trace(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="scripted"):
        probe.batch_dependence(scripted, torch.randn(2, 3, 8, 8))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="run the model on one batch first"):
        probe.batch_dependence(nn.LazyConv2d(4, 3), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("name", PROBES)
def test_inputs_that_no_probe_takes_are_refused(name: str) -> None:
    run, model = PROBES[name], small(nn.BatchNorm2d)
    with pytest.raises(TypeError, match="x must be a tensor"):
        run(model, {"x": torch.randn(2, 3, 8, 8)})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        run(lambda x: x, torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="differ in shape"):
        run(model, [torch.randn(3, 8, 8), torch.randn(3, 9, 8)])
    with pytest.raises(ValueError, match="not finite"):
        run(model, torch.full((4, 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match=r"fails on x of shape \(\d, 5, 32, 32\)"):
        run(model, torch.randn(4, 5, 32, 32))
