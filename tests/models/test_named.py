"""Networks by a text: each form gives the network and what is known of it, or one line that says what would do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import anybatch
from anybatch import checkpoint
from anybatch.models import Network
from anybatch.models.named import model_named
from anybatch.recipe import Recipe
from test_checkpoint import facts

FILE = """
from dataclasses import dataclass

from torch import nn

import beside


@dataclass
class Shape:
    width: int = 3


def net():
    return nn.Sequential(nn.Conv2d(beside.CHANNELS, Shape().width, 3))


def number():
    return 7


def wants(width):
    return nn.Linear(width, 1)


def fails():
    raise RuntimeError("no\\nsuch luck")


SIZE = 8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("CHANNELS = 2\n")
    (tmp_path / "nets.py").write_text(FILE)
    return tmp_path / "nets.py"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    model = Recipe().replace({"model.options": {"width": 32}}).model.build(num_classes=2, in_chans=1)
    checkpoint.save_model(model, facts(), folder)
    return folder


def test_a_name_of_the_registry_has_its_own_scheme_or_the_one_that_is_given() -> None:
    found = model_named("resnet8")
    assert (found.scheme, found.architecture, found.task) == ("ws+gn(groups=auto)", "resnet8", "classification")
    assert (found.input_size, len(found.classes), found.trained) == ((3, 32, 32), 1000, False)
    found = model_named("resnet8", scheme="bn", num_classes=2, in_chans=1, width=8)
    assert (found.scheme, found.input_size, found.classes) == ("bn", (1, 32, 32), ("0", "1"))
    assert found.mean is not None
    assert len(found.mean) == 1
    assert not found.model.training
    assert sum(isinstance(m, nn.BatchNorm2d) for m in found.model.modules()) > 0
    assert model_named("resnet8", num_classes=0).task == "features"


