"""Weights that travel: nested state dicts, files that are read and refused, other networks' weights, exported names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import anybatch
from anybatch.models import FeaturePyramid, export_weights, load_weights
from anybatch.models.weights import read_weights
from models.checks import assert_same_tensors, made, randomized


def test_nested_and_prefixed_state_dicts() -> None:
    like = randomized(anybatch.create_model("resnet8", num_classes=2)).state_dict()
    other = {f"module.{key}": value for key, value in like.items()}
    averaged = {f"module.{key}": value + 1 for key, value in like.items()}
    model = made("resnet8", num_classes=2)
    load_weights(model, {"epoch": 3, "state_dict": other, "optimizer": {"state": {0: {"m": torch.zeros(1)}}}})
    assert_same_tensors(model.state_dict(), like)
    load_weights(model, {"state_dict": other, "state_dict_ema": averaged})
    torch.testing.assert_close(model.conv1.weight, like["conv1.weight"] + 1, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("theirs", "ours", "scheme", "options"),
    [
        ("dm_nfnet_f3", "nfnet_f3", None, {}),
        ("nf_resnet26", "nf_resnet26", "nf(skip_gain=None)", {}),
        ("nf_regnet_b3", "nf_regnet_b3", "nf(skip_gain=None)", {"round_to": 8}),
        ("resnetv2_101x3_bit", "preact_resnet101", "ws+gn", {"stem": "bit", "width": 192}),
        ("vgg11_bn", "vgg11", "bn", {}),
        ("vgg16", "vgg16", "none", {}),
        ("densenet121", "densenet121", "bn", {}),
        ("convnext_base", "convnext_base", None, {}),
    ],
)
def test_names_and_shapes_of_exported_weights_are_timms(
    theirs: str, ours: str, scheme: str | None, options: dict[str, Any]
) -> None:
    with torch.device("meta"):
        expected = timm.create_model(theirs).state_dict()
        exported = export_weights(anybatch.create_model(ours, scheme, **options), "timm")  # pyright: ignore[reportArgumentType]
    assert {k: tuple(v.shape) for k, v in exported.items()} == {k: tuple(v.shape) for k, v in expected.items()}


def test_a_narrow_vgg_goes_to_timms_layout_and_back() -> None:
    model = randomized(anybatch.create_model("vgg11", "bn", num_classes=3, width=4))
    exported = export_weights(model)
    assert exported["pre_logits.fc1.weight"].shape == (256, 32, 7, 7)
    again = made("vgg11", "bn", num_classes=3, width=4)
    assert load_weights(again, exported).layout == "timm"
    assert_same_tensors(again.state_dict(), model.state_dict())


# What is refused.


def test_another_networks_weights_are_told_and_leave_the_network_alone() -> None:
    theirs = randomized(torchvision.models.resnet34()).state_dict()
    model: Any = anybatch.create_model("resnet18", "bn")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="the state dict holds another network's weights") as told:
        load_weights(model, theirs)
    text = str(told.value)
    assert "unexpected: layer1.2.bn1.bias, layer1.2.bn1.num_batches_tracked" in text
    # Of 16 blocks 8 more than in resnet18, with 12 tensors each.
    assert text.count("layer") == 10
    assert "and 86 more" in text
    assert "its weights fit resnet34 with scheme bn" in text
    assert_same_tensors(model.state_dict(), before)


def test_another_shape_and_another_scheme_are_told() -> None:
    bn: Any = randomized(anybatch.create_model("resnet8", "bn", num_classes=10)).state_dict()
    wide: Any = anybatch.create_model("resnet8", "bn", num_classes=10, width=32)
    with pytest.raises(ValueError, match=r"of another shape: bn1.bias \(16,\) for \(32,\), .* and \d+ more"):
        load_weights(wide, bn)
    plain: Any = anybatch.create_model("resnet8", "gn:auto", num_classes=10)
    with pytest.raises(
        ValueError, match=r"unexpected: bn1.num_batches_tracked.*; its weights fit resnet8 with scheme bn"
    ):
        load_weights(plain, bn)
    told = load_weights(plain, bn, strict=False)
    assert "bn1.running_mean" in told.unused
    torch.testing.assert_close(plain.conv1.weight, bn["conv1.weight"], rtol=0, atol=0)


def test_a_classifier_of_another_size() -> None:
    theirs: Any = randomized(anybatch.create_model("resnet8", num_classes=10)).state_dict()
    model: Any = anybatch.create_model("resnet8", num_classes=3)
    with pytest.raises(ValueError, match=r"tells 10 classes apart, the network 3; build it with num_classes=10, or"):
        load_weights(model, theirs)
    own = model.fc.weight.clone()
    told = load_weights(model, theirs, classifier="skip")
    assert told.missing == ["fc.bias", "fc.weight"]
    assert torch.equal(model.fc.weight, own)
    assert torch.equal(model.conv1.weight, theirs["conv1.weight"])
    load_weights(model, theirs, classifier="adapt")
    assert model.num_classes == 10
    assert_same_tensors(model.state_dict(), theirs)
    features: Any = anybatch.create_model("resnet8", num_classes=0)
    assert load_weights(features, theirs).unused == ["fc.weight", "fc.bias"]
    with pytest.raises(ValueError, match=r"missing: fc.bias, fc.weight; keep the network's own classifier with"):
        load_weights(model, features.state_dict())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "dill.npz").write_bytes(pickle.dumps({"NFNet/~/linear": Evil(ran)}))
    np.savez(tmp_path / "objects.npz", tree=np.array(Evil(ran), dtype=object))
    torch.save({"weight": torch.ones(1), "evil": Evil(ran)}, tmp_path / "evil.pt")
    model: Any = anybatch.create_model("resnet8")
    for name in ("dill.npz", "objects.npz"):
        with pytest.raises(ValueError, match=r"would run whatever code .*numpy.savez\('plain.npz'"):
            load_weights(model, tmp_path / name)
    with pytest.raises(ValueError, match=r"would run whatever code .* save model.state_dict\(\) alone"):
        load_weights(model, tmp_path / "evil.pt")
    assert not ran.exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "weights.h5").touch()
    for kind in ("npz", "pt", "ckpt"):
        (tmp_path / f"text.{kind}").write_text("hello\n")
    save_file({"a": torch.zeros(1)}, tmp_path / "tensors.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "torch.npz")
    torch.save({"a": torch.zeros(1)}, tmp_path / "torch.safetensors")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(1))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pth")
    np.save(tmp_path / "lone.npy", np.zeros(3))
    (tmp_path / "lone.npy").rename(tmp_path / "lone.npz")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    np.savez(tmp_path / "words.npz", a=np.array(["x"]))
    for name, message in {
        "none.pt": "no file of weights at",
        "cut.safetensors": "is damaged or cut off, or no .safetensors file",
        "cut.npz": "is damaged or cut off",
        "weights.h5": r"of unknown kind '.h5'; give one of .safetensors, .npz, .pt, .pth, .ckpt, .bin, .tar",
        "text.npz": r"is damaged or cut off, or no .npz file: ValueError it does not begin as numpy's files do",
        "text.pt": r"text.pt is damaged or cut off, or no .pt file",
        "text.ckpt": r"text.ckpt is damaged or cut off, or no .ckpt file",
        "tensors.pt": r"tensors.pt holds what a .safetensors file holds; give its name that ending",
        "torch.npz": r"torch.npz holds what a .pt file holds",
        "torch.safetensors": r"torch.safetensors holds what a .pt file holds",
        "arrays.pth": r"arrays.pth holds what a .npz file holds",
        "lone.npz": "holds a ndarray and no named tensors",
        "list.pt": "holds a list and no named tensors",
        "empty.pt": "holds no tensors",
        "words.npz": "array a: .*store it as float32",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("kind", ["pt", "old.pt", "npz", "safetensors"])
def test_a_damaged_file_is_told_in_one_line_whatever_reading_it_stumbles_over(tmp_path: Path, kind: str) -> None:
    tensors: Any = {f"{i}.weight": torch.randn(7, i + 1) for i in range(6)}
    path = tmp_path / f"whole.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **{key: value.numpy() for key, value in tensors.items()})
    elif kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pt")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    damaged = tmp_path / f"damaged.{kind}"
    told = []
    for _ in range(150):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            content[place] = random.integers(256)
        damaged.write_bytes(content[: random.integers(len(whole))] if random.random() < 0.2 else content)
        try:
            read_weights(damaged)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 15
    assert all((str(damaged) in text or text.startswith("array")) and "\n" not in text for text in told)


def test_words_in_front_of_all_names_are_left_out() -> None:
    like = randomized(anybatch.create_model("resnet8", num_classes=2)).state_dict()
    for prefix in ("model.", "net.", "module.model.", "backbone.", "model._orig_mod."):
        model = made("resnet8", num_classes=2)
        told = load_weights(model, {"state_dict": {f"{prefix}{key}": value for key, value in like.items()}})
        assert told.layout == "anybatch"
        assert told.mapped["conv1.weight"] == f"{prefix}conv1.weight"
        assert not told.unused
        assert_same_tensors(model.state_dict(), like)


def test_layouts_of_other_families_are_not_tried() -> None:
    like = randomized(anybatch.create_model("resnet18", "bn", num_classes=512, width=8)).state_dict()
    model = made("resnet18", "bn", num_classes=512, width=8)
    some = {f"model.{key}": value for key, value in like.items()} | {"loss.weight": torch.ones(1)}
    assert load_weights(model, some, strict=False).layout not in ("deepmind", "bit")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_numbers_of_another_kind_are_refused(dtype: torch.dtype) -> None:
    model = made("resnet8", num_classes=2)
    like = randomized(anybatch.create_model("resnet8", num_classes=2)).state_dict()
    with pytest.raises(ValueError, match=rf"no floating point: fc.weight {dtype}"):
        load_weights(model, {**like, "fc.weight": like["fc.weight"].to(dtype)})
    assert model.fc.weight.isnan().all()


def test_a_classifier_of_no_dimension_and_images_of_other_channels_are_told() -> None:
    like = randomized(anybatch.create_model("resnet8", num_classes=2)).state_dict()
    with pytest.raises(ValueError, match=r"of another shape: fc.weight \(\) for \(2, 64\)"):
        load_weights(made("resnet8", num_classes=2), {**like, "fc.weight": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="takes images of 3 channels, the network 1; build it with in_chans=3"):
        load_weights(made("resnet8", num_classes=2, in_chans=1), like)


@pytest.mark.parametrize(
    ("name", "options", "layouts"),
    [
        ("knresnet18", {}, ("timm", "torchvision")),
        ("knresnet18_seg", {}, ("timm", "torchvision")),
        ("resnet8_kn", {}, ("timm", "torchvision")),
        ("vgg11", {"stem": "cifar"}, ("timm", "torchvision")),
        ("densenet40_12", {}, ("timm", "torchvision")),
        ("wide_resnet28_10", {}, ("timm", "torchvision")),
        ("resnet18", {"stem": "cifar"}, ("timm", "torchvision")),
        ("preact_resnet18", {}, ("torchvision",)),
        ("nf_resnet26", {}, ("torchvision",)),
    ],
)
def test_networks_that_the_other_library_lacks_are_not_exported(
    name: str, options: dict[str, Any], layouts: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        model: Any = anybatch.create_model(name, **options)
    for layout in layouts:
        with pytest.raises(ValueError, match=f"{layout} has no network like this {name}; its weights travel under our"):
            export_weights(model, layout)


def test_refused_arguments() -> None:
    model: Any = anybatch.create_model("resnet8")
    with pytest.raises(ValueError, match="unknown layout 'tim'; did you mean timm"):
        load_weights(model, model.state_dict(), layout="tim")
    with pytest.raises(ValueError, match="unknown layout to export 'mmcv'"):
        export_weights(model, "mmcv")
    with pytest.raises(ValueError, match="classifier must be 'load', 'skip' or 'adapt', got 'no'"):
        load_weights(model, model.state_dict(), classifier="no")  # pyright: ignore[reportArgumentType]
    pyramid: Any = FeaturePyramid(model)
    with pytest.raises(TypeError, match="must be a network of create_model, got FeaturePyramid"):
        load_weights(pyramid, {})
