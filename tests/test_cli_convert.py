"""`anybatch convert weights`: from torchvision, to timm and back, and one line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anybatch
from anybatch.models import Network
from models.checks import assert_same_tensors, randomized

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def convert(call: Command) -> Command:
    return partial(call, "convert", "weights")


def test_the_command_converts_from_torchvision_and_to_timm(convert: Command) -> None:
    theirs = randomized(torchvision.models.resnet18(num_classes=4)).state_dict()
    torch.save(theirs, "theirs.pth")
    code, out, err = convert("theirs.pth", "--model", "resnet18", "--scheme", "bn", "--out", "new/ours.safetensors")
    assert code == 0, err
    assert "122 tensors of resnet18 with bn and 4 classes" in " ".join(out.split())
    assert_same_tensors(load_file("new/ours.safetensors"), theirs)
    with safe_open("new/ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"model": "resnet18", "scheme": "bn", "options": "{}", "layout": "anybatch"}

    options: list[object] = ["--model", "preact_resnet50", "--scheme", "ws(eps=1e-8)+gn:auto"]
    options += ["--option", "stem=bit", "--option", "width=8"]
    model: Any = anybatch.create_model("preact_resnet50", "ws+gn:auto", num_classes=3, stem="bit", width=8)
    save_file(model.state_dict(), "ours.safetensors")
    code, out, err = convert("ours.safetensors", *options, "--to", "timm", "--out", "timm.safetensors", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["classes"] == 3
    assert told["options"] == {"stem": "bit", "width": 8}
    assert "stages.0.blocks.0.norm1.weight" in load_file("timm.safetensors")
    code, out, err = convert("timm.safetensors", *options, "--out", "back.safetensors", "--num-classes", 3)
    assert code == 0, err
    assert "the same outputs as there take: for BiT scheme ws(eps=1e-08)+gn" in " ".join(out.split())
    assert_same_tensors(load_file("back.safetensors"), model.state_dict())


def test_a_new_classifier_for_other_classes(convert: Command) -> None:
    model: Network = anybatch.create_model("resnet8", num_classes=3)  # pyright: ignore[reportAssignmentType]
    save_file(model.state_dict(), "ours.safetensors")
    words = ["--model", "resnet8", "--num-classes", 5, "--classifier", "skip", "--out", "o.safetensors", "--json"]
    code, out, err = convert("ours.safetensors", *words)
    assert code == 0, err
    assert json.loads(out)["set_anew"] == ["fc.bias", "fc.weight"]
    assert load_file("o.safetensors")["fc.bias"].shape == (5,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.pth", "--model", "resnet8", "--out", "o.safetensors"], "no file of weights at none.pth"),
        (["ours.safetensors", "--model", "resnet9", "--out", "o.safetensors"], "unknown model 'resnet9'"),
        (["ours.safetensors", "--model", "resnet8", "--out", "o.pt"], "--out must end in .safetensors, got o.pt"),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--option", "num_classes=3"],
            "unknown option of resnet8 'num_classes'",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--option", "features_only=true"],
            "unknown option of resnet8 'features_only'",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--in-chans", 1],
            "takes images of 3 channels, the network 1; build it with in_chans=3",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--classifier", "skip"],
            "--classifier skip takes --num-classes",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "a.safetensors"],
            "a.safetensors is a folder; name a file in it",
        ),
        (["text.pt", "--model", "resnet8", "--out", "o.safetensors"], "text.pt is damaged or cut off, or no .pt file"),
        (["ours.safetensors", "--model", "resnet14", "--out", "o.safetensors"], "its weights fit resnet8 with scheme"),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--num-classes", 5],
            "tells 3 classes apart, the network 5",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--option", "stem"],
            "--option takes key=value, such as stem=bit; got 'stem'",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--to", "tim"],
            "unknown layout to export 'tim'",
        ),
    ],
)
def test_mistakes_at_the_command_line(convert: Command, words: list[object], message: str) -> None:
    model: Network = anybatch.create_model("resnet8", num_classes=3)  # pyright: ignore[reportAssignmentType]
    save_file(model.state_dict(), "ours.safetensors")
    Path("text.pt").write_text("hello\n")
    Path("a.safetensors").mkdir()
    code, out, err = convert(*words)
    assert code == 2
    assert message in " ".join(err.split())
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not list(Path().glob("o.*"))
