"""A recipe is checked, frozen, written as YAML, and known by an id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from anybatch import recipes
from anybatch.recipe import Recipe, read_value, read_yaml

# A value other than the default for every key.
OTHER = {
    "model.name": "resnet14",
    "model.scheme": "gn:auto",
    "model.options": {"width": 32, "stem": "cifar"},
    "model.weights": "weights.safetensors",
    "data.name": "cifar10",
    "data.root": "/somewhere/else",
    "data.train_size": 500,
    "data.val_size": 300,
    "data.val_fraction": 0.25,
    "data.size": 24,
    "data.augment": ["crop", "flip"],
    "data.crop_area": 0.08,
    "data.randaugment_layers": 4,
    "data.randaugment_magnitude": 15,
    "data.mixup": 0.2,
    "data.cutmix": 1.0,
    "data.eval_size": 48,
    "data.normalize": "unit",
    "data.seed": 1,
    "data.batch_size": 3,
    "data.accumulate": 2,
    "data.eval_batch_size": 16,
    "data.workers": 2,
    "data.holdout": 0.125,
    "data.skip_bad": True,
    "optim.name": "adamw",
    "optim.lr": 0.003,
    "optim.lr_batch": 64,
    "optim.lr_scaling": "sqrt",
    "optim.momentum": 0.8,
    "optim.nesterov": True,
    "optim.weight_decay": 1e-05,
    "optim.decay_all": True,
    "optim.clip_norm": 1.5,
    "optim.sam_rho": 0.05,
    "schedule.name": "constant",
    "schedule.epochs": 2,
    "schedule.warmup": 0.0,
    "schedule.floor": 0.01,
    "schedule.milestones": [0.5, 0.75],
    "schedule.factor": 0.5,
    "train.seed": 7,
    "train.devices": 2,
    "train.accelerator": "cpu",
    "train.precision": "bf16-mixed",
    "train.channels_last": True,
    "train.compile": "default",
    "train.label_smoothing": 0.1,
    "train.ema": 0.99,
    "train.ema_warmup": True,
    "train.eval_every": 2,
    "privacy.epsilon": 3.0,
    "privacy.delta": 1e-06,
    "privacy.max_grad_norm": 0.5,
    "privacy.accountant": "prv",
    "privacy.seeded": True,
}
# Keys that go with all others.
TOGETHER = OTHER | {"data.accumulate": 1, "privacy.epsilon": None}


def paths(model: type[BaseModel], above: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += paths(kind, f"{above}{name}.") if nested else [above + name]
    return found


def test_the_table_above_has_every_key() -> None:
    assert sorted(OTHER) == sorted(paths(Recipe))


def test_yaml_round_trip(tmp_path: Path) -> None:
    for i, recipe in enumerate(
        [
            Recipe(),
            Recipe().replace(TOGETHER),
            *(Recipe().replace({k: v}) for k, v in OTHER.items()),
        ]
    ):
        path = tmp_path / f"{i}.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        again = Recipe.read(path)
        assert again == recipe
        assert again.id == recipe.id


def test_yaml_holds_every_value_in_the_order_of_the_fields() -> None:
    written = yaml.safe_load(Recipe().to_yaml())
    assert [f"{section}.{key}" for section, keys in written.items() for key in keys] == paths(Recipe)


def test_a_few_lines_are_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "few.yaml"
    path.write_text("model: {scheme: bn, options: {width: 32}}\ndata:\n  batch_size: 8\n", encoding="utf-8")
    assert Recipe.read(path) == Recipe().replace({"model.scheme": "bn", "data.batch_size": 8})


@pytest.mark.parametrize("path", OTHER)
def test_the_id_changes_with_any_value(path: str) -> None:
    changed = Recipe().replace({path: OTHER[path]})
    assert changed != Recipe()
    of_no_effect = path in ("data.root", "data.workers", "data.eval_batch_size")
    assert (changed.id == Recipe().id) == of_no_effect
    assert len(changed.id) == 12
    int(changed.id, 16)


def test_the_id_is_that_of_the_values() -> None:
    assert Recipe().id == Recipe.parse({}).id == Recipe.parse({"data": {"batch_size": 2}}).id
    assert Recipe().replace({"data.batch_size": 8}).replace({"data.batch_size": 2}).id == Recipe().id


def test_ids_of_kept_rows_stay() -> None:
    assert recipes.digits().id == "4ed0337f6f7d"
    assert recipes.cifar10().id == "20662095f08a"


@pytest.mark.parametrize("path", [path for path in OTHER if path != "model.options"])
def test_values_are_set_from_text(path: str) -> None:
    value = OTHER[path]
    text = "[crop, flip]" if path == "data.augment" else str(value)
    assert Recipe().replace({path: text}) == Recipe().replace({path: value})


def test_set_leaves_the_rest_and_the_original_alone() -> None:
    before = Recipe()
    after = before.replace({"optim.lr": "1e-3", "data.train_size": "100"})
    assert (before.optim.lr, after.optim.lr, after.data.train_size) == (0.1, 1e-3, 100)
    assert after.replace({"optim.lr": 0.1, "data.train_size": None}) == before
    assert after.replace({"data.train_size": "null", "optim.lr": "0.1"}) == before


def test_set_reaches_into_the_models_options() -> None:
    recipe = Recipe().replace({"model.options.width": "32"}).replace({"model.options.stem": "cifar"})
    assert recipe.model.options == {"width": 32, "stem": "cifar"}
    assert Recipe().replace({"model.options": "{width: 32, stem: cifar}"}) == recipe


@pytest.mark.parametrize("scheme", ["ws+gn", "gn:16", "gn/8", "gn(groups=16,eps=1e-3)", "none", "in", "bn"])
def test_schemes_are_set_as_they_are_written(scheme: str) -> None:
    assert Recipe().replace({"model.scheme": scheme}).model.scheme == scheme


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.bach_size": 2}, r"unknown key 'bach_size' in 'data\.bach_size'; did you mean batch_size"),
        ({"dta.batch_size": 2}, r"unknown key 'dta' in 'dta\.batch_size'; did you mean data"),
        (
            {"batch_size": 2},
            r"unknown key 'batch_size' in 'batch_size'; Known: data, model, optim, privacy, schedule, train",
        ),
        ({"": 2}, "unknown key ''"),
        ({"data": {}}, r"'data' is a section; set one of its keys, such as data\.name"),
        ({"model.name.first": "x"}, r"'model\.name\.first': 'name' has no keys of its own"),
        ({"data.batch_size": "0"}, r"recipe: data\.batch_size: .*greater than or equal to 1, got 0"),
        ({"data.batch_size": "two"}, r"data\.batch_size: .*valid integer.*, got 'two'"),
        ({"data.batch_size": 2.5}, r"data\.batch_size: .*integer.*, got 2\.5"),
        ({"optim.lr": "nan"}, r"optim\.lr: .*finite number, got nan"),
        ({"optim.lr": "inf"}, r"optim\.lr: .*finite number, got inf"),
        ({"optim.lr": "-1"}, r"optim\.lr: .*greater than 0, got -1"),
        ({"optim.name": "adam"}, r"optim\.name: .*'sgd' or 'adamw', got 'adam'"),
        ({"train.ema": 1.0}, r"train\.ema: .*less than 1, got 1\.0"),
        ({"data.augment": ["crop", "blur"]}, r"data\.augment\.1: .*'crop', 'flip' or 'randaugment', got 'blur'"),
        ({"schedule.milestones": [0.6, 0.3]}, r"schedule\.milestones must rise between 0 and 1, got \[0\.6, 0\.3\]"),
        ({"schedule.milestones": [0.5, 1]}, r"schedule\.milestones must rise between 0 and 1, got \[0\.5, 1\.0\]"),
        ({"model.name": "[1"}, r"cannot read the value '\[1'"),
    ],
    ids=str,
)
def test_wrong_changes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Recipe().replace(changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"bach_size": 2}}, r"here: unknown key 'bach_size' in data; did you mean batch_size"),
        ({"optimiser": {}}, r"here: unknown key 'optimiser' in the recipe; did you mean optim"),
        ({"data": 3}, r"here: data: .*got 3"),
        ({"data": None}, r"here: data: .*got None"),
        ({"data": {"bach_size": 2}, "optim": {"lr": 0}}, r"unknown key 'bach_size'.*; optim\.lr: .*got 0"),
    ],
    ids=str,
)
def test_wrong_keys_and_values_are_named_on_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.parse(values, where="here")
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(ValueError, match=r"cannot read .*bad\.yaml: No such file or directory"):
        Recipe.read(path)
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        Recipe.read(tmp_path)
    for text, message in [("a: [1", "is not YAML"), ("- 1", "must hold sections"), ("", "must hold sections")]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"bad\.yaml {message}"):
            Recipe.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        read_yaml(path)
    path.write_text("!!python/object/apply:os.getcwd []", encoding="utf-8")
    with pytest.raises(ValueError, match="is not YAML"):
        Recipe.read(path)


def test_recipes_do_not_change() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optim.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("5E2", 500.0),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("none", "none"),
        ("in", "in"),
        ("bf16-mixed", "bf16-mixed"),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("", None),
    ],
)
def test_values_are_read_as_yaml_reads_them(text: str, value: object) -> None:
    got = read_value(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "devices", "scaling", "expected"),
    [
        (32, 1, 1, "linear", 0.1),
        (2, 1, 1, "linear", 0.1 / 16),
        (1, 1, 1, "linear", 0.1 / 32),
        (4, 8, 1, "linear", 0.1),
        (4, 2, 2, "linear", 0.05),
        (64, 2, 1, "linear", 0.4),
        (2, 1, 1, "sqrt", 0.025),
        (32, 2, 2, "sqrt", 0.2),
        (2, 3, 5, "none", 0.1),
    ],
)
def test_peak_learning_rate(batch_size: int, accumulate: int, devices: int, scaling: str, expected: float) -> None:
    recipe = Recipe().replace(
        {
            "data.batch_size": batch_size,
            "data.accumulate": accumulate,
            "train.devices": devices,
            "optim.lr": 0.1,
            "optim.lr_batch": 32,
            "optim.lr_scaling": scaling,
        }
    )
    assert recipe.peak_lr == pytest.approx(expected, rel=1e-12)
