"""Exported files give what the network gives, say what they are, and come whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import anybatch
from anybatch import checkpoint, export
from anybatch.export import Card, CheckError, open_onnx
from anybatch.export.card import KEY
from anybatch.export.runtime import relative_error, tensors
from anybatch.models import Network
from anybatch.models.named import model_named
from anybatch.recipe import Recipe
from test_checkpoint import facts

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def network(scheme: str = "bn", **options: Any) -> Network:
    model = anybatch.create_model("resnet8", scheme, **{"num_classes": 4, "width": 8, **options})
    assert isinstance(model, Network)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
        model(torch.randn(4, model.in_chans, 32, 32))  # statistics that are not new
    return model.eval()


FAST = ("bn", "ws+bcn:auto", "nf")
SLOW = (
    "ws+gn:auto", "syncbn", "frozenbn", "brn", "gn:auto", "ln", "in", "pn", "lcn", "lrn", "bcn:auto", "frn",
    "evos0:auto", "evob0", "dyt", "derf", "kn", "kn(p=0.1,eval_stats=expected)", "nf+agc", "skipinit", "fixup", "none",
    "sws", "ws+frn",
)  # fmt: skip


@pytest.mark.parametrize("scheme", [*FAST, *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in SLOW)])
def test_every_scheme_at_every_batch_and_size(scheme: str, tmp_path: Path) -> None:
    model = network(scheme)
    for path in (tmp_path / "net.onnx", tmp_path / "net.pt2"):
        done = export.export(model, path, dynamic_size=True, check=True)
        assert done.error is not None
        assert done.error < 1e-5
        assert (done.fixed, done.card.dynamic_size, done.card.task) == ("", True, "classification")
    run, card = open_onnx(tmp_path / "net.onnx")
    assert card.scheme == model.default_cfg["scheme"]
    images = torch.randn(3, 3, 45, 38)
    (got,), wanted = run(images), model(images)
    assert relative_error(got, wanted) < 1e-5
    extra = {KEY: ""}
    loaded = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    assert relative_error(loaded(images), wanted) < 1e-5
    assert Card.from_json(extra[KEY]) == card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("nf_regnet_b0", 64), ("densenet40_12", 32), ("convnext_tiny", 64), ("preact_resnet8", 32),
        ("timm:mobilenetv3_small_100", 64), ("torchvision:lraspp_mobilenet_v3_large", 64),
        ("torchvision:shufflenet_v2_x0_5", 64), ("torchvision:r3d_18", (3, 4, 32, 32)),
    ],
)  # fmt: skip
def test_networks_of_several_libraries_and_tasks(name: str, size: Any, tmp_path: Path) -> None:
    done = export.export(model_named(name), tmp_path / "net.onnx", size=size, dynamic_size=True, check=True)
    assert done.fixed == ""
    assert done.card.name == name


def test_the_card_travels_as_json_under_its_key(tmp_path: Path) -> None:
    export.export(network("gn:4", in_chans=1), tmp_path / "net.onnx", size=(36, 40))
    held = {prop.key: prop.value for prop in onnx.load(tmp_path / "net.onnx").metadata_props}
    card = json.loads(held[KEY])
    assert card["version"] == anybatch.__version__
    assert (card["architecture"], card["scheme"]) == ("resnet8", "gn(groups=4)")
    assert (card["input_size"], card["classes"]) == ([1, 36, 40], ["0", "1", "2", "3"])
    assert (card["recipe"], card["trained"], card["dynamic_size"], card["folded"]) == (None, False, False, 0)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (["images"], ["logits"])
    run, _ = open_onnx(tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"net.onnx does not take images of shape \(1, 1, 32, 32\)"):
        run(torch.zeros(1, 1, 32, 32))


class Flat(nn.Module):
    """Takes one size, since its linear layer does; gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3 * 6 * 6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.norm(self.conv(x)).relu()
        return {"map": h, "heads": [self.fc(h.flatten(1))]}


def test_a_network_that_fixes_its_size_says_so_and_outputs_of_every_form_are_checked(tmp_path: Path) -> None:
    for path in (tmp_path / "net.onnx", tmp_path / "net.pt2"):
        done = export.export(Flat().eval(), path, size=(2, 8, 8), dynamic_size=True, check=True)
        assert done.fixed
        assert "\n" not in done.fixed
        assert done.card.dynamic_size is False
        assert (done.card.task, done.card.classes, done.card.folded) == ("unknown", (), 1)
    outputs = open_onnx(tmp_path / "net.onnx")[0](torch.zeros(5, 2, 8, 8))
    assert [tuple(t.shape) for t in outputs] == [(5, 3, 6, 6), (5, 4)]


