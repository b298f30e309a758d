"""Weights that travel: other libraries' logits from their state dicts, releases rebuilt here, refusals, the command."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

import anybatch
from anybatch import cli
from anybatch.models import FeaturePyramid, Network, export_weights, load_weights
from anybatch.models.knresnet import KNResNet
from anybatch.models.layouts import LAYOUTS, SAME_OUTPUTS
from anybatch.models.nfnet import NF_REGNET, NF_RESNET, NFNET, NormalizerFreeNet
from anybatch.models.resnet import PreActBottleneck, ResNet
from anybatch.models.weights import read_weights
from helpers import assert_error_within
from models.checks import randomized, undrawn

TIMM = "released=True,eps_rule=add"
FOLDED = f"{TIMM},fold_gain=True,skip_gain=None"


def made(name: str, scheme: str | None = None, **options: Any) -> Any:
    return undrawn(lambda: anybatch.create_model(name, scheme, **{"num_classes": 10, **options}))


def assert_same(ours: nn.Module, theirs: Callable[[Tensor], Tensor], sizes: tuple[int, ...] = (64, 72)) -> None:
    """The same logits of each image; at 72 pixels the third stage has an odd map, which shows padding at the edges."""
    dtype = next(ours.parameters()).dtype
    for size in sizes:
        x = torch.randn(2, 3, size, size, dtype=dtype)
        with torch.no_grad():
            got, wanted = ours(x), theirs(x)
        assert wanted.std(0).max() > 1e-3 * wanted.abs().max()  # they depend on the image
        limit = 1e-5 if dtype == torch.float32 else 1e-11
        for image, exact in zip(got, wanted, strict=True):
            assert_error_within(image, exact, limit * exact.abs().max().item(), f"logits at {size} pixels")


def assert_same_tensors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].shape == value.shape, key
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize(
    ("theirs", "ours", "scheme", "options"),
    [
        ("dm_nfnet_f0", "nfnet_f0", f"nf(act=gelu,{TIMM})", {}),
        ("nf_resnet50", "nf_resnet50", f"nf({FOLDED})", {"padding": "symmetric", "pooled": True}),
        ("nf_regnet_b1", "nf_regnet_b1", f"nf(act=silu,{FOLDED})", {"padding": "symmetric", "round_to": 8}),
        ("resnet50_gn", "resnet50", "gn", {}),
        ("resnetv2_50x1_bit", "preact_resnet50", "ws(eps=1e-8)+gn", {"stem": "bit"}),
        ("convnext_tiny", "convnext_tiny", None, {}),
    ],
    ids=lambda value: value if isinstance(value, str) and "_" in value else "",
)
def test_timms_weights_give_timms_logits_and_go_back(
    theirs: str, ours: str, scheme: str | None, options: dict[str, Any]
) -> None:
    expected = randomized(timm.create_model(theirs, num_classes=10))
    model = made(ours, scheme, **options)
    if "bit" in theirs:  # standardized filters magnify a pre-activated network's signals, and with them rounding
        expected, model = expected.double(), model.double()
    told = load_weights(model, expected.state_dict())
    assert told.layout == ("timm" if theirs != "resnet50_gn" else "anybatch")  # its names are ours
    assert not told.missing
    assert not told.unused
    assert_same(model, expected)
    exported = export_weights(model, "timm")
    assert_same_tensors(exported, expected.state_dict())
    expected.load_state_dict(exported, strict=True)
    again = made(ours, scheme, **options).to(next(model.parameters()).dtype)
    load_weights(again, exported, layout="timm")
    assert_same_tensors(again.state_dict(), model.state_dict())
    if isinstance(model, NormalizerFreeNet):  # which names all but one thing as timm does
        plain = made(ours, scheme, **options)
        renamed = {key.replace("skipinit_gain", "join.gain"): value for key, value in expected.state_dict().items()}
        plain.load_state_dict(renamed, strict=True)
        assert_same_tensors(plain.state_dict(), model.state_dict())


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


@pytest.mark.parametrize(
    ("theirs", "ours", "scheme"),
    [("resnext50_32x4d", "resnext50_32x4d", "bn"), ("convnext_tiny", "convnext_tiny", None)],
)
def test_torchvisions_weights(theirs: str, ours: str, scheme: str | None, tmp_path: Path) -> None:
    expected = randomized(torchvision.models.get_model(theirs, weights=None, num_classes=10))
    torch.save(expected.state_dict(), tmp_path / "theirs.pth")
    model = made(ours, scheme)
    told = load_weights(model, tmp_path / "theirs.pth")
    assert told.layout == ("torchvision" if "conv" in theirs else "anybatch")
    assert_same(model, expected)
    assert_same_tensors(export_weights(model, "torchvision"), expected.state_dict())


def test_densenets_old_names() -> None:
    expected = randomized(torchvision.models.densenet121(num_classes=10))
    old = {re.sub(r"(layer\d+\.(norm|conv))([12])", r"\1.\3", k): v for k, v in expected.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    model = made("densenet121", "bn")
    assert load_weights(model, old).layout == "torchvision"
    assert_same(model, expected)


def test_nested_and_prefixed_state_dicts() -> None:
    like = randomized(anybatch.create_model("resnet8", num_classes=2)).state_dict()
    other = {f"module.{key}": value for key, value in like.items()}
    averaged = {f"module.{key}": value + 1 for key, value in like.items()}
    model = made("resnet8", num_classes=2)
    load_weights(model, {"epoch": 3, "state_dict": other, "optimizer": {"state": {0: {"m": torch.zeros(1)}}}})
    assert_same_tensors(model.state_dict(), like)
    load_weights(model, {"state_dict": other, "state_dict_ema": averaged})
    torch.testing.assert_close(model.conv1.weight, like["conv1.weight"] + 1, rtol=0, atol=0)


# The releases of Weight Standardization and Batch-Channel Norm and mmcv's ConvAWS, in torchvision's network.


class ReleasedWS(nn.Conv2d):
    outside = True

    def filters(self) -> Tensor:
        w = self.weight.flatten(1)
        w = w - w.mean(1, keepdim=True)
        variance = w.var(1, keepdim=True)
        scaled = w / (variance.sqrt() + 1e-5) if self.outside else w / (variance + 1e-5).sqrt()
        return scaled.view_as(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.filters(), self.bias, self.stride, self.padding, 1, self.groups)


class ReleasedBCNsWS(ReleasedWS):
    outside = False


class ReleasedAWS(ReleasedBCNsWS):
    weight_gamma: Tensor
    weight_beta: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("weight_gamma", torch.ones(self.out_channels, 1, 1, 1))
        self.register_buffer("weight_beta", torch.zeros(self.out_channels, 1, 1, 1))

    def filters(self) -> Tensor:
        return self.weight_gamma * super().filters() + self.weight_beta


class EstBN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("estbn_moving_speed", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)  # pyright: ignore[reportArgumentType]


class BCNorm(nn.Module):
    def __init__(self, channels: int, inner: type[nn.Module] = EstBN) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, 32, 1)), nn.Parameter(torch.zeros(1, 32, 1))
        self.bn = inner(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(x).reshape(1, len(x) * 32, -1)
        h = F.batch_norm(h, None, None, training=True).reshape(len(x), 32, -1)
        return (h * self.weight + self.bias).view_as(x)


def released(conv: type[nn.Conv2d], norm: Callable[[int], nn.Module]) -> Any:
    model = torchvision.models.resnet18(num_classes=10, norm_layer=norm)  # pyright: ignore[reportArgumentType]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Conv2d:
            parent, _, last = name.rpartition(".")
            stride, padding = module.stride, module.padding
            sizes = (module.in_channels, module.out_channels, module.kernel_size)
            setattr(model.get_submodule(parent), last, conv(*sizes, stride, padding, bias=False))  # pyright: ignore[reportArgumentType]
    return randomized(model).double()


def test_the_release_of_weight_standardization() -> None:
    expected = released(ReleasedWS, lambda channels: nn.GroupNorm(32, channels))
    model = made("resnet18", "ws(variant=paper)+gn").double()
    load_weights(model, expected.state_dict())
    assert_same(model, expected)


@pytest.mark.parametrize("statistics", ["estimate", "batch"])
def test_the_release_of_batch_channel_norm(statistics: str) -> None:
    inner = EstBN if statistics == "estimate" else nn.BatchNorm2d
    expected = released(ReleasedBCNsWS, lambda channels: BCNorm(channels, inner))
    model = made("resnet18", f"ws(variant=bcn)+bcn(statistics={statistics})").double()
    told = load_weights(model, expected.state_dict())
    assert_same(model, expected)
    if statistics == "estimate":
        assert told.layout == "ws"
        assert told.unused == [key for key in expected.state_dict() if key.endswith("estbn_moving_speed")]
        assert {key.rpartition(".")[2] for key in told.missing} == {"num_batches_tracked"}
        before = model.bn1.bn.running_mean.clone()
        model.train()(torch.randn(2, 3, 64, 64).double())
        # Far behind the warm start, where the first batch would take the place of what was loaded.
        assert 0 < (model.bn1.bn.running_mean - before).abs().max() < 0.1


def test_mmcvs_conv_aws_within_a_detector() -> None:
    expected = released(ReleasedAWS, nn.BatchNorm2d)
    backbone = {f"backbone.{key}": value for key, value in expected.state_dict().items() if not key.startswith("fc.")}
    detector = {**backbone, "neck.fpn_convs.0.conv.weight": torch.ones(1), "rpn_head.rpn_cls.bias": torch.ones(1)}
    model = made("resnet18", "ws(variant=aws)+bn", num_classes=0).double()
    told = load_weights(model, {"meta": {"epoch": 12}, "state_dict": detector})
    assert told.layout == "mmcv"
    assert told.unused == ["neck.fpn_convs.0.conv.weight", "rpn_head.rpn_cls.bias"]
    expected.fc = nn.Identity()
    assert_same(model, expected)


def test_mmcvs_names_of_group_norms_and_its_classifier() -> None:
    expected = released(ReleasedWS, lambda channels: nn.GroupNorm(32, channels)).state_dict()
    theirs = {
        f"head.{key}" if key.startswith("fc.") else "backbone." + re.sub(r"(^|\.)bn(\d)", r"\1gn\2", key): value
        for key, value in expected.items()
    }
    assert "backbone.layer1.0.gn1.weight" in theirs
    model = made("resnet18", "ws(variant=paper)+gn").double()
    assert load_weights(model, theirs).layout == "mmcv"
    assert_same_tensors(model.state_dict(), expected)


def test_batch_norm_weights_into_conv_aws_compute_what_they_did() -> None:
    expected = randomized(torchvision.models.resnet18(num_classes=10)).double()
    model = made("resnet18", "ws(variant=aws)+bn").double()
    told = load_weights(model, expected.state_dict())
    assert {key.rpartition(".")[2] for key in told.missing} == {"weight_gamma", "weight_beta"}
    assert_same(model, expected)


# KNResNet's release, from its description alone.

KNRESNETS = {  # stem; (blocks, channels, inner) of the stages; channels of the tail
    18: (64, ((2, 64, 256), (2, 256, 256), (1, 512, 512), (1, 724, 724)), 512),
    34: (64, ((4, 64, 256), (5, 256, 320), (3, 512, 640), (2, 512, 843)), 512),
    50: (256, ((4, 256, 64), (5, 512, 128), (4, 810, 201), (2, 2048, 512)), None),
}


def kernels(depth: int, stage: int) -> tuple[int, ...]:
    return (2, 2) if depth < 50 else (1, 3, 1) if stage == 3 else (2, 3, 2)


def released_knresnet(depth: int, classes: int) -> dict[str, Tensor]:
    """A checkpoint under the release's names."""
    stem, stages, tail = KNRESNETS[depth]
    weights: dict[str, Tensor] = {}

    def conv(name: str, out_channels: int, in_channels: int, kernel: int) -> None:
        name += ".conv1x1" if kernel == 1 else ""
        fan = in_channels * kernel**2
        weights[f"{name}.weight"] = torch.randn(out_channels, in_channels, kernel, kernel).double() * fan**-0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(out_channels).double()

    conv("block0.0", stem, 3, 7)
    block = 0
    for i, (count, channels, inner) in enumerate(stages):
        if i > 0:
            conv(f"trans_block{i}.conv", channels, stages[i - 1][1], 1 if depth == 50 and i == 3 else 2)
        for _ in range(count):
            block += 1
            sizes = kernels(depth, i)
            widths = (channels, *(inner for _ in sizes[1:]), channels)
            for j, kernel in enumerate(sizes):
                conv(f"res_block{block}.conv{j + 1}", widths[j + 1], widths[j], kernel)
    if tail:
        conv("conv_block_f.conv", tail, stages[3][1], 2)
    weights["fc.weight"] = torch.randn(classes, tail or 2048).double() * 0.05
    weights["fc.bias"] = torch.randn(classes).double()
    return weights


