"""`anybatch convert MODEL`: BatchNorm out of a network by the command line, and the file it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from anybatch.convert.kinds import is_batchnorm
from anybatch.models.named import model_named

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A data set of 8 x 8 images."""
    path = tmp_path / "images.npz"
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(24) % 2, x_val=x, y_val=np.arange(24) % 2)
    return path


def test_a_network_is_converted_and_read_again(call: Command, images: Path) -> None:
    torch.manual_seed(0)
    told = ("convert", "resnet8", "--scheme", "bn", "--num-classes", 2)
    code, out, err = call(*told, "--to", "ws+gn", "--data", images, "--distill", 2, "--out", "new/gn.safetensors")
    assert code == 0, err
    assert "norms replaced, 0 left" in out
    assert "GroupNorm" in out
    made = model_named("new/gn.safetensors")
    assert made.scheme == "ws+gn"
    assert made.trained
    assert not any(is_batchnorm(module) for module in made.model.modules())
    code, out, err = call("convert", "new/gn.safetensors", "--to", "gn")
    assert code == 2
    assert "no BatchNorm of the model becomes gn: it has none" in err


def test_json_alone(call: Command) -> None:
    code, out, err = call("convert", "torchvision:resnet18", "--to", "gn", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["to"] == "gn"
    assert len(told["replaced"]) == 20
    assert told["groups"]["bn1"] == 32
    assert told["drift"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet8", "--out", "a.pt"), "--out must end in .safetensors"),
        (("resnet8", "--groups", "some"), "--groups takes a number or auto"),
        (("resnet8", "--distill", 3), "--distill needs images"),
        (("resnett", "--to", "gn"), "unknown model 'resnett'"),
        (("resnet8", "--scheme", "bn", "--to", "nf"), "also asks for another act and residual"),
        (("resnet8", "--scheme", "bn", "--exclude", "bn"), "unknown module to exclude 'bn'"),
        (("torchvision:r3d_18", "--data", "digits"), "torchvision:r3d_18 takes 3x16x112x112; call convert_batchnorm"),
    ],
)
def test_one_line_for_each_mistake(arguments: tuple[object, ...], message: str, call: Command) -> None:
    code, out, err = call("convert", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
