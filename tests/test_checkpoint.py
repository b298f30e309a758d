"""Checkpoints come back as they were, and anything else is a clear error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anybatch import checkpoint
from anybatch.recipe import Recipe


def facts(**changes):
    values = {
        "recipe": Recipe().replace({"model.options": {"width": 32}}).model_dump(mode="json"),
        "classes": ["a", "b"],
        "in_chans": 1,
        "size": 8,
        "mean": [0.5],
        "std": [0.25],
        "error": 0.5,
        "epochs": 1,
        "version": "0",
    }
    return checkpoint.ModelFacts(**{**values, **changes})


def test_a_state_of_every_kind_comes_back(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "a": {0: {"exp": shared, "n": 3, "x": None}, "t": (1, 2.5, [True, "s"])},
        "b": shared[:3],
        "c": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "nested": {"t": torch.tensor(7)},
    }
    checkpoint.save_state(state, tmp_path / "s.safetensors")
    back = checkpoint.load_state(tmp_path / "s.safetensors")
    assert back["a"]["t"] == (1, 2.5, [True, "s"])
    assert back["a"][0]["n"] == 3
    assert back["a"][0]["x"] is None
    torch.testing.assert_close(back["a"][0]["exp"], shared, rtol=0, atol=0)
    torch.testing.assert_close(back["b"], shared[:3], rtol=0, atol=0)
    assert back["c"].shape == (2, 3, 4, 5)
    assert back["nested"]["t"] == 7


def test_a_state_holds_no_objects(tmp_path):
    with pytest.raises(TypeError, match="got Linear"):
        checkpoint.save_state({"m": nn.Linear(1, 1)}, tmp_path / "s.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_off_state_is_named(tmp_path, keep):
    path = tmp_path / "s.safetensors"
    checkpoint.save_state({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"s\.safetensors is damaged"):
        checkpoint.load_state(path)


def test_a_failed_write_leaves_the_good_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    checkpoint.save_state({"a": torch.ones(3)}, path)

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_state({"a": torch.zeros(3)}, path)
    assert checkpoint.load_state(path)["a"].sum() == 3
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_model_comes_back_with_its_outputs(tmp_path):
    f = facts()
    model = Recipe.parse(f.recipe).model.build(num_classes=2, in_chans=1)
    checkpoint.save_model(model, f, tmp_path)
    back, read = checkpoint.load_model(tmp_path)
    assert read == f
    assert not back.training
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(back(x), model.eval()(x), rtol=0, atol=0)
    assert checkpoint.load_model(tmp_path / "model.safetensors")[1] == f


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.json").unlink(), r"model\.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda d: (d / "model.json").write_text("{"), r"model\.json is damaged"),
        (lambda d: (d / "model.json").write_text("[1]"), r"model\.json is damaged"),
        (lambda d: (d / "model.json").write_text('{"a": 1}'), r"model\.json is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"123"), r"model\.safetensors is damaged or cut off"),
    ],
)
def test_a_spoilt_model_is_named(tmp_path, spoil, message):
    f = facts()
    checkpoint.save_model(Recipe.parse(f.recipe).model.build(num_classes=2, in_chans=1), f, tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(tmp_path)


def test_another_network_is_told_by_its_keys(tmp_path):
    f = facts()
    checkpoint.save_model(Recipe.parse(f.recipe).model.build(num_classes=3, in_chans=1), f, tmp_path)
    with pytest.raises(ValueError, match="tells 3 classes apart, the network 2"):
        checkpoint.load_model(tmp_path)
    checkpoint.save_model(Recipe.parse(f.recipe).model.build(num_classes=2, in_chans=2), f, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({"x" if name == "fc.bias" else name: t for name, t in weights.items()}, tmp_path / "model.safetensors")
    told = r"another network's weights.*; missing: fc\.bias; unexpected: x; of another shape: conv1\.weight"
    with pytest.raises(ValueError, match=told):
        checkpoint.load_model(tmp_path)


def test_facts_are_plain_json(tmp_path):
    f = facts()
    checkpoint.save_model(Recipe.parse(f.recipe).model.build(num_classes=2, in_chans=1), f, tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["classes"] == ["a", "b"]
