"""Sharpness-aware minimization: by hand on a quadratic, its two forms, schedulers, copies, refusals."""

from __future__ import annotations

import copy
import pickle
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from anybatch import driver, train
from anybatch.optim import AGC, SAM, adaptive_clip_grad_, attach_agc, make_optimizer
from anybatch.recipe import Recipe
from test_train import tiny


def quadratic(w: Tensor) -> Tensor:
    """``0.5 * (4 w0² + w1²)``, with gradient (4 w0, w1)."""
    return 0.5 * (4 * w[0].square() + w[1].square())


def step(optimizer: SAM, w: nn.Parameter) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(w)
        loss.backward()
        return loss

    return optimizer.step(closure)


def test_by_hand() -> None:
    w = nn.Parameter(torch.tensor([0.75, 4.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    # The gradient (3, 4) has norm 5, so the worst place is (0.75 + 0.3, 4 + 0.4), with the gradient (4.2, 4.4).
    loss = step(optimizer, w)
    assert loss.item() == pytest.approx(0.5 * (4 * 0.75**2 + 16))
    torch.testing.assert_close(w.detach(), torch.tensor([0.75 - 0.42, 4 - 0.44], dtype=torch.float64))


def test_adaptive_by_hand() -> None:
    w = nn.Parameter(torch.tensor([1.0, 3.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5, adaptive=True)
    # w * g = (4, 9); e = 0.5 * (1 * 4, 9 * 3) / sqrt(97)
    e = 0.5 * torch.tensor([4.0, 27.0], dtype=torch.float64) / 97**0.5
    expected = torch.tensor([1.0, 3.0]) - 0.1 * torch.tensor([4.0, 1.0]) * (torch.tensor([1.0, 3.0]) + e)
    step(optimizer, w)
    torch.testing.assert_close(w.detach(), expected)


def test_the_norm_is_taken_over_all_parameters() -> None:
    split = [nn.Parameter(torch.tensor([0.75])), nn.Parameter(torch.tensor([4.0]))]
    optimizer = SAM(torch.optim.SGD([{"params": split[:1]}, {"params": split[1:], "lr": 0.2}], lr=0.1), rho=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(torch.cat(split))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert [p.item() for p in split] == pytest.approx([0.75 - 0.42, 4 - 0.88])


def test_by_hand_and_by_closure_are_the_same_with_momentum() -> None:
    found = []
    for by_hand in (True, False):
        w = nn.Parameter(torch.tensor([0.7, 0.2]))
        optimizer = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9))
        for _ in range(3):
            if by_hand:
                optimizer.zero_grad()
                quadratic(w).backward()
                optimizer.first_step()
                assert optimizer.perturbed
                optimizer.zero_grad()
                quadratic(w).backward()
                optimizer.second_step()
                assert not optimizer.perturbed
            else:
                step(optimizer, w)
        found.append(w.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_weights_come_back_to_the_bit() -> None:
    w = nn.Parameter(torch.tensor([1e4, 1e-4]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.3)
    step(optimizer, w)
    assert w.tolist() == torch.tensor([1e4, 1e-4]).tolist()


def test_weights_come_back_when_the_second_evaluation_fails() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        loss = quadratic(w)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert w.tolist() == [1.0, 2.0]
    assert not optimizer.perturbed


def test_schedulers_checkpoints_and_copies_see_the_base() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    base = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    optimizer = SAM(base, 0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(optimizer, w)
    schedule.step()
    assert base.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close(optimizer.state_dict(), base.state_dict())
    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other, again = duplicate((w, optimizer))
        assert (again.rho, again.adaptive, again.perturbed) == (0.2, False, False)
        step(again, other)
        reference = nn.Parameter(w.detach().clone())
        loaded = SAM(torch.optim.SGD([reference], lr=9.0, momentum=0.9), 0.2)
        loaded.load_state_dict(optimizer.state_dict())
        step(loaded, reference)
        torch.testing.assert_close(other, reference, rtol=0, atol=0)


def test_refusals() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(ValueError, match=r"give step\(\) a closure .* or call first_step\(\) and second_step\(\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"no parameter has a gradient; call first_step\(\) after backward"):
        optimizer.first_step()
    with pytest.raises(ValueError, match=r"second_step\(\) comes after first_step\(\)"):
        optimizer.second_step()
    quadratic(w).backward()
    optimizer.first_step()
    with pytest.raises(ValueError, match=r"first_step\(\) was called twice"):
        optimizer.first_step()
    for rho in (0, -1.0, float("nan"), True):
        with pytest.raises(ValueError, match=r"rho=.* is not a finite number above 0"):
            SAM(torch.optim.SGD([w], lr=0.1), rho)
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got"):
        SAM([w])  # pyright: ignore[reportArgumentType]


# In recipes.


def test_clipping_belongs_inside() -> None:
    model = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for clip in (AGC, attach_agc):
        with pytest.raises(ValueError, match=r"around SAM .* clip inside of it: SAM\(AGC\(optimizer, model\)\)"):
            clip(SAM(sgd), model, exclude="none")
    optimizer = SAM(AGC(sgd, model, 1e-3, exclude="none"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    optimizer.step(closure)
    # By the learning rate times the threshold, which follows the weights at the worst place.
    assert (model.weight - before).norm(dim=1).tolist() == pytest.approx((1e-4 * before.norm(dim=1)).tolist(), rel=0.1)


def test_a_recipe_asks_for_it() -> None:
    recipe = Recipe().replace({"optim.sam_rho": 0.1})
    optimizer = make_optimizer(nn.Linear(2, 2), recipe)
    assert isinstance(optimizer, SAM)
    assert optimizer.rho == 0.1
    assert not isinstance(make_optimizer(nn.Linear(2, 2), Recipe()), SAM)


def test_recipes_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^recipe: optim\.sam_rho needs both .* data\.accumulate=2"):
        Recipe().replace({"optim.sam_rho": 0.1, "data.accumulate": 2})
    with pytest.raises(ValueError, match=r"^recipe: optim\.sam_rho does not go with train\.precision=16-mixed"):
        Recipe().replace({"optim.sam_rho": 0.1, "train.precision": "16-mixed"})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_counts_each_image_once_and_differs_from_a_plain_one(precision: str) -> None:
    plain = train.run(tiny(train__precision=precision))
    row = train.run(tiny(optim__sam_rho=0.05, train__precision=precision))
    assert row["status"] == "ok"
    assert [point["samples"] for point in row["curve"]] == [64, 128]
    assert row["curve"][0]["train_loss"] != plain["curve"][0]["train_loss"]
    weights = 4 * row["parameters"]
    assert row["peak_memory"] - plain["peak_memory"] == pytest.approx(weights, abs=64)


def test_a_run_takes_the_steps_of_a_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """With clipping, which acts on the second gradient alone."""
    seen: list[tuple[Tensor, Tensor]] = []
    models: list[nn.Module] = []
    original = driver.training_loss

    def spy(call: MethodType, x: Tensor, y: Tensor, **options: float) -> Tensor:
        if not models:
            models.extend([call.__self__, copy.deepcopy(call.__self__)])
        if not seen or seen[-1][0] is not x:
            seen.append((x, y))
        return original(call, x, y, **options)

    monkeypatch.setattr(driver, "training_loss", spy)
    recipe = tiny(optim__sam_rho=0.05, model__scheme="ws+gn+agc(clip_factor=0.1)", schedule__name="constant")
    recipe = recipe.replace({"schedule.warmup": 0, "schedule.epochs": 1})
    train.run(recipe)
    trained, model = models
    optimizer = make_optimizer(model, recipe)
    assert isinstance(optimizer, SAM)
    for x, y in seen:
        optimizer.zero_grad()
        original(model, x, y).backward()
        optimizer.first_step()
        optimizer.zero_grad()
        original(model, x, y).backward()
        adaptive_clip_grad_(model, 0.1, exclude=["fc"])
        optimizer.second_step()
    assert len(seen) == 8
    torch.testing.assert_close(dict(trained.named_parameters()), dict(model.named_parameters()), rtol=1e-5, atol=1e-6)