def knresnet_by_hand(depth: int, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Its forward pass: every window normalized by its own mean and variance, padding zeros counted."""

    def kn_conv(name: str, x: Tensor, pads: tuple[int, ...] = (0, 0, 0, 0), stride: int = 1) -> Tensor:
        name += ".conv1x1" if f"{name}.conv1x1.weight" in weights else ""
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        x = F.pad(x, pads)
        kernel = weight.shape[-1]
        mean = F.avg_pool2d(x.mean(1, keepdim=True), kernel, stride)
        square = F.avg_pool2d(x.square().mean(1, keepdim=True), kernel, stride)
        centered = F.conv2d(x, weight, stride=stride) - mean * weight.sum((1, 2, 3))[:, None, None]
        return centered * (square - mean.square() + 1e-5).rsqrt() + bias[:, None, None]

    _, stages, tail = KNRESNETS[depth]
    x = F.max_pool2d(kn_conv("block0.0", x, (3, 3, 3, 3), 2), 3, 2, 1)
    block = 0
    pads = ((), (1, 0, 1, 0), (0, 1, 0, 1), (2, 1, 2, 1) if depth < 50 else (0, 0, 0, 0))
    for i, (count, _, _) in enumerate(stages):
        if i > 0:
            x = F.max_pool2d(kn_conv(f"trans_block{i}.conv", x.relu(), pads[i]), 2)
        for _ in range(count):
            block += 1
            h = x
            for j, kernel in enumerate(kernels(depth, i)):
                pad = {1: 0, 3: 1, 2: 1 if j == 0 else 0}[kernel]
                h = kn_conv(f"res_block{block}.conv{j + 1}", h.relu(), (pad,) * 4)
            x = x + h
    if tail:
        x = kn_conv("conv_block_f.conv", F.max_pool2d(x, 2).relu())
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    x = ((x - mean) * (variance + 1e-5).rsqrt()).relu().mean((2, 3))
    return F.linear(x, weights["fc.weight"], weights["fc.bias"])


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_the_release_of_knresnet(depth: int, tmp_path: Path) -> None:
    torch.manual_seed(depth)
    weights = released_knresnet(depth, 7)
    torch.save({"model": weights, "epoch": 99}, tmp_path / "kn.pt")
    model = made(f"knresnet{depth}", "kn", num_classes=7).double()
    told = load_weights(model, tmp_path / "kn.pt")
    assert isinstance(model, KNResNet)
    assert told.layout == ("knresnet" if depth == 50 else "anybatch")  # the others have no 1 x 1 convolutions
    assert sum(value.numel() for value in weights.values()) == sum(p.numel() for p in model.parameters())
    assert_same(model, lambda x: knresnet_by_hand(depth, weights, x), sizes=(96, 101))


# DeepMind's parameters of NFNets and Google's of BiT, as arrays.


def small_nf(kind: str) -> Any:
    shape, stem, root = {
        "NFNet": (NFNET, "deep", 16),
        "NF_ResNet": (NF_RESNET, "7x7", 8),
        "NF_RegNet": (NF_REGNET, "3x3", 8),
    }[kind]
    return randomized(
        NormalizerFreeNet(
            anybatch.scheme("nf(act=gelu_tanh)"),
            stem=stem,  # pyright: ignore[reportArgumentType]
            stem_channels=root,
            widths=(32, 64, 64, 96),
            depths=(1, 2, 1, 2),
            strides=(1, 2, 2, 2) if stem != "3x3" else (2, 2, 2, 2),
            ratio=0.5,
            shape=shape if shape.group_width is None else type(shape)(**{**vars(shape), "group_width": 8}),
            final_channels=None if stem == "7x7" else 48,
            num_classes=5,
        )
    )


def haiku_tree(model: Any, root: str) -> dict[str, dict[str, np.ndarray]]:
    """The network's parameters as haiku holds them."""
    tree: dict[str, dict[str, np.ndarray]] = {}

    def conv(name: str, module: Any) -> None:
        w = module.weight.detach().numpy().transpose(2, 3, 1, 0)
        tree[name] = {"w": w, "gain": module.gain.detach().numpy(), "bias": module.bias.detach().numpy()}

    def linear(name: str, module: Any) -> None:
        tree[name] = {"w": module.weight.detach().numpy().T, "b": module.bias.detach().numpy()}

    if root == "NFNet":
        for i in range(4):
            conv(f"{root}/~/stem_conv{i}", getattr(model.stem, f"conv{i + 1}"))
    else:
        conv(f"{root}/~/initial_conv", model.stem.conv)
    kind = "nf_res_block" if root == "NF_ResNet" else "nf_block"
    for k, block in enumerate(block for stage in model.stages for block in stage):
        name = f"{root}/~/{kind}_{k}" if k else f"{root}/~/{kind}"
        tree[name] = {"skip_gain": block.join.gain.detach().numpy()}
        conv(f"{name}/~/conv0", block.conv1)
        conv(f"{name}/~/conv1", block.conv2)
        if root == "NFNet":
            conv(f"{name}/~/conv1b", block.conv2b)
        conv(f"{name}/~/conv2", block.conv3)
        if block.downsample is not None:
            conv(f"{name}/~/conv_shortcut", block.downsample.conv)
        if root != "NF_ResNet":
            gate = block.attn_last if root == "NFNet" else block.attn
            linear(f"{name}/~/squeeze_excite/~/linear", gate.fc1)
            linear(f"{name}/~/squeeze_excite/~/linear_1", gate.fc2)
    if root != "NF_ResNet":
        conv(f"{root}/~/final_conv", model.final_conv)
    linear(f"{root}/~/linear", model.head.fc)
    return tree


@pytest.mark.parametrize("kind", ["NFNet", "NF_ResNet", "NF_RegNet"])
@pytest.mark.parametrize("spelling", ["slashes", "dots", "nested"])
def test_deepminds_parameters(kind: str, spelling: str, tmp_path: Path) -> None:
    expected = small_nf(kind)
    tree: Any = haiku_tree(expected, kind)
    flat = {f"{module}/{name}": value for module, values in tree.items() for name, value in values.items()}
    if spelling == "dots":
        flat = {key.replace("/~/", ".").replace("/", "."): value for key, value in flat.items()}
    np.savez(tmp_path / "plain.npz", **flat)
    model = small_nf(kind)
    for p in model.parameters():
        nn.init.constant_(p, float("nan"))
    told = load_weights(model, tree if spelling == "nested" else tmp_path / "plain.npz")
    assert told.layout == "deepmind"
    assert set(told.mapped.values()) == flat.keys()
    assert_same_tensors(model.state_dict(), expected.state_dict())
    assert_same(model, expected)


@pytest.mark.parametrize(("name", "modules"), [("nfnet_f0", 94), ("nfnet_f1", 178)])
def test_nfnets_have_as_many_modules_as_haiku_counts(name: str, modules: int) -> None:
    with torch.device("meta"):
        model: Any = anybatch.create_model(name)
    table = LAYOUTS["deepmind"].table(model)
    assert len({table.name(key).rpartition(".")[0] for key in model.state_dict()}) == modules


def test_googles_arrays_of_bit_as_timm_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = randomized(ResNetV2([2, 1, 1, 2], (128, 256, 512, 1024), 5, stem_chs=32, stem_type="fixed"))
    arrays = {}

    def conv(name: str, module: Any) -> None:
        arrays[f"resnet/{name}/standardized_conv2d/kernel"] = module.weight.detach().numpy().transpose(2, 3, 1, 0)

    def norm(name: str, module: Any) -> None:
        arrays[f"resnet/{name}gamma"], arrays[f"resnet/{name}beta"] = (
            p.detach().numpy() for p in (module.weight, module.bias)
        )

    conv("root_block", theirs.stem.conv)
    norm("group_norm/", theirs.norm)
    for i, stage in enumerate(theirs.stages):
        for j, block in enumerate(stage.blocks):
            for k, letter in enumerate("abc", 1):
                conv(f"block{i + 1}/unit{j + 1:02d}/{letter}", getattr(block, f"conv{k}"))
                norm(f"block{i + 1}/unit{j + 1:02d}/{letter}/group_norm/", getattr(block, f"norm{k}"))
            if block.downsample is not None:
                conv(f"block{i + 1}/unit{j + 1:02d}/a/proj", block.downsample.conv)
    arrays["resnet/head/conv2d/kernel"] = theirs.head.fc.weight.detach().numpy().transpose(2, 3, 1, 0)
    arrays["resnet/head/conv2d/bias"] = theirs.head.fc.bias.detach().numpy()
    np.savez(tmp_path / "bit.npz", **arrays)
    again = ResNetV2([2, 1, 1, 2], (128, 256, 512, 1024), 5, stem_chs=32, stem_type="fixed").eval()
    with torch.no_grad():
        again.load_pretrained(str(tmp_path / "bit.npz"))
    scheme = anybatch.scheme("ws(variant=timm)+gn")
    model = ResNet(scheme, PreActBottleneck, (2, 1, 1, 2), num_classes=5, width=32, stem="bit").eval()
    assert load_weights(model, tmp_path / "bit.npz").layout == "bit"
    assert_same(model.double(), again.double())


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


def test_the_advice_for_pickled_parameters_makes_a_file_that_loads(tmp_path: Path) -> None:
    expected = small_nf("NFNet")
    advice = re.search(r"write (numpy.savez\(.*\))", str(_refusal(tmp_path)))
    assert advice is not None
    code = advice[1].replace("'plain.npz'", repr(str(tmp_path / "plain.npz")))
    exec(code, {"numpy": np, "tree": haiku_tree(expected, "NFNet")})
    model = small_nf("NFNet")
    assert load_weights(model, tmp_path / "plain.npz").layout == "deepmind"


def _refusal(folder: Path) -> ValueError:
    (folder / "dill.npz").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="holds pickled objects") as told:
        read_weights(folder / "dill.npz")
    return told.value


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "weights.h5").touch()
    np.save(tmp_path / "lone.npy", np.zeros(3))
    (tmp_path / "lone.npy").rename(tmp_path / "lone.npz")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    np.savez(tmp_path / "words.npz", a=np.array(["x"]))
    for name, message in {
        "none.pt": "no file of weights at",
        "cut.safetensors": "is damaged or cut off",
        "cut.npz": "is damaged or cut off",
        "weights.h5": r"of unknown kind '.h5'; give one of .safetensors, .npz, .pt, .pth, .bin, .tar",
        "lone.npz": "holds a ndarray and no named tensors",
        "list.pt": "holds a list and no named tensors",
        "empty.pt": "holds no tensors",
        "words.npz": "array a: .*store it as float32",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name)


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


