"""`anybatch convert MODEL`: BatchNorm out of a network by the command line, and the file it writes."""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import anybatch
from anybatch import data, live
from anybatch.convert import convert_batchnorm
from anybatch.convert.kinds import is_batchnorm
from anybatch.files import save_tensors
from anybatch.models.named import model_named
from anybatch.recipe import Data

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A data set of 8 x 8 images."""
    path = tmp_path / "images.npz"
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(24) % 2, x_val=x, y_val=np.arange(24) % 2)
    return path


MAKERS = """
import torch
from torch import nn


def good():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    body = [first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


class Odd(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.body, self.does = good(), does

    def forward(self, x):
        y = self.body(x)
        if self.does == "fails":
            raise ZeroDivisionError("of its own")
        if self.does == "prints":
            print("hello")
        return "text" if self.does == "text" else y


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x if x.sum() > 0 else -x))


def fails(): return Odd("fails")
def prints(): print("building"); return Odd("prints")
def branches(): return Branches()
def text(): return Odd("text")
def half(): return good().half()
def nothing(): return None
def leaves(): raise SystemExit(3)
def lazy(): return nn.LazyConv2d(3, 3)
def holds(): model = good(); model.left = (i for i in range(3)); return model
def compiled(): return torch.jit.trace(good().eval(), torch.zeros(1, 3, 8, 8))
def meta():
    with torch.device("meta"):
        return good()
def broken():
    model = good()
    model[0].weight.data.fill_(float("nan"))
    return model
