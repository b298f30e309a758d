"""KNResNets and the networks for private training: counts, traces, dropout, blocks by hand, the release's names."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.layers import KernelNorm2d, KNConv2d
from anybatch.measure import multiply_adds
from anybatch.methods.common import Taken
from anybatch.models import FeaturePyramid, list_models, load_weights, model_entry, model_options
from anybatch.models.blocks import Pieces
from anybatch.models.knresnet import Block, ConvBlock, KNResNet, Stage, Transition
from models.checks import (
    assert_a_step_reaches_every_parameter,
    assert_checkpointing_changes_memory_alone,
    assert_pyramid_fits,
    assert_survives_wrapping,
    parameters,
)

CLASSIFIERS = ["knresnet18", "knresnet34", "knresnet50"]
SEGMENTERS = [f"{name}_seg" for name in CLASSIFIERS]
PRIVATE = ["knresnet13", "resnet8_kn", "densenet20x16_kn", "preact_resnet18_kn"]
KN_TWINS = [name for name in list_models() if name.startswith(("knvgg", "kndensenet"))]
COUNTERPARTS = {"knresnet18": 1.96, "knresnet34": 2.05, "knresnet50": 2.57}


def meta(name: str, scheme: str | None = None, **options: object) -> nn.Module:
    with torch.device("meta"):
        return anybatch.create_model(name, scheme, **options)  # pyright: ignore[reportArgumentType]


def small(name: str, scheme: str | None = None, **options: object) -> nn.Module:
    narrow = {"growth": 4} if "densenet" in name else {"width": 8}
    return anybatch.create_model(name, scheme, **{"num_classes": 4, **narrow, **options})  # pyright: ignore[reportArgumentType]


def gmacs(model: nn.Module, size: int) -> float:
    return multiply_adds(model, torch.empty(1, 3, size, size, device="meta")) / 1e9


def kn_conv_by_hand(x: Tensor, conv: nn.Module, pads: tuple[int, ...]) -> Tensor:
    """Windows written out, each normalized over all that it holds, times the filters."""
    weight, bias = conv.weight, conv.bias
    x = F.pad(x, pads)
    windows = F.unfold(x, weight.shape[2:])  # pyright: ignore[reportArgumentType, reportCallIssue]
    mean, var = windows.mean(1, keepdim=True), windows.var(1, correction=0, keepdim=True)
    y = weight.flatten(1) @ ((windows - mean) / (var + 1e-5).sqrt()) + bias[:, None]  # pyright: ignore[reportCallIssue, reportOptionalSubscript, reportIndexIssue, reportArgumentType]
    return y.unflatten(2, (x.shape[2] - weight.shape[2] + 1, -1))  # pyright: ignore[reportArgumentType]


def with_biases(module: nn.Module) -> nn.Module:
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return module.double().eval()


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("knresnet18", {}, 11_685_220),
        ("knresnet34", {}, 21_792_830),
        ("knresnet50", {}, 25_556_390),
        ("knresnet18", {"stem": "cifar"}, 11_677_540),
        ("knresnet18", {"stem": "cifar", "num_classes": 100}, 11_215_840),
        ("knresnet34", {"stem": "cifar", "num_classes": 100}, 21_323_450),
        ("knresnet50", {"stem": "cifar", "num_classes": 100}, 23_681_570),
        ("knresnet18", {"stem": "cifar", "num_classes": 10}, 11_169_670),
        ("knresnet34", {"stem": "cifar", "num_classes": 10}, 21_277_280),
        ("knresnet50", {"stem": "cifar", "num_classes": 10}, 23_497_160),
        ("knresnet18_seg", {"num_classes": 19}, 13_525_380),
        ("knresnet34_seg", {"num_classes": 19}, 23_399_315),
        ("knresnet50_seg", {"num_classes": 19}, 32_873_971),
        ("knresnet13", {"num_classes": 10}, 2_041_034),
        ("resnet8_kn", {"num_classes": 10}, 1_856_394),
        ("densenet20x16_kn", {"num_classes": 10}, 759_882),
        ("preact_resnet18_kn", {"num_classes": 10}, 11_169_162),
        ("knconvnext_tiny", {}, 28_589_128 - 2 * (96 + 192 + 384)),
    ],
)
def test_parameter_counts(name: str, options: dict[str, object], count: int) -> None:
    assert parameters(meta(name, **options)) == count


@pytest.mark.parametrize(
    ("name", "large", "small"),
    [("knresnet18", 3.56, 1.112), ("knresnet34", 7.51, 2.438), ("knresnet50", 10.51, 3.355)],
)
def test_multiply_adds_and_their_ratio_to_the_counterparts(name: str, large: float, small: float) -> None:
    assert gmacs(meta(name), 224) == pytest.approx(large, abs=0.006)
    assert gmacs(meta(name, stem="cifar", num_classes=100), 32) == pytest.approx(small, abs=0.0006)
    counterpart = name.removeprefix("kn")
    ratio = gmacs(meta(name), 224) / gmacs(meta(counterpart, "bn"), 224)
    assert round(ratio, 2) == pytest.approx(COUNTERPARTS[name])
    assert f"{COUNTERPARTS[name]} times the multiply-adds of ResNet-{counterpart[6:]}" in model_entry(name).about


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 224), ("cifar", 32)])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_matched_networks_take_the_counterparts_multiply_adds(name: str, stem: str, size: int) -> None:
    ours = meta(name, stem=stem, mac_matched=True)
    theirs = meta(name.removeprefix("kn"), "bn", stem=stem)
    assert gmacs(ours, size) == pytest.approx(gmacs(theirs, size), rel=0.02)
    assert parameters(ours) < 0.6 * parameters(meta(name, stem=stem))


@pytest.mark.parametrize(
    ("name", "stem", "size", "trace", "features"),
    [
        ("knresnet18", "imagenet", 224, [112, 56, 28, 14, 8], (512, 3)),
        ("knresnet34", "imagenet", 224, [112, 56, 28, 14, 8], (512, 3)),
        ("knresnet50", "imagenet", 224, [112, 56, 28, 14, 7], (2048, 7)),
        ("knresnet18", "cifar", 32, [32, 32, 16, 8, 4], (512, 3)),
        ("knresnet34", "cifar", 32, [32, 32, 16, 8, 4], (512, 3)),
        ("knresnet50", "cifar", 32, [32, 32, 16, 8, 4], (2048, 4)),
    ],
)
def test_sizes_along_the_network(name: str, stem: str, size: int, trace: list[int], features: tuple[int, int]) -> None:
    model, x = meta(name, stem=stem, num_classes=7), torch.empty(2, 3, size, size, device="meta")
    assert [y.shape[2] for y in model.forward_intermediates(x)] == trace  # pyright: ignore[reportCallIssue]
    channels, positions = features
    assert model.forward_features(x).shape == (2, channels, positions, positions)  # pyright: ignore[reportCallIssue]
    assert model(x).shape == (2, 7)


def test_sizes_of_segmentation_and_of_private_networks() -> None:
    for name in SEGMENTERS:
        model, x = meta(name, num_classes=19), torch.empty(2, 3, 128, 200, device="meta")
        assert [tuple(y.shape[1:]) for y in model.forward_intermediates(x)] == [  # pyright: ignore[reportCallIssue]
            (64, 64, 100),
            (64, 32, 50),
            (128, 16, 25),
            (256, 8, 13),
            (512, 4, 7),
        ]
        assert model(x).shape == (2, 19, 4, 7)
    for name, (channels, positions) in {
        "knresnet13": (256, 4),
        "resnet8_kn": (256, 4),
        "densenet20x16_kn": (272, 8),
        "preact_resnet18_kn": (512, 4),
    }.items():
        model, x = meta(name, num_classes=10), torch.empty(2, 3, 32, 32, device="meta")
        assert model.forward_features(x).shape == (2, channels, positions, positions)  # pyright: ignore[reportCallIssue]
        assert model.get_classifier().in_features == (1024 if name in ("knresnet13", "resnet8_kn") else channels)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def rates(model: nn.Module) -> tuple[list[float], list[float]]:
    """Of convolutions and of norms, in the order of the modules."""
    convs = [m.p for m in model.modules() if isinstance(m, KNConv2d)]
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert set(plain) <= {"fc"}, "of segmentation networks"
    return convs, [m.p for m in model.modules() if isinstance(m, KernelNorm2d)]


@pytest.mark.parametrize(
    ("name", "convs", "p", "final"),
    [
        ("knresnet18", 1 + 2 * 6 + 3 + 1, 0.05, 0.25),
        ("knresnet34", 1 + 2 * 14 + 3 + 1, 0.05, 0.25),
        ("knresnet50", 1 + 3 * 15 + 3, 0.05, 0.25),
        ("knresnet18_seg", 1 + 2 * 7 + 3, 0.1, 0.5),
        ("knresnet34_seg", 1 + 2 * 15 + 3, 0.1, 0.5),
        ("knresnet50_seg", 1 + 3 * 15 + 3 + 1, 0.1, 0.5),
        ("knresnet13", 12, 0.1, 0.5),
        ("resnet8_kn", 7, 0.1, 0.25),
        ("densenet20x16_kn", 1 + 15 + 2, 0.1, 0.5),
        ("preact_resnet18_kn", 1 + 16 + 3, 0.1, 0.5),
    ],
)
def test_dropout_places_and_rates(name: str, convs: int, p: float, final: float) -> None:
    assert rates(meta(name)) == ([p] * convs, [final])


def test_convolutions_of_the_other_scheme_stand_in_the_halvings_alone() -> None:
    model = meta("knconvnext_tiny")
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, KNConv2d)}
    assert found == {"features.2.1": 0.1, "features.4.1": 0.1, "features.6.1": 0.1}
    assert isinstance(model.get_submodule("features.2.0"), nn.ReLU)
    kinds = [type(m).__name__ for name, m in model.named_modules() if "Norm" in type(m).__name__]
    assert kinds == ["PositionalNorm"] * (1 + 18 + 1)
    entry = model_entry("knconvnext_tiny")
    assert (entry.published, entry.size, entry.train_size, entry.scheme) == (81.25, 224, 176, "pn(eps=1e-6)")


def test_a_halving_of_knconvnext_by_hand() -> None:
    model = with_biases(anybatch.create_model("knconvnext_tiny", num_classes=3, width=4))
    halving = model.get_submodule("features.2")
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64) + 1
    expected = kn_conv_by_hand(x.relu(), halving[1], (0, 0, 0, 0))[:, :, ::2, ::2]  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(halving(x.clone()), expected)
    before = x.clone()
    halving(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_a_basic_block_and_a_transition_by_hand() -> None:
    torch.manual_seed(0)
    pieces, x = Pieces(anybatch.scheme("kn(eps=1e-5)"), blocks=1), torch.randn(2, 6, 5, 7, dtype=torch.float64)
    block = with_biases(Block(pieces, 6, 10, (2, 2)))
    h = kn_conv_by_hand(x.relu(), block.conv1, (1, 1, 1, 1))  # pyright: ignore[reportArgumentType]
    assert h.shape == (2, 10, 6, 8)
    h = kn_conv_by_hand(h.relu(), block.conv2, (0, 0, 0, 0))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(block(x), x + h, rtol=1e-12, atol=1e-12)
    transition = with_biases(Transition(pieces, 6, 9, 2, (2, 1, 0, 1), 2))
    h = kn_conv_by_hand(x.relu(), transition.conv, (2, 1, 0, 1))  # pyright: ignore[reportArgumentType]
    assert h.shape == (2, 9, 5, 9)
    torch.testing.assert_close(transition(x), F.max_pool2d(h, 2), rtol=1e-12, atol=1e-12)
    tail = with_biases(ConvBlock(pieces, 6, 9, 2, (1, 1, 1, 1)))
    torch.testing.assert_close(tail(x), kn_conv_by_hand(x.relu(), tail.conv, (1,) * 4), rtol=1e-12, atol=1e-12)  # pyright: ignore[reportArgumentType]


def test_bottlenecks_keep_the_size() -> None:
    pieces, x = Pieces(anybatch.scheme("kn(eps=1e-5)"), blocks=1), torch.randn(1, 6, 5, 7)
    for kernels in ((2, 3, 2), (1, 3, 1), (3, 3)):
        block = Block(pieces, 6, 4, kernels)
        assert block(x).shape == x.shape
        assert [conv.weight.shape[2] for conv in block.children() if isinstance(conv, KNConv2d)] == list(kernels)


def test_the_networks_join_these_as_published() -> None:
    """The whole of KNResNet-18 for small images from its parts, in evaluation."""
    model = with_biases(small("knresnet18", stem="cifar"))
    x = torch.randn(2, 3, 16, 20, dtype=torch.float64)
    h = kn_conv_by_hand(x, model.block0[0], (1, 1, 1, 1))  # pyright: ignore[reportIndexIssue, reportArgumentType]
    number = itertools.count(1)
    for stage, pads in enumerate([None, (1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, 0)]):
        if pads is not None:
            conv = model.get_submodule(f"trans_block{stage}.conv")
            h = F.max_pool2d(kn_conv_by_hand(h.relu(), conv, pads), 2)
        for _ in range((2, 2, 1, 1)[stage]):
            i = next(number)
            z = kn_conv_by_hand(h.relu(), model.get_submodule(f"res_block{i}.conv1"), (1, 1, 1, 1))
            h = h + kn_conv_by_hand(z.relu(), model.get_submodule(f"res_block{i}.conv2"), (0, 0, 0, 0))
    h = kn_conv_by_hand(F.max_pool2d(h, 2).relu(), model.get_submodule("conv_block_f.conv"), (1, 1, 1, 1))
    h = ((h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).relu()
    expected = model.get_submodule("fc")(h.mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_names_are_the_releases() -> None:
    keys = set(meta("knresnet18").state_dict())
    modules = ["block0.0", *(f"res_block{i}.conv{j}" for i in range(1, 7) for j in (1, 2))]
    modules += [f"trans_block{i}.conv" for i in (1, 2, 3)] + ["conv_block_f.conv", "fc"]
    assert keys == {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    ours = small("knresnet50", stem="cifar")
    nested = (
        "res_block14.conv1.",
        "res_block14.conv3.",
        "res_block15.conv1.",
        "res_block15.conv3.",
        "trans_block3.conv.",
    )
    released = {
        key.replace("conv1.", "conv1.conv1x1.")
        .replace("conv3.", "conv3.conv1x1.")
        .replace("k3.conv.", "k3.conv.conv1x1.")
        if key.startswith(nested)
        else key: value
        for key, value in ours.state_dict().items()
    }
    assert sum("conv1x1" in key for key in released) == 10
    torch.manual_seed(1)
    other = small("knresnet50", stem="cifar")
    assert isinstance(other, KNResNet)
    told = load_weights(other, released)
    assert told.layout == "knresnet"
    assert not told.missing
    assert not told.unused
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(other.eval()(x), ours.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *SEGMENTERS, *PRIVATE])
def test_evaluation_is_deterministic_and_each_image_on_its_own(name: str) -> None:
    model = small(name, **({"stem": "cifar"} if name in CLASSIFIERS else {})).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64) * torch.tensor([0.3, 1.0, 3.0]).reshape(3, 1, 1, 1)
    assert not torch.equal(model.train()(x), model(x)), "training draws"
    y = model.eval()(x)
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1])[0], y[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *SEGMENTERS, *PRIVATE, *KN_TWINS])
def test_every_network_makes_a_step_at_batch_1(name: str) -> None:
    size = 96 if name in CLASSIFIERS else 64 if "seg" in name else 32
    assert_a_step_reaches_every_parameter(small(name), torch.randn(1, 3, size, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSIFIERS, *SEGMENTERS, *PRIVATE, "knconvnext_tiny"])
def test_every_network_makes_a_step_at_full_width(name: str) -> None:
    options = {} if name in (*SEGMENTERS, *PRIVATE) else {"drop_path_rate": 0.0}  # a branch left out moves nothing
    model = anybatch.create_model(name, num_classes=5, **options)
    assert_a_step_reaches_every_parameter(model, torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize("scheme", ["gn:auto", "ws+gn:auto", "none", "nf", "skipinit", "fixup", "frn", "kn(p=0)+agc"])
@pytest.mark.parametrize("name", ["knresnet50", "knresnet18_seg", "resnet8_kn"])
def test_other_schemes_train_at_batch_1(name: str, scheme: str) -> None:
    options = {"stem": "cifar"} if name == "knresnet50" else {}
    model = small(name, scheme, **options)
    model(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_norms_of_other_schemes_stand_before_each_convolution_and_before_the_head() -> None:
    model = small("knresnet18", "gn:auto")
    norms = [name for name, m in model.named_modules() if type(m).__name__ == "GroupNorm"]
    assert norms == [
        "res_block1.norm1",
        "res_block1.norm2",
        "res_block2.norm1",
        "res_block2.norm2",
        "trans_block1.norm",
        "res_block3.norm1",
        "res_block3.norm2",
        "res_block4.norm1",
        "res_block4.norm2",
        "trans_block2.norm",
        "res_block5.norm1",
        "res_block5.norm2",
        "trans_block3.norm",
        "res_block6.norm1",
        "res_block6.norm2",
        "conv_block_f.norm",
        "kn_f",
    ]


@pytest.mark.parametrize("scheme", ["kn", "none", "gn:auto"])
@pytest.mark.parametrize("name", ["knresnet50", "knresnet13", "resnet8_kn"])
def test_what_follows_a_level_leaves_its_map_alone(name: str, scheme: str) -> None:
    model, seen = small(name, scheme).eval(), []
    for info in model.feature_info:  # pyright: ignore[reportGeneralTypeIssues]
        model.get_submodule(info["module"]).register_forward_hook(lambda _, __, y: seen.append(y.clone()))
    maps = model.forward_intermediates(torch.randn(1, 3, 64, 64))  # pyright: ignore[reportCallIssue]
    assert len(seen) == len(maps)
    for got, expected in zip(maps, seen, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", PRIVATE)
def test_mish_takes_the_place_of_every_relu(name: str) -> None:
    def kinds(model: nn.Module) -> list[str]:
        return [type(m).__name__ for m in model.modules() if isinstance(m, (nn.ReLU, nn.Mish, Taken))]

    with_relu, with_mish = kinds(small(name)), kinds(small(name, act="mish"))
    assert with_relu
    assert set(with_relu) <= {"ReLU", "Taken"}, "by convolutions"
    assert with_mish == ["Mish"] * len(with_relu)
    assert_a_step_reaches_every_parameter(small(name, act="mish"), torch.randn(2, 3, 32, 32))


def test_features() -> None:
    assert_pyramid_fits(small("knresnet18", stem="cifar"), torch.randn(2, 3, 32, 32))  # pyright: ignore[reportArgumentType]
    assert_pyramid_fits(small("knresnet50"), torch.randn(2, 3, 64, 64))  # pyright: ignore[reportArgumentType]
    for name in ("knresnet13", "resnet8_kn"):
        model = small(name).eval()
        x = torch.randn(2, 3, 32, 32)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)  # pyright: ignore[reportCallIssue]
    pyramid = anybatch.create_model("knresnet18", num_classes=4, width=8, features_only=True)
    assert isinstance(pyramid, FeaturePyramid)
    assert [y.shape[2] for y in pyramid(torch.randn(1, 3, 64, 64))] == [32, 16, 8, 4, 3]


def test_the_segmentation_networks_classifier() -> None:
    model, x = small("knresnet50_seg").eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features, rtol=0, atol=0)  # pyright: ignore[reportCallIssue]
    model.reset_classifier(7)  # pyright: ignore[reportCallIssue]
    assert model(x).shape == (2, 7, 2, 2)
    model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(model(x), features, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_exports_and_keeps_channels_last() -> None:
    stages = Stage(8, 8, 1, (2, 2)), Stage(8, 4, 1, (2, 3, 2), pads=(2, 1, 2, 1))
    model = KNResNet(anybatch.scheme("kn"), stages, num_classes=4, tail=8, tail_padding=1)
    assert_survives_wrapping(model, torch.randn(2, 3, 33, 47))


def test_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    model = small("knresnet18", stem="cifar")
    assert_checkpointing_changes_memory_alone(model, torch.randn(2, 3, 16, 16), at_most=0.5)  # pyright: ignore[reportArgumentType]


def test_first_weights() -> None:
    model = anybatch.create_model("knresnet18", num_classes=4, width=32)
    for name, m in model.named_modules():
        if isinstance(m, KNConv2d):
            fan_out = m.out_channels * m.kernel_size[0] ** 2
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            most = m.weight[0].numel() ** -0.5
            assert 0 < m.bias.abs().max() < most, name  # pyright: ignore[reportOptionalMemberAccess]
    assert not model.get_submodule("fc").bias.any()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    private = anybatch.create_model("knresnet13", num_classes=4)
    conv = private.get_submodule("res_block3.conv1")
    assert conv.weight.std().item() == pytest.approx((3 * 128 * 9) ** -0.5, rel=0.02)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert conv.bias.any()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def test_entries() -> None:
    assert [model_entry(name).published for name in CLASSIFIERS] == [71.17, 74.60, 76.54]
    assert {model_entry(name).scheme for name in CLASSIFIERS} == {"kn(eps=1e-5)"}
    assert {model_entry(name).size for name in PRIVATE} == {32}
    assert all("our reading" in model_entry(name).about for name in KN_TWINS)
    assert len(KN_TWINS) == 8
    assert set(model_options("knresnet18")) == {"width", "stem", "mac_matched", "act", "drop_rate", "drop_path_rate"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("knresnet18", {"stem": "small"}, "stem must be 'imagenet' or 'cifar', got 'small'"),
        ("knresnet18", {"act": "gelu"}, "act must be 'relu' or 'mish', got 'gelu'"),
        ("knresnet18", {"width": 0}, "width must be a whole number of 1 or more, got 0"),
        ("knresnet34", {"width": 32, "mac_matched": True}, "mac_matched=True chooses the width, which was given too"),
        ("knresnet50_seg", {"width": -1}, "width must be a whole number of 1 or more, got -1"),
        ("knresnet13", {"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1"),
        ("resnet8_kn", {"width": 0}, "width must be a whole number of 1 or more, got 0"),
        ("knconvnext_tiny", {"downsampling": "km"}, "unknown part 'km'"),
    ],
    ids=str,
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta(name, **options)


@pytest.mark.parametrize(
    ("name", "stem", "least"),
    [("knresnet18", "imagenet", 93), ("knresnet34", "cifar", 16), ("knresnet50", "imagenet", 32)],
)
def test_images_that_leave_nothing_to_the_last_convolution_are_refused(name: str, stem: str, least: int) -> None:
    model = meta(name, stem=stem)
    model(torch.empty(1, 3, least, least, device="meta"))
    with pytest.raises(ValueError, match=f"with sides of {least} pixels or more"):
        model(torch.empty(1, 3, least - 1, 100, device="meta"))