def test_weights_fill_a_network_of_the_registry_and_bring_their_number_of_classes(tmp_path: Path) -> None:
    model = anybatch.create_model("resnet8", "bn", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    found = model_named("resnet8", scheme="bn", weights=tmp_path / "w.pt")
    assert (found.classes, found.trained) == (("0", "1", "2"), True)
    torch.testing.assert_close(found.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_timm_says_what_images_its_networks_want() -> None:
    timm = pytest.importorskip("timm")
    found = model_named("timm:resnet18", num_classes=5, in_chans=1)
    assert (found.task, found.input_size, len(found.classes)) == ("classification", (1, 224, 224), 5)
    assert found.mean is None  # timm's are for three channels
    assert (found.crop_pct, found.interpolation) == (0.95, "bicubic")
    found = model_named("timm:resnet18", num_classes=0)
    assert (found.task, found.classes) == ("features", ())
    assert found.mean == timm.data.IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize(
    ("name", "task", "size", "classes", "scale"),
    [
        ("resnet18", "classification", (3, 224, 224), 1000, True),
        ("googlenet", "classification", (3, 224, 224), 1000, True),
        ("lraspp_mobilenet_v3_large", "segmentation", (3, 520, 520), 21, True),
        ("ssdlite320_mobilenet_v3_large", "detection", (3, 320, 320), 91, False),
        ("r3d_18", "video", (3, 16, 112, 112), 400, True),
        ("raft_small", "unknown", None, 0, False),
    ],
)
def test_torchvision_s_networks_of_every_task_come_without_a_download(
    monkeypatch: pytest.MonkeyPatch, name: str, task: str, size: Any, classes: int, scale: bool
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    found = model_named(f"torchvision:{name}")
    assert (found.task, found.input_size, len(found.classes)) == (task, size, classes)
    assert (found.mean is not None) is scale
    assert not found.model.training


def test_torchvision_s_number_of_classes_and_crop(tmp_path: Path) -> None:
    found = model_named("torchvision:resnet18", num_classes=2)
    assert (found.classes, found.crop_pct) == (("0", "1"), 224 / 256)
    torch.save(found.model.state_dict(), tmp_path / "w.pt")
    again = model_named("torchvision:resnet18", num_classes=2, weights=tmp_path / "w.pt")
    assert again.trained
    torch.testing.assert_close(again.model.state_dict(), found.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"of another shape: fc\.weight \(2, 512\) for \(1000, 512\), fc\.bias"):
        model_named("torchvision:resnet18", weights=tmp_path / "w.pt")


def test_a_function_of_a_file_may_import_what_lies_beside_it(file: Path) -> None:
    before = list(sys.path)
    found = model_named(f"{file}:net")
    assert (found.task, found.input_size, found.classes) == ("unknown", None, ())
    assert not found.model.training
    assert found.model(torch.zeros(1, 2, 5, 5)).shape == (1, 3, 3, 3)
    assert sys.path == before


def test_a_run_s_folder_and_the_file_in_it_tell_what_was_trained(run: Path) -> None:
    for path in (run, run / "model.safetensors", str(run)):
        found = model_named(path)
        assert (found.task, found.classes, found.input_size) == ("classification", ("a", "b"), (1, 8, 8))
        assert (found.mean, found.std, found.trained) == ((0.5,), (0.25,), True)
        assert found.recipe == facts().recipe
        assert (found.architecture, found.scheme) == ("resnet8", "ws+gn")


def test_a_saved_network_tells_its_images(tmp_path: Path) -> None:
    model = anybatch.create_model("resnet8", "gn:4", num_classes=4)
    assert isinstance(model, Network)
    model.default_cfg |= {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}
    model.save_pretrained(tmp_path / "net")
    for path in (tmp_path / "net", tmp_path / "net" / "model.safetensors"):
        found = model_named(path)
        assert (found.mean, found.crop_pct, found.scheme) == ((0.1, 0.2, 0.3), 0.8, "gn(groups=4)")
        torch.testing.assert_close(found.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_name_comes_before_a_folder_of_that_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.rename(run.parent / "resnet8")
    monkeypatch.chdir(run.parent)
    assert not model_named("resnet8").trained
    assert model_named("./resnet8").trained


@pytest.mark.parametrize(
    ("text", "how", "message"),
    [
        ("resnt50", {}, "unknown model 'resnt50'; did you mean resnet50 or"),
        ("resnt50", {}, "a model is a network's name"),
        ("timm:resnt50", {}, "unknown model of timm 'resnt50'; did you mean resnet50"),
        ("timm:hf-hub:a/b", {}, "unknown model of timm"),
        ("torchvision:resnt50", {}, "unknown model of torchvision 'resnt50'; did you mean resnet50"),
        ("timm:resnet18", {"scheme": "gn"}, "scheme='gn' goes with a network of anybatch list --models"),
        ("timm:resnet18", {"colour": 1}, "timm:resnet18 cannot be built: .*colour"),
        ("torchvision:resnet18", {"in_chans": 1}, "torchvision:resnet18 cannot be built: .*in_chans"),
        ("resnet8", {"colour": 1}, "unknown option of resnet8 'colour'"),
        ("nets.py", {}, "write nets.py:FUNCTION"),
        ("gone.py:net", {}, "no file at gone.py"),
        ("nets.py:nut", {}, r"unknown function 'nut' in nets.py; did you mean net"),
        ("nets.py:SIZE", {}, "SIZE in nets.py is a int, and must be a function"),
        ("nets.py:number", {}, "nets.py:number returned a int, and must return a torch.nn.Module"),
        ("nets.py:wants", {}, "must be a function of no arguments .*TypeError: .*width"),
        ("nets.py:fails", {}, "and failed in line 27: RuntimeError: no such luck"),
        ("nets.py:net", {"num_classes": 3}, "num_classes=3 goes with a network that is built by its name, not with"),
        ("bad.py:net", {}, "bad.py cannot be run in line 2: SyntaxError"),
        ("raises.py:net", {}, "raises.py cannot be run in line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("run", {"weights": "w.pt"}, "weights='w.pt' goes with a network that is built"),
        ("w.pt", {}, "w.pt is a file, not a network; weights go beside a network's name"),
        ("net.onnx", {}, "net.onnx is an exported network"),
        ("./gone", {}, "gone is not there"),
        (".", {}, "no checkpoint in ."),
    ],
)
def test_what_names_no_network_is_told_in_one_line(
    file: Path, run: Path, monkeypatch: pytest.MonkeyPatch, text: str, how: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(file.parent)
    Path("bad.py").write_text("x = 1\ny = (\n")
    Path("raises.py").write_text("import nowhere\n")
    Path("w.pt").touch()
    Path("net.onnx").touch()
    with pytest.raises(ValueError, match=message) as told:
        model_named(text, **how)
    assert "\n" not in str(told.value)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=re.escape("timm:resnet18 needs timm: pip install 'anybatch[timm]'")):
        model_named("timm:resnet18")


def test_weights_of_another_number_of_classes_are_told_with_what_would_do(tmp_path: Path) -> None:
    own = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(own, tmp_path / "three.pth")
    with pytest.raises(ValueError, match=r"three.pth holds .*; for 3 classes give num_classes=3 \(--num-classes\)"):
        model_named("torchvision:resnet18", weights=tmp_path / "three.pth")
    assert model_named("torchvision:resnet18", weights=tmp_path / "three.pth", num_classes=3).trained
    torch.save({**own, "conv1.weight": torch.zeros(3, 3, 7, 7)}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"conv1.weight \(3, 3, 7, 7\) for \(64, 3, 7, 7\)") as told:
        model_named("torchvision:resnet18", weights=tmp_path / "narrow.pth", num_classes=3)
    assert "num_classes" not in str(told.value)