"""


@pytest.fixture
def makers(tmp_path: Path) -> None:
    """The file ``m.py`` of functions that return networks, or what is none."""
    (tmp_path / "m.py").write_text(MAKERS)


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


def test_a_network_is_made_normalizer_free_and_read_again(call: Command, images: Path) -> None:
    torch.manual_seed(0)
    told = ("convert", "resnet8", "--scheme", "bn", "--num-classes", 2, "--to", "nf", "--data", images)
    code, out, err = call(*told, "--out", "new/nf.safetensors")
    assert code == 0, err
    told_of = "nf: 9 norms replaced, 0 left; 9 convolutions changed, 0 left plain; the output changed by 0.0%"
    assert told_of in " ".join(out.split())
    assert "scales its branch: alpha 0.2 times 5" in out
    assert "nothing normalizes any more" in out
    made = model_named("new/nf.safetensors")
    assert made.scheme == "nf"
    assert not any(is_batchnorm(module) for module in made.model.modules())
    code, out, err = call(*told, "--distill", 2)
    assert (code, out) == (2, "")
    assert "distill has nothing to match: nf computes what the old network does" in " ".join(err.split())


@pytest.mark.parametrize(
    "options",
    [
        {"dp": True},
        {"exclude": ("layer1.0",)},
        {"to": "kn"},
        {"to": "frozen"},
        {"offset": 0.0, "groups": 2},
        {"offset": 2.0, "distill": 2},
    ],
    ids=str,
)
def test_the_file_gives_what_the_function_gives(options: dict[str, Any], call: Command, images: Path) -> None:
    model = anybatch.create_model("resnet8", "bn", num_classes=2).train()
    model(torch.randn(8, 3, 8, 8))
    save_tensors(model.state_dict(), Path("bn.safetensors"))
    words: list[object] = ["resnet8", "--scheme", "bn", "--weights", "bn.safetensors", "--data", images]
    for key, value in {"to": "gn", **options}.items():
        words += [f"--{key}", *([] if value is True else [value[0] if key == "exclude" else value])]
    code, _, err = call("convert", *words, "--out", "kept.safetensors")
    assert code == 0, err
    Path("bn.safetensors").unlink()  # all tensors are in the new file
    found = model_named("kept.safetensors")
    assert len(found.classes) == 2
    assert found.mean is not None
    assert found.std is not None
    taken, _ = data.sample(Data(name="arrays", root=str(images), size=32), 512, statistics=(found.mean, found.std))
    x = taken.__getitems__(range(len(taken)))[0]
    given: dict[str, Any] = {"to": "gn", "exclude": (), **options}
    expected = convert_batchnorm(model.eval(), calibrate=list(x.split(2)), **given)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), expected(x))
        assert torch.allclose(found.model(x), model(x)) == (options.get("to") == "frozen")
    if "exclude" in options:
        left = [name for name, module in found.model.named_modules() if is_batchnorm(module)]
        assert left
        assert all(name.startswith("layer1.0.") for name in left)


def test_a_run_is_converted_evaluated_and_predicts(call: Command, images: Path) -> None:
    code, _, err = call(
        "train", "--data", images, "--model", "resnet8", "--scheme", "bn", "-b", 8, "--epochs", 1, "--out", "run"
    )
    assert code == 0, err
    code, _, err = call("convert", "run", "--to", "frozen", "--out", "frozen.safetensors")
    assert code == 0, err
    before, after, other = (
        json.loads(call("eval", *words, "--json")[1])
        for words in (("run",), ("frozen.safetensors",), ("frozen.safetensors", "--data", images))
    )
    assert (before["data"], before["images"]) == ("arrays", 24)
    for told in (after, other):
        assert (told["error"], told["loss"]) == pytest.approx((before["error"], before["loss"]), rel=1e-4)
    Image.new("RGB", (8, 8), (200, 10, 10)).save("one.png")
    kept, new = (json.loads(call("predict", of, "one.png", "--json")[1]) for of in ("run", "frozen.safetensors"))
    chances = [{c["class"]: c["probability"] for c in told["images"][0]["classes"]} for told in (kept, new)]
    assert chances[1] == pytest.approx(chances[0], rel=1e-3)


def test_a_file_without_a_run_is_evaluated_on_named_data(call: Command, images: Path) -> None:
    assert call("convert", "resnet8", "--scheme", "bn", "--num-classes", 2, "--out", "a.safetensors")[0] == 0
    code, out, err = call("eval", "a.safetensors", "--data", images, "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 24
    code, _, err = call("eval", "a.safetensors")
    assert (code, "does not say on what data it was trained" in err) == (2, True)


@pytest.mark.usefixtures("makers")
def test_a_network_of_a_file_is_calibrated_at_a_size(call: Command, images: Path) -> None:
    for name in ("good", "half"):
        code, out, err = call("convert", f"m.py:{name}", "--data", images, "--size", 8, "--out", "a.safetensors")
        assert (code, err) == (0, "")
        assert "calibrated on 24 images; a few hundred tell more" in " ".join(out.split())
        code, out, err = call("diagnose", "a.safetensors", "--size", 8, "--probe", "batch_dependence", "--json")
        assert code == 0, err
        assert not json.loads(out)["probes"]["batch_dependence"]["mixes_in_training"]
    save_tensors({"x": torch.zeros(1)}, Path("other.safetensors"), {"converted": "{}"})
    code, _, err = call("diagnose", "other.safetensors")
    assert (code, "and not what it was made from" in err) == (2, True)


@pytest.mark.usefixtures("makers")
def test_what_a_network_prints_is_no_result(call: Command, images: Path) -> None:
    code, out, err = call("convert", "m.py:prints", "--data", images, "--size", 8, "--json")
    assert code == 0, err
    assert json.loads(out)["to"] == "ws+gn"
    assert "building" in err
    assert "hello" in err


@pytest.mark.usefixtures("makers")
def test_a_warning_is_one_line(call: Command) -> None:
    with warnings.catch_warnings(action="always"):
        code, _, err = call("convert", "m.py:branches", "--to", "ws+gn")
    assert code == 0
    assert err.startswith("warning: no trace reaches norm")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("m.py:good", "--offset", "nan"), "--offset"),
        (("m.py:good", "--offset", "inf"), "offset=inf is not a number"),
        (("m.py:good", "--groups", "0"), "groups=0 is neither a number above 0"),
        (("m.py:good", "--groups", "3"), "groups=3 does not divide 8 channels"),
        (("m.py:good", "--exclude", "body"), "unknown module to exclude 'body'"),
        (("m.py:good", "--exclude", "1", "--exclude", "4"), "no BatchNorm of the model becomes ws+gn: 1: excluded"),
        (("m.py:good", "--exclude", "1", "--dp"), "keeps running_mean of other samples, which Opacus refuses"),
        (("m.py:good", "--to", "frozen", "--distill", 2), "distill has nothing to match"),
        (("m.py:good", "--weights", "none.pt"), "no file of weights at none.pt"),
        (("m.py:good", "--weights", "kept.safetensors"), "kept.safetensors is damaged or cut off"),
        (("m.py:good", "--images", 1), "--images"),
        (("m.py:good", "--batch-size", 0), "--batch-size"),
        (("m.py:good", "--size", "8x9"), "m.py:good takes 3x8x9"),
        (("m.py:good", "--size", "0"), "--size takes 224, 224x320 or 3x224x224, got '0'"),
        (("m.py:good", "--size", "1x8x8"), "has images of 3 channels, and m.py:good takes 1"),
        (("m.py:fails",), "the model fails on an image of shape (3, 8, 8): ZeroDivisionError: of its own"),
        (("m.py:text", "--distill", 1), "distill compares outputs, and the model gives no tensors"),
        (("m.py:broken",), "layer '1' takes values that are not finite"),
        (("m.py:nothing",), "returned a NoneType"),
        (("m.py:leaves",), "SystemExit: 3"),
        (("m.py:lazy",), "layers have no shape yet; call it once in lazy"),
        (("m.py:meta",), "on the meta device"),
        (("m.py:holds",), "the model cannot be copied: cannot pickle 'generator' object"),
    ],
)
@pytest.mark.usefixtures("makers")
def test_a_mistake_leaves_files_as_they_are(
    words: tuple[object, ...], message: str, call: Command, images: Path
) -> None:
    Path("kept.safetensors").write_bytes(b"old")
    given = ("--data", images, *(() if "--size" in words else ("--size", 8)))
    before = sorted(Path().iterdir())
    code, out, err = call("convert", *words, *given, "--out", "kept.safetensors")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert Path("kept.safetensors").read_bytes() == b"old"
    assert sorted(p for p in Path().iterdir() if p.name != "__pycache__") == before


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
        (("resnet8", "--offset", 2), "--offset goes with --data"),
        (("resnet8", "--size", 8), "--size goes with --data"),
        (("resnet8", "--data-root", "."), "--data-root goes with --data"),
        (("resnet8", "--out", "file/a.safetensors"), "is a file"),
        (("resnet8", "--out", "folder.safetensors"), "folder.safetensors is a folder"),
        (("resnett", "--to", "gn"), "unknown model 'resnett'"),
        (("resnet8", "--scheme", "bn", "--to", "nf+agc"), "also asks for clipping, which is the training's"),
        (("densenet40_12", "--scheme", "bn", "--to", "nf"), "no sum of a branch and a skip connection was found"),
        (("resnet8", "--scheme", "bn", "--exclude", "bn"), "unknown module to exclude 'bn'"),
        (("torchvision:r3d_18", "--data", "digits"), "torchvision:r3d_18 takes 3x16x112x112; call convert_batchnorm"),
    ],
)
def test_one_line_for_each_mistake(arguments: tuple[object, ...], message: str, call: Command) -> None:
    Path("file").write_text("")
    Path("folder.safetensors").mkdir()
    code, out, err = call("convert", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(("terminal", "soon", "shows"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)])
def test_a_bar_shows_on_terminals_once_a_conversion_takes_long(
    terminal: bool, soon: float, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_SOON", soon)
    told = io.StringIO()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    with live.phases(Console(file=told, force_terminal=terminal, width=100)) as tell:
        seen: list[tuple[str, int, int]] = []

        def slowly(phase: str, done: int, of: int) -> None:
            tell(phase, done, of)
            seen.append((phase, done, of))
            time.sleep(0.15 * shows)

        convert_batchnorm(model, "gn", calibrate=[torch.randn(4, 3, 6, 6)] * 2, distill=2, tell=slowly)
    steps = [("calibrate", 0, 1), ("calibrate", 1, 1), ("distill", 1, 2), ("distill", 2, 2), ("compare", 1, 1)]
    assert seen == steps
    assert all((word in told.getvalue()) == shows for word in ("calibrate", "distill"))
    assert bool(told.getvalue()) == shows