def test_notes_name_schemes_that_exist() -> None:
    noted = [scheme for note in SAME_OUTPUTS.values() for scheme in re.findall(r"(?:nf|ws)\([^)]*\)(?:\+\w+)?", note)]
    assert len(noted) >= len(SAME_OUTPUTS)
    for scheme in noted:
        assert anybatch.scheme(scheme).name == scheme


# The command.


@pytest.fixture
def call(capsys: Any, monkeypatch: Any, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anybatch", "convert", "weights", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def test_the_command_converts_from_torchvision_and_to_timm(call: Any) -> None:
    theirs = randomized(torchvision.models.resnet18(num_classes=4)).state_dict()
    torch.save(theirs, "theirs.pth")
    code, out, err = call("theirs.pth", "--model", "resnet18", "--scheme", "bn", "--out", "new/ours.safetensors")
    assert code == 0, err
    assert "122 tensors of resnet18 with bn and 4 classes" in " ".join(out.split())
    assert_same_tensors(load_file("new/ours.safetensors"), theirs)
    with safe_open("new/ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"model": "resnet18", "scheme": "bn", "options": "{}", "layout": "anybatch"}

    options: list[object] = ["--model", "preact_resnet50", "--scheme", "ws(eps=1e-8)+gn:auto"]
    options += ["--option", "stem=bit", "--option", "width=8"]
    model: Any = anybatch.create_model("preact_resnet50", "ws+gn:auto", num_classes=3, stem="bit", width=8)
    save_file(model.state_dict(), "ours.safetensors")
    code, out, err = call("ours.safetensors", *options, "--to", "timm", "--out", "timm.safetensors", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["classes"] == 3
    assert told["options"] == {"stem": "bit", "width": 8}
    assert "stages.0.blocks.0.norm1.weight" in load_file("timm.safetensors")
    code, out, err = call("timm.safetensors", *options, "--out", "back.safetensors", "--num-classes", 3)
    assert code == 0, err
    assert "the same outputs as there take: for BiT scheme ws(eps=1e-08)+gn" in " ".join(out.split())
    assert_same_tensors(load_file("back.safetensors"), model.state_dict())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.pth", "--model", "resnet8", "--out", "o.safetensors"], "no file of weights at none.pth"),
        (["ours.safetensors", "--model", "resnet9", "--out", "o.safetensors"], "unknown model 'resnet9'"),
        (["ours.safetensors", "--model", "resnet8", "--out", "o.pt"], "--out must end in .safetensors, got o.pt"),
        (["ours.safetensors", "--model", "resnet14", "--out", "o.safetensors"], "its weights fit resnet8 with scheme"),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--num-classes", 5],
            "tells 3 classes apart, the network 5",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--option", "stem"],
            "takes key=value",
        ),
        (
            ["ours.safetensors", "--model", "resnet8", "--out", "o.safetensors", "--to", "tim"],
            "unknown layout to export 'tim'",
        ),
    ],
)
def test_mistakes_at_the_command_line(call: Any, words: list[object], message: str) -> None:
    model: Network = anybatch.create_model("resnet8", num_classes=3)  # pyright: ignore[reportAssignmentType]
    save_file(model.state_dict(), "ours.safetensors")
    code, out, err = call(*words)
    assert code == 2
    assert message in " ".join(err.split())
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not list(Path().glob("o.*"))
