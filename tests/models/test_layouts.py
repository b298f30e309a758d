"""Other libraries' names: their logits from their weights, and the same from releases that are rebuilt here."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

import anybatch
from anybatch.models import export_weights, load_weights
from anybatch.models.knresnet import KNResNet
from anybatch.models.layouts import LAYOUTS, SAME_OUTPUTS
from anybatch.models.nfnet import NormalizerFreeNet
from anybatch.models.resnet import PreActBottleneck, ResNet
from anybatch.models.weights import read_weights
from helpers import assert_error_within
from models.checks import assert_same_tensors, made, randomized, small_nf

TIMM = "released=True,eps_rule=add"
FOLDED = f"{TIMM},fold_gain=True,skip_gain=None"


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


def test_notes_name_schemes_that_exist() -> None:
    noted = [scheme for note in SAME_OUTPUTS.values() for scheme in re.findall(r"(?:nf|ws)\([^)]*\)(?:\+\w+)?", note)]
    assert len(noted) >= len(SAME_OUTPUTS)
    for scheme in noted:
        assert anybatch.scheme(scheme).name == scheme


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
    model = made(f"knresnet{depth}", num_classes=7).double()
    told = load_weights(model, tmp_path / "kn.pt")
    assert isinstance(model, KNResNet)
    assert told.layout == ("knresnet" if depth == 50 else "anybatch")  # the others have no 1 x 1 convolutions
    assert sum(value.numel() for value in weights.values()) == sum(p.numel() for p in model.parameters())
    assert_same(model, lambda x: knresnet_by_hand(depth, weights, x), sizes=(96, 101))


# DeepMind's parameters of NFNets and Google's of BiT, as arrays.


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


def test_the_advice_for_pickled_parameters_makes_a_file_that_loads(tmp_path: Path) -> None:
    expected = small_nf("NFNet")
    (tmp_path / "dill.npz").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="holds pickled objects") as told:
        read_weights(tmp_path / "dill.npz")
    advice = re.search(r"write (numpy.savez\(.*\))", str(told.value))
    assert advice is not None
    code = advice[1].replace("'plain.npz'", repr(str(tmp_path / "plain.npz")))
    exec(code, {"numpy": np, "tree": haiku_tree(expected, "NFNet")})
    model = small_nf("NFNet")
    assert load_weights(model, tmp_path / "plain.npz").layout == "deepmind"


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
