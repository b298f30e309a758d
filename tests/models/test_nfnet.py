"""Networks without normalization: published counts, padding, the published order of operations, signals, features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch.methods.normalizer_free import NormalizerFreeJoin
from anybatch.methods.stochastic_depth import StochasticDepth
from anybatch.models.blocks import Pieces
from anybatch.models.counts import counts
from anybatch.models.nfnet import BlockShape, NFBlock, SamePad, Shortcut
from models.checks import (
    assert_a_step_reaches_every_parameter,
    assert_checkpointing_changes_memory_alone,
    assert_survives_wrapping,
    randomized,
    small_nf,
    undrawn,
)

TIMM = "released=True,eps_rule=add"


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("nfnet_f0", 71_489_284, 12.38),
        ("nfnet_f1", 132_634_256, 35.54),
        ("nfnet_f2", 193_779_228, 62.59),
        ("nfnet_f3", 254_924_200, 114.76),
        ("nfnet_f4", 316_069_172, 215.24),
        ("nfnet_f5", 377_214_144, 289.76),
        ("nfnet_f6", 438_359_116, 377.28),
        ("nfnet_f7", 499_504_088, 478.78),
        ("nf_resnet50", 25_557_048, 4.09),
        ("nf_resnet101", 44_549_193, None),
        ("nf_resnet152", 60_192_858, None),
        ("nf_resnet200", 64_673_898, None),
        ("nf_resnet288", 146_460_552, None),
    ],
)
def test_counts_of_the_publication_and_its_release(name: str, parameters: int, giga: float | None) -> None:
    assert counts()[name]["parameters"] == parameters
    if giga is not None:
        assert counts()[name]["multiply_adds"] / 1e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize(
    ("name", "mega", "giga"),
    [
        ("nf_regnet_b0", 8.60, 0.444),
        ("nf_regnet_b1", 10.02, 0.734),
        ("nf_regnet_b2", 13.79, None),  # at 272 and 456 pixels the last maps have half a position, which the
        ("nf_regnet_b3", 18.14, 2.00),  # reference counts of multiply-adds leave out
        ("nf_regnet_b4", 29.32, 4.47),
        ("nf_regnet_b5", 48.71, None),
        ("nfnet_f3_plus", 423.4, None),
        ("nfnet_f4_plus", 525.0, 333.4),
        ("nfnet_f7_plus", 829.6, None),
    ],
)
def test_counts_that_are_known_rounded(name: str, mega: float, giga: float | None) -> None:
    assert counts()[name]["parameters"] / 1e6 == pytest.approx(mega, abs=0.05 if mega > 100 else 0.005)
    if giga is not None:
        assert counts()[name]["multiply_adds"] / 1e9 == pytest.approx(giga, abs=0.05 if giga > 100 else 0.005)


def test_the_publications_gelu_and_eps_differ_from_timms_by_little() -> None:
    torch.manual_seed(0)
    timms = randomized(undrawn(lambda: anybatch.create_model("nfnet_f0", f"nf(act=gelu,{TIMM})", num_classes=10)))
    published = undrawn(lambda: anybatch.create_model("nfnet_f0", num_classes=10))
    published.load_state_dict(timms.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = timms(x)
        assert 1e-3 < (published(x) - wanted).abs().max() / wanted.abs().max() < 5e-2


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 2), (7, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("size", [4, 5, 8, 9])
def test_padding_as_tensorflows(kernel_size: int, stride: int, size: int) -> None:
    padded = SamePad(kernel_size, stride, value=7.0)(torch.zeros(1, 1, size, size))
    positions = (padded.shape[-1] - kernel_size) // stride + 1
    assert positions == -(-size // stride)
    rows = padded[0, 0, :, padded.shape[-1] // 2] == 7
    before, behind = rows[: len(rows) // 2].sum().item(), rows[len(rows) // 2 :].sum().item()
    assert behind - before in (0, 1)
    needed = max((positions - 1) * stride + kernel_size - size, 0)
    assert before + behind == needed


def test_a_block_by_the_published_order_of_operations() -> None:
    torch.manual_seed(0)
    shape = BlockShape(group_width=4, second=True, squeeze="last")
    pieces = Pieces(anybatch.scheme("nf(act=gelu_tanh)"), blocks=3)
    pieces.join(transition=True)
    pieces.join()  # so that beta is not 1
    block = NFBlock(pieces, 8, 16, 9, 2, shape).double()
    block.join.gain.data.fill_(0.7)
    assert block.join.beta == pytest.approx((1 + 2 * 0.04) ** 0.5)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)

    def act(h: Tensor) -> Tensor:
        return block.act1.gain * F.gelu(h, approximate="tanh")

    a = act(x) / block.join.beta
    skip = block.downsample.conv(F.avg_pool2d(a, 2))
    h = block.conv1(a)
    h = F.conv2d(F.pad(act(h), (0, 1, 0, 1)), block.conv2.standardized(), block.conv2.bias, 2, groups=2)
    h = block.conv3(act(block.conv2b(act(h))))
    gate = torch.sigmoid(block.attn_last.fc2(block.attn_last.fc1(h.mean((2, 3))).relu()))
    h = 2 * gate[:, :, None, None] * h
    torch.testing.assert_close(block(x), skip + 0.2 * 0.7 * h)
    assert block.conv2.weight.shape == (8, 4, 3, 3)  # 9 rounded down to two groups of 4


def test_a_pooled_shortcut_keeps_the_variance_of_uncorrelated_pixels_with_a_gain_of_2() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, 16, 16)
    for gain, variance in ((1.0, 0.25), (2.0, 1.0)):
        shortcut = Shortcut(Pieces(anybatch.scheme("nf")), 64, 256, 2, pooled=True, pool_gain=gain)
        assert shortcut(x).var().item() == pytest.approx(variance, rel=0.1)


def test_signals_follow_the_bookkeeping_in_nf_resnet50() -> None:
    torch.manual_seed(0)
    model = anybatch.create_model("nf_resnet50", "nf(skip_gain=1)").eval()
    ratios: list[float] = []

    def hook(block: NFBlock, args: tuple[Tensor, ...], y: Tensor) -> None:
        join = block.join
        assert isinstance(join, NormalizerFreeJoin)
        expected = (1.0 if join.transition else join.beta**2) + join.alpha**2
        ratios.append(y.var((0, 2, 3), correction=0).mean().item() / expected)

    for block in model.modules():
        if isinstance(block, NFBlock):
            block.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.randn(4, 3, 128, 128))
    assert len(ratios) == 16
    assert all(0.85 < ratio < 1.15 for ratio in ratios), ratios


@pytest.mark.parametrize("name", ["nfnet_f0", "nf_resnet26", "nf_regnet_b0"])
def test_a_step_at_batch_1_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    scheme = {"nfnet_f0": "nf(act=gelu_tanh)", "nf_resnet26": "nf", "nf_regnet_b0": "nf(act=silu)"}[name]
    model: Any = anybatch.create_model(name, scheme, num_classes=3, drop_rate=0.0, drop_path_rate=0.0)
    torch.nn.init.normal_(model.head.fc.weight)  # NF-RegNet's starts at 0
    assert_a_step_reaches_every_parameter(model, torch.randn(1, 3, 64, 64))


KINDS = ["NFNet", "NF_ResNet", "NF_RegNet"]
NAMES = ["nfnet_f0", "nf_resnet26", "nf_regnet_b0"]


def assert_exports_with_any_size(model: nn.Module) -> None:
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for shape in ((1, 3, 77, 70), (3, 3, 48, 96)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_exports_and_keeps_channels_last(kind: str) -> None:
    assert_survives_wrapping(small_nf(kind, (1, 1)), torch.randn(2, 3, 48, 48))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", NAMES)
def test_the_published_networks_compile_export_and_keep_channels_last(name: str) -> None:
    assert_survives_wrapping(randomized(anybatch.create_model(name, num_classes=3)), torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize("kind", KINDS)
def test_exports_with_any_size(kind: str) -> None:
    assert_exports_with_any_size(small_nf(kind, (1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_published_networks_export_with_any_size(name: str) -> None:
    assert_exports_with_any_size(randomized(anybatch.create_model(name, num_classes=3)))


@pytest.mark.parametrize(("name", "scheme"), [("nf_regnet_b0", "nf(act=silu)"), ("nf_resnet26", "nf")])
def test_checkpointing_changes_memory_alone(name: str, scheme: str) -> None:
    model: Any = anybatch.create_model(name, scheme, num_classes=3, drop_path_rate=0.1)
    torch.nn.init.normal_(model.head.fc.weight)
    # Of four images some keep each branch.
    assert_checkpointing_changes_memory_alone(model, torch.randn(4, 3, 64, 64), at_most=0.5)


@pytest.mark.parametrize(
    ("name", "drop_rate", "drop_path_rate"),
    [("nfnet_f0", 0.2, 0.25), ("nfnet_f7_plus", 0.5, 0.25), ("nf_regnet_b2", 0.3, 0.1), ("nf_resnet50", 0.0, 0.0)],
)
def test_rates_are_the_published_ones(name: str, drop_rate: float, drop_path_rate: float) -> None:
    with torch.device("meta"):
        model: Any = anybatch.create_model(name)
    drops = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    assert model.drop.p == drop_rate
    blocks = sum(isinstance(m, NFBlock) for m in model.modules())
    assert [drop.p for drop in drops] == pytest.approx(
        [drop_path_rate * i / blocks for i in range(1, blocks)][: len(drops)]
    )
    assert len(drops) == (blocks - 1 if drop_path_rate else 0)


def test_classifiers_start_as_published() -> None:
    regnet: Any = anybatch.create_model("nf_regnet_b0", num_classes=100)
    resnet: Any = anybatch.create_model("nf_resnet26", num_classes=100)
    assert not regnet.head.fc.weight.any()
    assert resnet.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("scheme", ["bn", "ws+gn:auto", "evos0:auto"])
def test_the_same_network_with_norms(scheme: str) -> None:
    model = anybatch.create_model("nf_resnet26", scheme, num_classes=3)
    y = model(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 3)
    y.sum().backward()
    names = {name for name, p in model.named_parameters() if "gain" in name}
    assert not names


def test_features_of_the_levels() -> None:
    model = anybatch.create_model("nf_regnet_b0", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert [tuple(y.shape[1:]) for y in maps] == [
        (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"]) for info in model.feature_info
    ]
    assert model.forward_features(x).shape == (1, 960, 2, 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="padding must be 'same' or 'symmetric', got 'smae'"):
        anybatch.create_model("nf_resnet26", padding="smae")


@pytest.mark.parametrize(
    ("name", "option", "wrong"),
    [
        *(("nf_regnet_b0", "round_to", value) for value in (0, -8)),
        *(("nf_resnet26", "se_ratio", value) for value in (-0.5, 1.5, float("nan"), float("inf"))),
        *((name, "pool_gain", v) for name in ("nf_resnet26", "nfnet_f0") for v in (0.0, -1.0, float("nan"))),
        *(("convnext_tiny", "layer_scale", value) for value in (0.0, -1.0, float("inf"))),
    ],
)
def test_options_that_make_no_network_are_refused(name: str, option: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}.*{wrong!r}"), torch.device("meta"):
        anybatch.create_model(name, **{option: wrong})
