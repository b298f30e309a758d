"""Published recipes have the published settings, and their quick twins train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from anybatch import catalogue, data, models, recipes, train
from anybatch.data import Mix
from anybatch.optim import lr_factor
from anybatch.recipe import Recipe, Schedule

PUBLISHED = [name for name in recipes.RECIPES if name.startswith(("gn-", "ws-", "bit-", "kn-", "nf", "dp-"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of photos of 40 x 48 pixels, light and dark: 64 to train on and 64 to evaluate on."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for label in (0, 1):
            place = root / part / "ab"[label]
            place.mkdir(parents=True)
            for i in range(32):
                pixels = torch.randint(100 * label, 100 * label + 120, (40, 48, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{i}.png")
    return root


def at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


STEPS = {"schedule.name": "step", "schedule.factor": 0.1, "schedule.warmup": 0}
IMAGENET = {"data.name": "imagefolder", "data.size": 224, "data.crop_area": 0.08, "data.augment": ("crop", "flip")}


@pytest.mark.parametrize(
    ("name", "images", "peak", "published"),
    [
        (
            "gn-imagenet",
            256,
            0.1,
            {
                **IMAGENET,
                **STEPS,
                "model.name": "resnet50",
                "model.scheme": "gn",
                "model.options.zero_init_residual": True,
                "schedule.epochs": 100,
                "schedule.milestones": (0.3, 0.6, 0.9),
                "optim.weight_decay": 1e-4,
                "optim.decay_all": True,
                "optim.nesterov": False,
            },
        ),
        (
            "ws-bcn-imagenet",
            256,
            0.1,
            {**IMAGENET, **STEPS, "schedule.epochs": 90, "optim.weight_decay": 1e-4, "optim.decay_all": True},
        ),
        (
            "bit-finetune",
            512,
            0.003,
            {
                "optim.weight_decay": 0,
                "data.mixup": 0.1,
                "data.size": 128,
                "data.normalize": "symmetric",
                "schedule.milestones": (0.3, 0.6, 0.9),
                "schedule.factor": 0.1,
            },
        ),
        *(
            (
                name,
                batch,
                lr,
                {
                    "schedule.epochs": 150,
                    "schedule.floor": 0.01,
                    "schedule.warmup": 0,
                    "optim.weight_decay": 5e-4,
                    "optim.decay_all": True,
                    "data.normalize": "unit",
                    "data.augment": ("crop", "flip"),
                },
            )
            for name, batch, lr in (
                ("kn-cifar100-b2", 2, 0.0015625),
                ("kn-cifar100", 32, 0.05),
                ("kn-cifar100-b256", 256, 0.2),
            )
        ),
        (
            "kn-imagenet",
            256,
            0.1,
            {**IMAGENET, **STEPS, "schedule.epochs": 100, "optim.decay_all": True, "data.normalize": None},
        ),
        (
            "nf-resnet-agc",
            1024,
            0.4,
            {**IMAGENET, "schedule.epochs": 90, "schedule.warmup": 5, "optim.nesterov": True, "train.ema": None},
        ),
        (
            "nfnet-f-imagenet",
            4096,
            1.6,
            {
                "model.name": "nfnet_f0",
                "model.options.drop_rate": 0.2,
                "model.options.drop_path_rate": 0.25,
                "schedule.name": "cosine",
                "schedule.epochs": 360,
                "schedule.warmup": 5,
                "schedule.floor": 0,
                "optim.nesterov": True,
                "optim.weight_decay": 2e-5,
                "optim.decay_all": False,
                "optim.sam_rho": None,
                "train.label_smoothing": 0.1,
                "train.ema": 0.99999,
                "train.ema_warmup": True,
                "train.precision": "bf16-mixed",
                "data.mixup": 0.2,
                "data.cutmix": 1,
                "data.randaugment_layers": 4,
                "data.size": 192,
                "data.eval_size": 256,
            },
        ),
        (
            "dp-cifar10",
            4096,
            2.0,
            {
                "model.name": "knresnet13",
                "model.options.act": "mish",
                "data.name": "cifar10",
                "data.normalize": "unit",
                "optim.momentum": 0,
                "optim.weight_decay": 0,
                "schedule.name": "step",
                "schedule.epochs": 100,
                "schedule.warmup": 0,
                "schedule.milestones": (0.5, 0.75),
                "schedule.factor": 0.5,
                "privacy.epsilon": 6,
                "privacy.delta": 1e-5,
                "privacy.max_grad_norm": 1.5,
                "privacy.accountant": "rdp",
                "privacy.seeded": False,
            },
        ),
        (
            "nfnet-f-sam-imagenet",
            4096,
            1.6,
            {"model.name": "nfnet_f5", "optim.sam_rho": 0.05, "data.size": 416, "data.eval_size": 544},
        ),
    ],
)
def test_settings_are_the_published_ones(name: str, images: int, peak: float, published: dict[str, Any]) -> None:
    recipe = recipes.named(name)
    assert recipe.data.batch_size * recipe.data.accumulate * recipe.train.devices == images
    assert recipe.peak_lr == pytest.approx(peak, rel=1e-12)
    assert (recipe.optim.name, recipe.optim.momentum) == ("sgd", published.get("optim.momentum", 0.9))
    assert {path: at(recipe, path) for path in published} == published


def test_the_learning_rate_of_wsbcn_falls_after_30_and_60_epochs() -> None:
    schedule = recipes.named("ws-bcn-imagenet").schedule
    epochs = [0, 29.9, 30, 59.9, 60, 89.9]
    got = [lr_factor(schedule, round(10 * epoch), 10) for epoch in epochs]
    assert got == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)


def test_nfnets_sizes_are_those_of_the_networks() -> None:
    for name in ("nfnet-f-imagenet", "nfnet-f-sam-imagenet"):
        recipe = recipes.named(name)
        entry = models.model_entry(recipe.model.name)
        assert (recipe.data.size, recipe.data.eval_size) == (entry.train_size, entry.size)


@pytest.mark.parametrize("name", [*PUBLISHED, *(f"{name}-quick" for name in PUBLISHED)])
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = recipes.named(name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.read(tmp_path / "recipe.yaml")
    assert (again, again.id) == (recipe, recipe.id)


@pytest.mark.parametrize("name", PUBLISHED)
def test_quick_twins_train(name: str, folder: Path) -> None:
    if name.startswith("dp-"):
        pytest.importorskip("opacus", reason="private recipes take opacus")
    recipe = recipes.named(f"{name}-quick").replace(
        {"data.root": str(folder), "data.train_size": 16, "data.val_size": 16, "train.accelerator": "cpu"}
    )
    row = train.run(recipe)
    assert row["status"] == "ok"
    assert len(row["curve"]) == 2
    assert all(math.isfinite(point["train_loss"]) for point in row["curve"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_list_says_what_a_recipe_needs_and_gives(name: str) -> None:
    told = catalogue.tables(["recipes"])["recipes"][name]
    if name.startswith("kn-cifar100-"):
        assert told.startswith("As kn-cifar100")
        return
    assert "arXiv:" in told
    assert "hours are not" in told
    assert "Differs" not in told


def test_steps_of_the_learning_rate() -> None:
    schedule = Schedule(name="step", epochs=4, warmup=0, milestones=(0.25, 0.5), factor=0.5)
    assert [lr_factor(schedule, step, 2) for step in range(8)] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    warm = Schedule(name="step", epochs=4, warmup=1, milestones=(0.5,))
    assert [lr_factor(warm, step, 2) for step in range(8)] == [1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.1, 0.1]


def test_a_cosine_ends_at_its_floor() -> None:
    schedule = Schedule(epochs=2, warmup=0, floor=0.01)
    assert [lr_factor(schedule, step, 5) for step in (0, 5, 10)] == pytest.approx([1, 0.505, 0.01], rel=1e-12)


# Mixing.


def test_each_half_of_a_batch_is_mixed_in_its_way() -> None:
    torch.manual_seed(0)
    x = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 1, 16, 16).contiguous()
    got, shares = Mix(8, 0.5, 1.0)((x, torch.arange(8)))
    assert got.shape == x.shape
    assert shares.sum(1).tolist() == pytest.approx([1] * 8)
    # The mean image is the mean of the labels' images, in either way of mixing.
    assert torch.allclose(got.mean((1, 2, 3)), shares @ torch.arange(8.0), atol=1e-5)
    blended = got[:4].flatten(1)
    assert (blended == blended[:, :1]).all()
    pasted = got[4:]
    assert (pasted == pasted.round()).all()
    assert (shares[:4, 4:] == 0).all()
    assert (shares[4:, :4] == 0).all()
    assert ((shares > 0).sum(1) == 2).all()


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, None), (None, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_batches_are_mixed(batch: int, mixup: float | None, cutmix: float | None) -> None:
    x, y = Mix(3, mixup, cutmix)((torch.ones(batch, 3, 4, 4), torch.arange(batch)))
    assert x.shape == (batch, 3, 4, 4)
    assert y.sum(1).tolist() == pytest.approx([1] * batch)


def test_smoothing_goes_over_mixed_labels() -> None:
    from anybatch.step import training_loss

    shares = torch.tensor([[0.7, 0.3, 0.0]])
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    loss = training_loss(nn.Identity(), logits, shares, label_smoothing=0.1)
    assert loss.item() == pytest.approx(-((0.9 * shares + 0.1 / 3) * logits.log_softmax(1)).sum().item(), rel=1e-6)


def test_training_images_are_mixed_and_others_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybatch import driver

    seen = []
    loss = driver.training_loss
    monkeypatch.setattr(driver, "training_loss", lambda m, x, y, **kw: (seen.append(y), loss(m, x, y, **kw))[1])
    changes = {"data.root": str(folder), "data.train_size": 16, "data.mixup": 0.5, "train.accelerator": "cpu"}
    train.run(recipes.named("bit-finetune-quick").replace({**changes, "schedule.epochs": 1}))
    assert [y.shape for y in seen] == [(8, 2), (8, 2)]
    assert any(((y > 0) & (y < 1)).any() for y in seen)


# Sizes and scales of images.


@pytest.mark.parametrize("name", ["imagefolder", "cifar100"])
def test_evaluation_may_have_a_size_of_its_own(name: str, folder: Path) -> None:
    config = Recipe().replace({"data.name": name, "data.root": str(folder), "data.size": 20, "data.eval_size": 28}).data
    split = data.load(config)
    assert split.train.__getitems__([0, 1])[0].shape == (2, 3, 20, 20)
    assert split.val.__getitems__([0, 1])[0].shape == (2, 3, 28, 28)
    assert split.size == 28


@pytest.mark.parametrize(("normalize", "low", "high"), [("unit", 0, 220 / 255), ("symmetric", -1, 2 * 220 / 255 - 1)])
def test_images_on_a_fixed_scale(normalize: str, low: float, high: float, folder: Path) -> None:
    recipe = Recipe().replace({"data.name": "imagefolder", "data.root": str(folder), "data.size": 40})
    split = data.load(recipe.replace({"data.normalize": normalize}).data)
    x = split.train.__getitems__(range(64))[0]
    assert x.min().item() == pytest.approx(low, abs=0.01)
    assert x.max().item() == pytest.approx(high, abs=0.02)
    assert data.load(recipe.replace({"data.normalize": normalize}).data, statistics=(split.mean, split.std)).mean == (
        split.mean
    )


def test_a_fixed_scale_is_for_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"data\.normalize=unit is for images of whole numbers 0\.\.255; those of dig"):
        data.load(Recipe().replace({"data.normalize": "unit"}).data)


def test_crops_and_randaugment_are_as_strong_as_the_recipe_says(folder: Path) -> None:
    recipe = recipes.named("nfnet-f-imagenet-quick").replace({"data.root": str(folder)})
    crop, randaugment = data.load(recipe.data).train._each
    assert tuple(crop.scale) == (0.08, 1.0)
    assert (randaugment.num_ops, randaugment.magnitude) == (4, 15)


# Weights to start from, and their moving average.


def test_a_run_starts_from_given_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    recipe = recipes.named("digits-quick")
    source = recipe.model.build(num_classes=7, in_chans=1)
    save_file(source.state_dict(), tmp_path / "start.safetensors")
    seen: list[nn.Module] = []
    made = train.Run
    monkeypatch.setattr(
        train,
        "Run",
        lambda m, *args: (seen.append(nn.ParameterList(p.clone() for p in m.parameters())), made(m, *args))[1],
    )
    train.run(recipe.replace({"model.weights": str(tmp_path / "start.safetensors"), "train.accelerator": "cpu"}))
    started, wanted = list(seen[0].parameters()), list(source.parameters())
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(started, wanted, strict=True)]
    assert same == [True] * (len(same) - 2) + [False] * 2


def test_bit_refuses_to_start_without_its_weights(folder: Path, tmp_path: Path) -> None:
    recipe = recipes.named("bit-finetune-quick").replace({"data.root": str(folder), "model.weights": "no-such.npz"})
    with pytest.raises(ValueError, match=r"model\.weights=no-such\.npz is not a file"):
        train.run_in(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert recipes.named("bit-finetune").model.weights == "BiT-M-R50x1.npz"


def test_the_average_forgets_faster_at_first() -> None:
    average, value = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0])
    for step in (0, 1, 5):
        decay = (1 + step) / (10 + step)
        got = train.warm_average(average, value, torch.tensor(step), decay=0.99999)
        assert torch.allclose(got, decay * average + (1 - decay) * value)
    got = train.warm_average(average, value, torch.tensor(10**9), decay=0.5)
    assert torch.allclose(got, (average + value) / 2)


def test_the_average_that_warms_up_is_evaluated(tmp_path: Path) -> None:
    changes = {"train.ema": 0.99999, "schedule.epochs": 3, "train.accelerator": "cpu"}
    recipe = recipes.named("digits-quick").replace(changes)
    plain, warm = (train.run(recipe.replace({"train.ema_warmup": on})) for on in (False, True))
    # With the constant decay the weights of the first step stay; with the other the network learns.
    assert warm["curve"][-1]["val_loss"] < plain["curve"][-1]["val_loss"] - 0.1
