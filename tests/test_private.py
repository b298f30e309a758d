"""Private runs: each image's gradient, what a step adds up, the account, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anybatch import create_model, data, driver, private, recipes, rows, train
from anybatch.checkpoint import load_model
from anybatch.recipe import Recipe
from anybatch.step import training_loss
from helpers import assert_error_within, assert_same_gradients

needs_opacus = pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="opacus is not installed")

NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "knresnet13": ("knresnet13", "kn(p=0)", {"width": 8, "act": "mish"}),
    "resnet8_kn": ("resnet8_kn", "kn(p=0)", {"width": 8}),
    "densenet20x16_kn": ("densenet20x16_kn", "kn(p=0)", {"growth": 4}),
    "knresnet18": ("knresnet18", "kn(p=0)", {"width": 8, "stem": "cifar"}),
    "ws+gn": ("resnet8", "ws+gn:auto", {"width": 8}),
    "gn": ("resnet8", "gn:auto", {"width": 8}),
    "ln": ("preact_resnet8", "ln", {"width": 8}),
    "nf": ("nf_regnet_b0", "nf(skip_gain=1)", {"drop_rate": 0.0, "drop_path_rate": 0.0}),
    "sws+skipinit": ("resnet8", "sws+skipinit(gain=1)", {"width": 8}),
    "fixup": ("resnet8", "fixup", {"width": 8}),
    "pn": ("resnet8", "pn", {"width": 8}),
}


def batch(n: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64) + 1
    return x, torch.randint(0, 10, (n,), generator=generator)


def network(case: str) -> nn.Module:
    name, scheme, options = NETWORKS[case]
    torch.manual_seed(0)
    model = create_model(name, scheme=scheme, num_classes=10, **options).double()
    with torch.no_grad():
        for p in model.parameters():  # no gradient is 0 because something starts at 0
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("case", NETWORKS)
def test_gradients_are_those_of_each_sample_alone(case: str) -> None:
    model = network(case).train()
    x, y = batch(2, 32 if case == "nf" else 16)
    losses, got = private.per_sample_gradients(model, x, y, label_smoothing=0.1)
    named = dict(model.named_parameters())
    for i in range(len(y)):
        loss = training_loss(model, x[i : i + 1], y[i : i + 1], label_smoothing=0.1)
        alone = torch.autograd.grad(loss, list(named.values()))
        assert losses[i].item() == pytest.approx(loss.item(), rel=1e-12)
        assert_same_gradients(
            {name: g[i] for name, g in got.items()}, dict(zip(named, alone, strict=True)), relative=1e-9
        )
    assert all(p.grad is None for p in named.values())


def test_each_sample_draws_its_own_dropout() -> None:
    torch.manual_seed(0)
    model = create_model("knresnet13", scheme="kn(p=0.2,final_p=0.5)", num_classes=10, width=8).double()
    x, y = batch(1)
    x, y = x.expand(3, -1, -1, -1), y.expand(3)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(iter(private.per_sample_gradients(model, x, y)[1].values()))

    first, second, again = drawn(5), drawn(6), drawn(5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[1], first[2])
    model.eval()
    clean = private.per_sample_gradients(model, x, y)[1]
    assert all(torch.allclose(g[0], g[1], rtol=1e-9) for g in clean.values())


def test_no_samples_have_no_gradients() -> None:
    model = network("gn")
    losses, got = private.per_sample_gradients(model, torch.zeros(0, 3, 8, 8).double(), torch.zeros(0).long())
    assert losses.shape == (0,)
    assert {name: g.shape for name, g in got.items()} == {
        name: torch.Size([0, *p.shape]) for name, p in model.named_parameters()
    }


def test_parameters_that_are_not_trained_have_no_gradients() -> None:
    model = network("gn")
    frozen = next(name for name, _ in model.named_parameters())
    model.get_parameter(frozen).requires_grad_(False)
    assert frozen not in private.per_sample_gradients(model, *batch(1))[1]


# Runs.


def tiny(**changes: object) -> Recipe:
    """Two epochs of 4 steps of 16 digits on average, 8 at a time."""
    plain: dict[str, object] = {
        "data.batch_size": 8,
        "data.accumulate": 2,
        "model.options.width": 16,
        "model.scheme": "ws+gn:auto",
        "optim.momentum": 0,
        "optim.lr_scaling": "none",
        "train.accelerator": "cpu",
        "privacy.epsilon": 5,
        "privacy.delta": 1e-3,
        "privacy.seeded": True,
    }
    return recipes.quick(recipes.digits()).replace(
        {**plain, **{name.replace("__", "."): value for name, value in changes.items()}}
    )


@needs_opacus
@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_row_has_what_opacus_accounts_for(accountant: str, tmp_path: Path) -> None:
    from opacus.accountants import create_accountant

    row = train.run_in(tiny(privacy__accountant=accountant), tmp_path / "run")
    spent = row.get("privacy")
    assert spent is not None
    account = create_accountant(accountant)
    told = []
    for _ in range(8):
        account.step(noise_multiplier=spent["noise_multiplier"], sample_rate=0.25)
        told.append(account.get_epsilon(1e-3))
    assert (spent["sample_rate"], spent["steps"], spent["delta"]) == (0.25, 8, 1e-3)
    assert spent["epsilon"] == pytest.approx(told[7], rel=1e-9)
    assert 4.99 <= spent["epsilon"] <= 5
    assert [point.get("epsilon") for point in row["curve"]] == pytest.approx([told[3], told[7]], rel=1e-9)
    table = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert table[0].endswith(",epsilon")
    assert float(table[-1].rpartition(",")[2]) == spent["epsilon"]
    assert load_model(tmp_path / "run")[1].epsilon == spent["epsilon"]
    assert rows.read(tmp_path / "run" / "rows.jsonl") == [row]
    json.dumps(row, allow_nan=False)


def weights_after_a_step(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    train.run_in(recipe, folder)
    return {name: p.detach() for name, p in load_model(folder)[0].named_parameters()}


ONE_STEP: dict[str, object] = {
    "data__train_size": 32,
    "data__accumulate": 4,  # all 32 images: each is drawn with probability 1
    "schedule__epochs": 1,
    "schedule__warmup": 0,
    "schedule__name": "constant",
    "optim__lr": 0.5,
    "optim__weight_decay": 0,
    "train__precision": "64-true",
}


@needs_opacus
def test_without_noise_a_step_follows_the_mean_of_clipped_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 0.0)
    monkeypatch.setattr(private, "epsilon_spent", lambda *_: 0.0)
    from anybatch import data

    recipe = tiny(**ONE_STEP)
    split = data.load(recipe.data)
    torch.manual_seed(recipe.train.seed)
    model = recipe.model.build(num_classes=10, in_chans=1).double()
    named = dict(model.named_parameters())
    x, y = split.train.__getitems__(range(32))
    each = []
    for i in range(32):
        loss = training_loss(model, x[i : i + 1].double(), y[i : i + 1])
        each.append(torch.autograd.grad(loss, list(named.values())))
    norms = [math.sqrt(sum(g.square().sum().item() for g in gradients)) for gradients in each]
    bound = sorted(norms)[16]  # half of them are clipped
    expected = {}
    for k, (name, p) in enumerate(named.items()):
        total = sum(g[k] * min(1.0, bound / (norm + 1e-6)) for g, norm in zip(each, norms, strict=True))
        expected[name] = p.detach() - 0.5 * total / 32
    for i, changes in enumerate(({}, {"data__batch_size": 32, "data__accumulate": 1})):
        ran = tiny(**{**ONE_STEP, "privacy__max_grad_norm": bound, **changes})
        got = weights_after_a_step(ran, tmp_path / str(i))
        for name, weight in expected.items():
            assert_error_within(got[name].double(), weight, 1e-6, name)  # model files hold what the network has


@needs_opacus
def test_the_noise_is_as_large_as_the_account_presumes(tmp_path: Path) -> None:
    recipe = tiny(**ONE_STEP, privacy__max_grad_norm=1e-4)
    folder = tmp_path / "run"
    got = weights_after_a_step(recipe, folder)
    noise = rows.read(folder / "rows.jsonl")[0]["privacy"]["noise_multiplier"]
    torch.manual_seed(recipe.train.seed)
    model = recipe.model.build(num_classes=10, in_chans=1)
    moved = torch.cat([(got[name].double() - p.double()).flatten() for name, p in model.named_parameters()])
    expected = 0.5 * noise * 1e-4 / 32
    assert len(moved) > 5000
    # The images' gradients add at most max_grad_norm in all, in so many dimensions next to nothing.
    assert moved.std().item() == pytest.approx(expected, rel=0.05)
    assert abs(moved.mean().item()) < 5 * expected / len(moved) ** 0.5


@needs_opacus
def test_a_step_without_images_is_noise_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = private.PoissonSampler.__iter__

    def with_an_empty_one(self: private.PoissonSampler) -> Any:
        yield []
        yield from list(iterate(self))[1:]

    monkeypatch.setattr(private.PoissonSampler, "__iter__", with_an_empty_one)
    row = train.run(tiny())
    assert row["status"] == "ok"
    assert row["privacy"]["steps"] == 8
    assert row["curve"][0]["samples"] < row["curve"][1]["samples"]


@needs_opacus
@pytest.mark.parametrize(
    "changes", [{}, {"train__ema": 0.5}, {"optim__name": "adamw", "optim__lr": 0.01}], ids=["sgd", "ema", "adamw"]
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(schedule__epochs=3, privacy__epsilon=1, **changes)  # of much noise the account is quick
    uninterrupted = train.run(recipe)
    step = private.PrivateRun.training_step

    def stops(self: private.PrivateRun, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.private_steps == 10:  # within the third epoch
            raise InterruptedError
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(private.PrivateRun, "training_step", stops)
        with pytest.raises(InterruptedError):
            train.run_in(recipe, tmp_path / "run")
    resumed = train.run_in(recipe, tmp_path / "run")
    assert resumed["curve"] == uninterrupted["curve"]
    assert resumed["privacy"] == uninterrupted["privacy"]
    assert resumed["privacy"]["steps"] == 12


@needs_opacus
def test_noise_is_another_each_time_unless_it_is_seeded() -> None:
    curves = [
        train.run(tiny(privacy__seeded=seeded, privacy__epsilon=1))["curve"] for seeded in (True, True, False, False)
    ]
    assert curves[0] == curves[1]
    assert curves[2] != curves[3]
    assert curves[2] != curves[0]


# Draws.


def sampler(rate: float, steps: int, *, seeded: bool, epoch: int = 0, images: int = 1000) -> private.PoissonSampler:
    order = driver.EpochSampler(range(images), 1, 0, 0)
    order.set_epoch(epoch)
    return private.PoissonSampler(order, rate, steps, seeded=seeded)


def test_every_image_has_the_same_chance_in_every_step() -> None:
    draws = list(sampler(0.1, 200, seeded=True))
    assert len(draws) == 200
    sizes = torch.tensor([float(len(draw)) for draw in draws])
    # 1,000 images: 100 a step, with a standard deviation of sqrt(90).
    assert sizes.mean().item() == pytest.approx(100, abs=5 * (90 / 200) ** 0.5)
    assert sizes.std().item() == pytest.approx(90**0.5, rel=0.25)
    times = np.bincount(np.concatenate(draws), minlength=1000)
    assert times.min() > 0
    assert times.std() == pytest.approx((200 * 0.09) ** 0.5, rel=0.15)
    assert all(len(set(draw)) == len(draw) for draw in draws)
    assert list(sampler(1.0, 1, seeded=False, images=5)) == [[0, 1, 2, 3, 4]]


def test_draws_follow_from_the_epoch_alone_where_they_are_seeded() -> None:
    first = list(sampler(0.1, 3, seeded=True))
    assert first == list(sampler(0.1, 3, seeded=True))
    assert first != list(sampler(0.1, 3, seeded=True, epoch=1))
    assert list(sampler(0.1, 3, seeded=False)) != list(sampler(0.1, 3, seeded=False))


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.sam_rho": 0.05, "data.accumulate": 1}, "does not go with optim.sam_rho=0.05: it takes two gradients"),
        ({"optim.clip_norm": 1.0}, "does not go with optim.clip_norm=1.0: privacy.max_grad_norm clips"),
        ({"data.mixup": 0.2}, "does not go with data.mixup or data.cutmix: they mix images"),
        ({"data.cutmix": 0.2}, "does not go with data.mixup or data.cutmix: they mix images"),
        ({"train.devices": 2}, "does not go with train.devices=2: it runs on one"),
        ({"train.precision": "bf16-mixed"}, "does not go with train.precision=bf16-mixed: it takes 32-true or 64-true"),
        ({"privacy.epsilon": 0}, "privacy.epsilon: input should be greater than 0, got 0"),
        ({"privacy.delta": 1.0}, "privacy.delta: input should be less than 1"),
    ],
)
def test_what_a_private_recipe_does_not_go_with(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().replace(changes)


@needs_opacus
def test_a_scheme_that_mixes_images_is_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda _: pytest.fail("the images were read"))
    with pytest.raises(ValueError, match="it mixes the images of a batch"):
        train.run(tiny().replace({"model.scheme": "bn"}))


@needs_opacus
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.scheme": "bn"}, "does not go with scheme 'bn': it mixes the images of a batch"),
        ({"model.scheme": "ws+bcn"}, "does not go with scheme .*: it mixes the images of a batch"),
        ({"model.scheme": "ws+gn:auto+agc"}, "clips the gradient of all images"),
        ({"privacy.delta": 0.02}, "privacy.delta=0.02 must be below 1 / 64 training images"),
        ({"privacy.epsilon": 1e-9}, "no noise keeps privacy.epsilon=1e-09"),
    ],
)
def test_what_cannot_be_trained_privately(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train.run_in(tiny().replace(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_opacus
def test_statistics_of_the_training_images_are_not_told(tmp_path: Path) -> None:
    file = tmp_path / "images.npz"
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(file, x=x, y=np.arange(40) % 2)
    recipe = tiny(data__name="arrays", data__root=str(file), data__train_size=None, data__val_size=None)
    recipe = recipe.replace({"data.val_fraction": 0.2, "data.accumulate": 1})
    with pytest.raises(ValueError, match=r"does not go with data.normalize=null.*take unit or symmetric"):
        train.run(recipe)
    assert train.run(recipe.replace({"data.normalize": "unit"}))["status"] == "ok"


def test_without_opacus_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package opacus: pip install 'anybatch\[dp\]'"):
        train.run(tiny())