def test_a_network_of_which_folding_is_not_wanted_keeps_its_layers(tmp_path: Path) -> None:
    done = export.export(network("bn"), tmp_path / "net.pt2", fold=False, check=True)
    assert done.card.folded == 0
    program = torch.export.load(tmp_path / "net.pt2")
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_the_network_and_torch_s_random_state_stay_as_they_are(tmp_path: Path) -> None:
    model = network("ws+gn:4")
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    export.export(model, tmp_path / "net.pt2", check=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_that_differs_is_named_with_its_worst_output_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    from anybatch import convert

    true_fold = convert.fold

    def wrong_fold(model: nn.Module, **how: Any) -> Any:
        folded, report = true_fold(model, **how)
        with torch.no_grad():
            next(folded.parameters()).mul_(1.01)
        return folded, report

    network("bn").save_pretrained(tmp_path / "run")
    (tmp_path / "net.onnx").write_bytes(b"good")
    monkeypatch.setattr(convert, "fold", wrong_fold)
    with pytest.raises(CheckError, match=r"differs from resnet8: worst is output 0 of a batch of \d at 3 x 32"):
        export.export(network("bn"), tmp_path / "net.pt2", check=True)
    code, out, err = call("export", "run", "--out", "net.onnx", "--check")
    assert (code, out) == (1, "")
    assert "nothing was written" in err
    assert err.count("\n") == 1
    assert (tmp_path / "net.onnx").read_bytes() == b"good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "run"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 1 else x.reshape(2, -1)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "nothing"


@pytest.mark.parametrize(
    ("make", "path", "how", "message"),
    [
        (network, "net.pth", {}, "path must end in .onnx or .pt2, got 'net.pth'"),
        (network, "folder.onnx", {}, "folder.onnx is a folder"),
        (network, "file/net.onnx", {}, "cannot write file/net.onnx: "),
        (lambda: network().train(), "net.onnx", {}, r"resnet8 is in training mode; call eval\(\)"),
        (lambda: network().half(), "net.onnx", {}, r"resnet8 has tensors of float16; call float\(\)"),
        (lambda: network().double(), "net.pt2", {}, "resnet8 has tensors of float64"),
        (lambda: network().to("meta"), "net.pt2", {}, "resnet8 is on the meta device"),
        (network, "net.onnx", {"size": 3}, r"resnet8 does not take images of shape \(1, 3, 3, 3\): the network takes"),
        (network, "net.onnx", {"size": (1, 32, 32)}, r"resnet8 does not take images of shape \(1, 1, 32, 32\)"),
        (network, "net.onnx", {"size": 0}, "size must be H"),
        (lambda: Flat().eval(), "net.onnx", {}, r"nothing is known of the images of Flat; give size=\(C, H, W\)"),
        (lambda: Flat().eval(), "net.onnx", {"size": 8}, r"channels of Flat; give size=\(C, 8, 8\)"),
        (lambda: nn.Embedding(3, 2).eval(), "net.onnx", {"size": (3, 8, 8)}, "Embedding does not take images of shape"),
        (lambda: Nothing().eval(), "net.onnx", {"size": (3, 8, 8)}, "Nothing gives no tensors"),
        (lambda: Branches().eval(), "net.onnx", {"size": (3, 8, 8)}, "Branches cannot be exported"),
        (lambda: Halves().eval(), "net.pt2", {"size": (3, 8, 8)}, "Halves cannot be exported"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line_and_leaves_files_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, path: str, how: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(b"good")
    Path("net.pt2").write_bytes(b"good")
    Path("folder.onnx").mkdir()
    Path("file").touch()
    with pytest.raises(ValueError, match=message) as told:
        export.export(make(), path, **how)
    assert "\n" not in str(told.value)
    assert Path("net.onnx").read_bytes() == Path("net.pt2").read_bytes() == b"good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.onnx", "net.onnx", "net.pt2"]


def test_detectors_and_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    found = model_named("torchvision:ssdlite320_mobilenet_v3_large", num_classes=2)
    with pytest.raises(ValueError, match="takes lists of images and boxes"):
        export.export(found, tmp_path / "net.onnx")
    network().save_pretrained(tmp_path / "run")
    for library, words in (("onnxscript", ()), ("onnxruntime", ("--check",))):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, library, None)
            code, _, err = call("export", "run", "--out", "net.onnx", *words)
            assert (code, err) == (2, f"error: net.onnx needs {library}: pip install 'anybatch[export]'\n")


def test_a_trained_network_predicts_alike_from_its_folder_and_from_onnx(call: Any, tmp_path: Path) -> None:
    recipe = Recipe().replace({"model.options": {"width": 32}, "model.name": "resnet8"})
    net = recipe.model.build(num_classes=2, in_chans=1)
    nn.init.normal_(net.get_parameter("fc.weight"))
    (tmp_path / "run").mkdir()
    checkpoint.save_model(net, facts(size=20, recipe=recipe.model_dump(mode="json")), tmp_path / "run")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 31, 23), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    code, out, err = call("export", "run", "--out", "net.onnx", "--check", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["card"]["recipe"] == recipe.model_dump(mode="json")
    assert (told["card"]["classes"], told["card"]["mean"], told["card"]["std"]) == (["a", "b"], [0.5], [0.25])
    assert told["relative_error"] < 1e-5
    found = [json.loads(call("predict", source, *tmp_path.glob("*.png"), "--json")[1])["images"]
             for source in ("run", "net.onnx")]  # fmt: skip
    assert len(found[0]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert [c["class"] for c in ours["classes"]] == [c["class"] for c in theirs["classes"]]
        for a, b in zip(ours["classes"], theirs["classes"], strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


def test_the_command_tells_what_it_did(call: Any, tmp_path: Path) -> None:
    code, out, err = call(
        "export", "resnet8", "--scheme", "bn", "--out", "a/net.pt2", "--dynamic-size", "--size", "40x36"
    )
    assert (code, err) == (0, "")
    assert "resnet8 with bn, 9 layers folded" in out
    assert "images of 3x40x36, batch and size are free" in out
    assert "drawn at random" in out
    network("ws+gn:4").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    code, out, err = call("export", "half", "--out", "net.pt2", "--check")
    assert (code, err) == (0, "")
    assert "float32, from bfloat16" in out
    assert "checked at batches 1, 2 and 7" in out
    for words, message in (
        (["resnet8", "--out", "net.pt2", "--size", "big"], "--size takes 224, 224x320 or 3x224x224, got 'big'"),
        (["resnt8", "--out", "net.pt2"], "unknown model 'resnt8'; did you mean resnet8"),
        (["resnet8"], "--out"),
    ):
        code, out, err = call("export", *words)
        assert (code, out) == (2, "")
        assert message in err


def test_predict_refuses_what_is_no_file_of_ours(call: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    export.export(network("bn", num_classes=0), tmp_path / "features.onnx")
    export.export(network("bn"), tmp_path / "net.onnx")
    strange = onnx.load(tmp_path / "net.onnx")
    good = strange.metadata_props[0].value
    for name, value in {
        "broken": good[:40],
        "number": "7",
        "words": good.replace('"mean": [', '"mean": ["x", '),
        "few": good.replace('"0", "1", ', ""),
    }.items():
        strange.metadata_props[0].value = value
        onnx.save(strange, tmp_path / f"{name}.onnx")
    del strange.metadata_props[:]
    onnx.save(strange, tmp_path / "strange.onnx")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "features.onnx").read_bytes()[:1000])
    for file, message in (
        ("few.onnx", "few.onnx names 2 classes and tells 4 apart"),
        ("gone.onnx", "no file at gone.onnx"),
        ("cut.onnx", "cut.onnx is damaged or no ONNX file"),
        ("strange.onnx", f"strange.onnx has no card ({KEY}), and was not written by anybatch export"),
        ("broken.onnx", "broken.onnx: the card is damaged"),
        ("number.onnx", "number.onnx: the card is damaged"),
        ("words.onnx", "words.onnx: default_cfg['mean'] must be finite numbers"),
        ("features.onnx", "tells no images apart"),
    ):
        code, _, err = call("predict", file, "a.png")
        assert code == 2, err
        assert message in err
        assert err.count("\n") == 1


def test_relative_errors_by_hand() -> None:
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(1)) == float("inf")
    assert [t.item() for t in tensors({"a": torch.tensor(1), "b": (torch.tensor(2), ["x", torch.tensor(3)])})] == [
        1,
        2,
        3,
    ]
