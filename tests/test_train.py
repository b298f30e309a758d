"""Runs: they learn, they go on after an interruption as if there had been none, and they say why they failed."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import lightning.pytorch as lightning
import pytest
import torch

from anybatch import checkpoint, data, driver, recipes, rows, step, train
from anybatch.methods import filters
from anybatch.recipe import Recipe
from anybatch.rows import Row


def tiny(**changes: object) -> Recipe:
    """Two epochs on 64 digits: under a second."""
    return recipes.quick(recipes.digits()).replace(
        {"data.batch_size": 8, "model.options.width": 32, **{k.replace("__", "."): v for k, v in changes.items()}}
    )


def test_a_run_fills_its_row():
    row = train.run(tiny())
    assert set(row) == set(Row.__annotations__) - {"privacy"}
    json.dumps(row, allow_nan=False)
    assert row["status"] == "ok"
    assert [point["epoch"] for point in row["curve"]] == [1, 2]
    assert [point["samples"] for point in row["curve"]] == [64, 128]
    assert row["error"] == row["curve"][-1]["error"]
    assert row["data"]["train_images"] == 64
    assert row["parameters"] == sum(p.numel() for p in tiny().model.build(num_classes=10, in_chans=1).parameters())
    assert row["images_per_second"] > 0


def test_the_embedded_data_is_learnt():
    row = train.run(tiny(data__train_size=256, schedule__epochs=6))
    assert row["error"] < 0.25  # chance is 0.9


def test_a_run_repeats_exactly_and_another_seed_differs():
    first, second, other = (train.run(tiny(train__seed=seed)) for seed in (0, 0, 1))
    assert first["curve"] == second["curve"]
    assert first["curve"] != other["curve"]


def test_reported_error_is_that_of_the_saved_model(tmp_path):
    row = train.run_in(tiny(), tmp_path / "run")
    model, facts = checkpoint.load_model(tmp_path / "run")
    error, loss = step.evaluate(model, data.load(tiny().data).val)
    assert error == pytest.approx(row["error"], abs=1e-9)
    assert loss == pytest.approx(row["curve"][-1]["val_loss"], rel=1e-4)
    assert facts.error == row["error"]
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "recipe.yaml",
        "metrics.csv",
        "model.json",
        "model.safetensors",
        "rows.jsonl",
    }


def test_accumulating_is_the_larger_batch_for_batch_free_schemes():
    whole = train.run(tiny(train__precision="64-true", data__batch_size=8))
    parts = train.run(tiny(train__precision="64-true", data__batch_size=2, data__accumulate=4))
    assert parts["peak_lr"] == whole["peak_lr"]
    for a, b in zip(whole["curve"], parts["curve"], strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-9)


@pytest.mark.parametrize("scheme", ["ws+gn", "kn(p=0)"])
def test_a_compiled_run_learns_what_the_eager_one_learns(scheme, monkeypatch):
    asked = []

    def traced(call, mode):
        asked.append(mode)
        return torch_compile(call, backend="aot_eager", fullgraph=True)  # in seconds, where a compiler takes a minute

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    recipe = tiny(model__scheme=scheme, data__batch_size=16)
    eager, compiled = train.run(recipe), train.run(recipe.replace({"train.compile": "reduce-overhead"}))
    assert asked == ["reduce-overhead"]
    for before, now in zip(eager["curve"], compiled["curve"], strict=True):
        assert now["train_loss"] == pytest.approx(before["train_loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["bn", "ws+gn", "ws+bcn", "kn", "nf+agc", "frn"])
def test_torch_compile_runs_every_scheme(scheme):
    torch.compiler.reset()
    row = train.run(tiny(model__scheme=scheme, data__batch_size=16, train__compile="default"))
    assert row["status"] == "ok"


def test_a_compiler_that_is_missing_is_told_in_one_line(monkeypatch):
    class MissingError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fails(*_):
        raise MissingError("no C++\ncompiler")

    monkeypatch.setattr(torch, "compile", lambda call, mode: fails)
    with pytest.raises(ValueError, match=r"train.compile=default: torch.compile failed \(no C\+\+ compiler\)"):
        train.run(tiny(train__compile="default"))


@pytest.mark.parametrize(
    "changes",
    [
        {"data__batch_size": 2, "data__accumulate": 4, "schedule__epochs": 3},
        {"train__ema": 0.9, "optim__name": "adamw", "optim__lr": 0.01},
        {"model__scheme": "ws(variant=bcn)+gn:auto", "train__channels_last": True},
        {"optim__sam_rho": 0.05},
    ],
    ids=["accumulate", "ema-adamw", "channels_last", "sam"],
)
def test_filters_are_standardized_once_a_step_and_once_an_evaluation(changes, monkeypatch):
    recipe = tiny(**{"model__scheme": "ws+gn:auto", **changes})
    times: dict[int, int] = {}
    compute = filters._computed

    def counted(layer, *args):
        times[id(layer)] = times.get(id(layer), 0) + 1
        return compute(layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(filters, "_computed", counted)
        row = train.run(recipe)
    epochs = recipe.schedule.epochs
    twice = 2 if recipe.optim.sam_rho is not None else 1  # SAM moves the weights within a step
    assert set(times.values()) == {8 * epochs * twice + epochs}
    with monkeypatch.context() as patch:
        patch.setattr(train, "reuse_filters", contextlib.nullcontext)
        expected = train.run(recipe)
    # To the last bit where torch's kernel serves, else to rounding, which training magnifies.
    relative = 1e-4 if recipe.train.channels_last else 0
    for got, wanted in zip(row["curve"], expected["curve"], strict=True):
        assert got["error"] == wanted["error"]
        assert got["val_loss"] == pytest.approx(wanted["val_loss"], rel=max(relative, 1e-5), abs=0)


class _StopError(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__ema": 0.9, "data__augment": ["crop"]},
        {"optim__name": "adamw", "optim__lr": 0.01, "data__workers": 1, "data__augment": ["crop"]},
        {"model__scheme": "bn", "train__channels_last": True, "data__accumulate": 3},
        {"train__ema": 0.9, "train__ema_warmup": True, "data__mixup": 0.2, "data__cutmix": 1.0},
    ],
    ids=["plain", "ema", "adamw-workers", "bn", "ema_warmup-mixing"],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, changes):
    recipe = tiny(schedule__epochs=3, **changes)
    uninterrupted = train.run(recipe)

    def stop(progress: driver.Progress) -> None:
        if progress.samples > progress.total * 2 // 3 + 16:  # within the third epoch
            raise _StopError

    reporter = driver.Reporter.on_train_batch_end  # told at every step, not a few times a second
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            driver.Reporter,
            "on_train_batch_end",
            lambda self, *args, **kwargs: (setattr(self, "last", 0.0), reporter(self, *args, **kwargs)),
        )
        with pytest.raises(_StopError):
            train.run_in(recipe, tmp_path / "run", tell=stop)
    assert (tmp_path / "run" / "resume.safetensors").exists()
    resumed = train.run_in(recipe, tmp_path / "run")
    assert resumed["curve"] == uninterrupted["curve"]
    assert not (tmp_path / "run" / "resume.safetensors").exists()
    assert len(rows.read(tmp_path / "run" / "rows.jsonl")) == 1
    table = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["epoch", "1", "2", "3"]


def test_a_damaged_state_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(tiny().to_yaml())
    (folder / "resume.safetensors").write_bytes(b"xx")
    with pytest.raises(ValueError, match=r"resume\.safetensors is damaged"):
        train.run_in(tiny(), folder)


def test_folders_of_other_things_are_refused(tmp_path):
    train.run_in(tiny(), tmp_path / "run")
    with pytest.raises(ValueError, match="another recipe"):
        train.run_in(tiny(train__seed=5), tmp_path / "run")
    with pytest.raises(ValueError, match="finished"):
        train.run_in(tiny(), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        train.run_in(tiny(), tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "precious"


def test_a_diverging_run_stops_and_its_row_says_so(tmp_path):
    recipe = tiny(optim__lr=1e6, model__scheme="none", optim__lr_scaling="none")
    row = train.run_in(recipe, tmp_path / "run")
    assert row["status"] == "failed"
    assert row["error"] is None
    assert "the loss became" in row["message"]
    assert rows.read(tmp_path / "run" / "rows.jsonl") == [row]


def test_a_refused_recipe_does_not_claim_the_folder(tmp_path):
    for wrong in (
        {"data__batch_size": 100},
        {"model__name": "resnet9"},
        {"optim__lr": 1e6, "optim__lr_scaling": "none"},
    ):
        recipe = tiny(**wrong, model__scheme="none")
        try:
            assert train.run_in(recipe, tmp_path / "run")["status"] == "failed"
        except ValueError:
            assert not (tmp_path / "run").exists()
    assert train.run_in(tiny(), tmp_path / "run")["status"] == "ok"


def test_a_failed_run_tells_what_it_knows():
    row = train.run(tiny(optim__lr=1e6, model__scheme="none", optim__lr_scaling="none"))
    assert row["status"] == "failed"
    assert row["data"]["train_images"] == 64
    assert row["device"]


def test_an_interrupt_reaches_the_caller(tmp_path):
    def stop(progress: driver.Progress) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.run_in(tiny(), tmp_path / "run", tell=stop)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning switches it off
    assert train.run_in(tiny(), tmp_path / "run")["status"] == "ok"


def test_every_batch_is_whole_and_seeds_see_orders_of_their_own():
    recipe = tiny(data__train_size=61, data__batch_size=4, data__accumulate=3)
    epoch = driver.Epoch.of(recipe, 61)
    assert (epoch.batches, epoch.steps, epoch.samples) == (15, 5, 60)
    assert train.run(recipe)["curve"][-1]["samples"] == 120
    sizes = []
    watched = driver.training_loss

    def watch(model, x, y, **options):
        sizes.append(len(y))
        return watched(model, x, y, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "training_loss", watch)
        train.run(recipe)
    assert set(sizes) == {4}
    orders = {}
    for seed in (0, 1):
        sampler = driver.EpochSampler(range(61), 1, 0, seed)
        for epoch_index in (0, 1):
            sampler.set_epoch(epoch_index)
            orders[seed, epoch_index] = tuple(sampler)
    assert len(set(orders.values())) == 4
    with pytest.raises(ValueError, match=r"a step takes 64 images .* more than the 61 training images"):
        driver.Epoch.of(tiny(data__batch_size=16, data__accumulate=4), 61)


def test_memory_follows_the_precision():
    whole, half = (train.run(tiny(train__precision=p))["peak_memory"] for p in ("32-true", "bf16-mixed"))
    assert half < whole


def test_evaluation_can_be_rarer_but_the_last_epoch_always_is():
    row = train.run(tiny(schedule__epochs=5, train__eval_every=2))
    assert [point["epoch"] for point in row["curve"]] == [2, 4, 5]
    assert [point["samples"] for point in row["curve"]] == [128, 256, 320]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__precision": "bf16-mixed"},
        {"train__label_smoothing": 0.1, "optim__clip_norm": 1.0},
        {"optim__nesterov": True, "schedule__name": "constant"},
        {"train__precision": "bf16-mixed", "optim__clip_norm": 1.0},
        {"data__workers": 2},
    ],
    ids=str,
)
def test_settings_run(changes):
    assert train.run(tiny(**changes))["status"] == "ok"


def test_counted_memory_by_hand():
    """Linear layer, plain SGD: weights and gradients twice 6 floats, 4 x 3 inputs, and what the loss keeps."""

    class Run:
        recipe = tiny(optim__momentum=0.0)
        model = torch.nn.Linear(3, 2, bias=False)

    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")

    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    # kept: x (48 bytes), log-softmax (4 x 2 floats), y (32 bytes), total weight of the loss (a float)
    assert train.counted_memory(Run(), x, y, trainer) == 2 * 24 + 48 + 32 + 32 + 4


def test_counting_draws_nothing_and_changes_nothing():
    recipe = tiny()
    torch.manual_seed(0)
    model = recipe.model.build(num_classes=10, in_chans=1)
    run = driver.Run(model, recipe, driver.Epoch(1, 1, 2))
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    train.counted_memory(run, torch.randn(2, 1, 8, 8, generator=torch.Generator()), torch.tensor([0, 1]), trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("name", [*recipes.RECIPES, *(f"{name}-quick" for name in recipes.RECIPES)])
def test_named_recipes_build(name):
    recipe = recipes.named(name)
    with torch.device("meta"):  # some are large
        assert recipe.model.build(num_classes=3, in_chans=3) is not None


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'cifar'; did you mean cifar10"):
        recipes.named("cifar")


@pytest.mark.slow
def test_two_processes_with_one_image_each_are_one_with_two(tmp_path):
    for devices in (1, 2):
        command = [sys.executable, "-m", "anybatch.cli", "train", "digits-quick", "-b", str(2 // devices)]
        command += [
            "--devices",
            str(devices),
            "--set",
            "train.precision=64-true",
            "--out",
            str(tmp_path / str(devices)),
        ]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (rows.read(tmp_path / str(devices) / "rows.jsonl") for devices in (1, 2))
    assert len(one) == len(two) == 1  # the second process writes nothing
    assert one[0]["peak_lr"] == two[0]["peak_lr"]
    for a, b in zip(one[0]["curve"], two[0]["curve"], strict=True):
        assert a["samples"] == b["samples"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-9)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-6)  # the metric is kept in float32
