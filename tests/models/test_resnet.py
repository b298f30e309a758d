"""Residual networks: torchvision's weights and logits, parameter counts, first state, refusals."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import anybatch
from anybatch.layers import GroupNorm, WSConv2d
from anybatch.methods.skip_init import SkipInitJoin
from anybatch.models import list_models, model_entry, model_options
from anybatch.models.blocks import Pieces
from anybatch.models.resnet import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, ResNet

BLOCKS = [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvisions_weights_give_torchvisions_logits(name: str) -> None:
    theirs = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    for key, value in theirs.state_dict().items():
        if value.dim() == 1:  # statistics and scales away from the 0 and 1 at which they start
            nn.init.uniform_(value, 0.3, 0.7) if not key.endswith("bias") else nn.init.normal_(value, 0, 0.1)
    ours = anybatch.create_model(name, "bn", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for size in (64, 75):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            got, expected = ours(x), theirs(x)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("resnext50_32x4d", 25_028_904),
        ("resnext101_32x8d", 88_791_336),
        ("wide_resnet50_2", 68_883_240),
        ("wide_resnet101_2", 126_886_696),
    ],
)
def test_parameter_counts_that_torchvision_documents(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(anybatch.create_model(name, "bn")) == count
        assert parameters(anybatch.create_model(name, "ws+gn")) == count  # groups keep the scale of each channel


def test_parameter_count_of_cifars_resnet_20() -> None:
    convolutions = 3 * 16 * 9 + 6 * 16 * 16 * 9 + (16 * 32 + 5 * 32 * 32) * 9 + (32 * 64 + 5 * 64 * 64) * 9
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    classifier = 64 * 10 + 10
    total = convolutions + norms + projections + classifier
    assert total == 272_474  # with He's option A, which has no projections, 269,722
    assert parameters(anybatch.create_model("resnet20", "bn", num_classes=10)) == total
    # Without norms each convolution has a bias in place of a scale and a shift.
    assert parameters(anybatch.create_model("resnet20", "none", num_classes=10)) == total - norms // 2 - (32 + 64)


@pytest.mark.parametrize(
    ("name", "count", "published"),
    [
        ("preact_resnet164", 1_703_258, 1.7e6),
        ("wide_resnet16_4", 2_748_890, 2.7e6),
        ("wide_resnet28_10", 36_479_194, 36.5e6),
    ],
)
def test_parameter_counts_of_cifars_deep_and_wide_networks(name: str, count: int, published: float) -> None:
    with torch.device("meta"):
        assert parameters(anybatch.create_model(name, "bn", num_classes=10)) == count
    assert count == pytest.approx(published, abs=0.5e5)  # as the papers round


@pytest.mark.slow
def test_a_skipinit_network_of_a_thousand_layers_trains() -> None:
    # Narrow, on 8 pixels: what counts is the depth. With He's initialization alone the signal's variance grows by about
    # 2 a block, 2^500 in all, which is beyond float32.
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()

    def network(scheme: str) -> ResNet:
        parsed = anybatch.scheme(scheme)
        return ResNet(parsed, PreActBasicBlock, (167, 167, 166), num_classes=2, width=8, stem="cifar")

    plain = network("none")(x)
    assert not plain.isfinite().all()
    model = network("skipinit")
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 1 + 2 * 500
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    gains = torch.stack([m.gain.detach() for m in model.modules() if isinstance(m, SkipInitJoin)])
    assert len(gains) == 500
    assert gains.abs().min() > 0, "every branch learns"


FAMILIES = ("ResNet", "PreAct-ResNet", "ResNeXt", "Wide ResNet")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "preact_resnet1001" else name
        for name in list_models()
        if model_entry(name).family in FAMILIES
    ],
)
def test_every_network_builds_and_halves_its_map_where_it_should(name: str) -> None:
    with torch.device("meta"):
        model = anybatch.create_model(name, "ws+gn:auto", num_classes=7, in_chans=5)
        x = torch.empty(2, 5, 64, 64)
        features = model.forward_features(x)
        reduction = 4 if isinstance(model.maxpool, nn.Identity) else 32
        assert features.shape[2:] == (64 // reduction, 64 // reduction)
        assert model.forward_head(features).shape == (2, 7)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_depth_counts_convolutions_and_the_classifier(depth: int) -> None:
    with torch.device("meta"):
        model = anybatch.create_model(f"resnet{depth}", "bn")
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    assert len(weighted) == depth


def test_no_classes_gives_pooled_features() -> None:
    model = anybatch.create_model("resnet8", "gn:auto", num_classes=0).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), model.forward_features(x).mean(dim=(2, 3)))
    assert model(x).shape == (2, 64)


def test_width_and_stem_are_the_networks_options() -> None:
    assert set(model_options("resnet18")) == {"width", "stem", "zero_init_residual", "drop_rate", "drop_path_rate"}
    model = anybatch.create_model("resnet18", "bn", num_classes=3, width=8, stem="cifar")
    assert model.conv1.weight.shape == (8, 3, 3, 3)
    assert model.forward_features(torch.zeros(2, 3, 16, 16)).shape == (2, 64, 2, 2)


@pytest.mark.parametrize("scheme", ["bn", "gn:auto", "ln", "ws+gn:auto"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_scale_of_0_at_a_branchs_end_makes_blocks_the_identity_at_first(block: type, scheme: str) -> None:
    channels = 16 * block.expansion
    pieces = Pieces(anybatch.scheme(scheme), zero_init_residual=True)
    made = block(pieces, channels, 16, 1)
    pieces.init(made)
    x = torch.rand(2, channels, 5, 5)  # not negative, as behind an activation
    torch.testing.assert_close(made(x.clone()), x, rtol=0, atol=0)
    nn.init.ones_((made.bn2 if block is BasicBlock else made.bn3).weight)
    assert (made(x.clone()) - x).abs().max() > 0.1


@pytest.mark.parametrize("scheme", ["bn", "gn:auto", "none"])
@pytest.mark.parametrize("block", [PreActBasicBlock, PreActBottleneck])
def test_preactivated_blocks_add_their_untouched_input(block: type, scheme: str) -> None:
    channels = 16 * block.expansion
    made = block(Pieces(anybatch.scheme(scheme)), channels, 16, 1)
    last = made.conv2 if block is PreActBasicBlock else made.conv3
    for p in last.parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, channels, 5, 5)
    torch.testing.assert_close(made(x.clone()), x, rtol=0, atol=0)


def test_preactivated_block_by_its_formula() -> None:
    made = PreActBasicBlock(Pieces(anybatch.scheme("gn:auto")), 16, 32, 2)
    x = torch.randn(2, 16, 6, 6)
    h = made.bn1(x).relu()
    expected = made.downsample(h) + made.conv2(made.bn2(made.conv1(h)).relu())
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet50"])
def test_preactivated_networks_end_in_a_norm_and_an_activation(name: str) -> None:
    model = anybatch.create_model(name, "gn:auto", num_classes=4, width=8)
    assert isinstance(model.bn1, nn.Identity)
    assert isinstance(model.final_norm, GroupNorm)
    features = model.forward_features(torch.randn(1, 3, 33, 47))
    assert features.min() == 0
    assert features.max() > 0
    model(torch.randn(1, 3, 33, 47)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "preact_resnet18", "preact_resnet50"])
@pytest.mark.parametrize("scheme", ["gn:auto", "ws+gn:auto", "ln", "none"])
def test_batch_1_goes_forward_and_backward(name: str, scheme: str) -> None:
    model = anybatch.create_model(name, scheme, num_classes=4, width=8).train()
    y = model(torch.randn(1, 3, 33, 35))
    assert y.shape == (1, 4)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_convolutions_have_biases_only_where_no_norm_shifts() -> None:
    def biased(scheme: str) -> set[bool]:
        model = anybatch.create_model("resnet8", scheme, num_classes=4)
        return {m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d)}

    assert biased("none") == {True}
    for scheme in ("bn", "gn:auto", "ln", "in", "ws+gn:auto", "ws+bn"):
        assert biased(scheme) == {False}


def test_the_scheme_decides_the_layers() -> None:
    def kinds(scheme: str) -> set[type]:
        model = anybatch.create_model("resnet8", scheme, num_classes=4)
        return {type(m) for m in model.modules()} & {nn.Conv2d, WSConv2d, nn.BatchNorm2d, GroupNorm}

    assert kinds("bn") == {nn.Conv2d, nn.BatchNorm2d}
    assert kinds("gn:auto") == {nn.Conv2d, GroupNorm}
    assert kinds("ws+gn:auto") == {WSConv2d, GroupNorm}
    assert kinds("ws+bn") == {WSConv2d, nn.BatchNorm2d}
    assert kinds("none") == {nn.Conv2d}


@pytest.mark.parametrize("scheme", ["none", "bn", "ws+gn:auto"])
def test_first_weights_are_hes_normal_and_follow_the_seed(scheme: str) -> None:
    torch.manual_seed(0)
    model = anybatch.create_model("resnet8", scheme, num_classes=4, width=64)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] ** 2
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            assert m.bias is None or not m.bias.any()
    torch.manual_seed(0)
    again = anybatch.create_model("resnet8", scheme, num_classes=4, width=64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5", {}, r"unknown model 'resnet5'; did you mean resnet\d+"),
        ("wide_resnet50", {}, r"unknown model 'wide_resnet50'; did you mean wide_resnet50_2"),
        (
            "resnet18",
            {"widht": 8},
            r"unknown option of resnet18 'widht'; did you mean width\? Known: drop_path_rate, drop_rate, stem",
        ),
        ("resnet18", {"groups": 2}, "unknown option of resnet18 'groups'"),
        ("resnet18", {"in_chans": 0}, "in_chans must be a whole number of 1 or more, got 0"),
        ("resnet18", {"num_classes": -1}, "num_classes must be a whole number of 0 or more, got -1"),
        ("resnet18", {"stem": "ImageNet"}, "stem must be 'imagenet', 'cifar' or 'bit', got 'ImageNet'"),
        ("resnet18", {"width": 0}, "width must be a whole number of 1 or more, got 0"),
        ("resnet18", {"scheme": "gm"}, "unknown part 'gm'"),
        ("resnet18", {"scheme": "ws"}, r"'ws' needs a norm after its convolutions; write ws\+gn"),
        (
            "resnet8",
            {"scheme": "gn"},
            r"model 'resnet8' with scheme 'gn': groups=32 does not divide 16 channels; use groups='auto' .*here 8\)",
        ),
        ("resnet8", {"scheme": "gn/5"}, "with scheme .*: group_size=5 does not divide 16 channels"),
    ],
    ids=str,
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anybatch.create_model(name, **{"scheme": "bn", **options})  # pyright: ignore[reportArgumentType]


def test_widths_that_leave_no_channels_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"of width=8 the 32 groups of base_width=4 keep no channel; take a width of 16"
    ):
        anybatch.create_model("resnext50_32x4d", "bn", width=8)
    with pytest.raises(ValueError, match="width must be a whole number of 1 or more, got 0"):
        anybatch.create_model("resnet18", width=0)


@pytest.mark.parametrize("block", [BasicBlock, PreActBasicBlock])
@pytest.mark.parametrize("options", [{"groups": 2}, {"base_width": 128}], ids=str)
def test_basic_blocks_take_no_groups(block: type, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="basic blocks take groups=1 and base_width=64; use a network of bottlenecks"):
        ResNet(anybatch.scheme("bn"), block, (1, 1), width=8, **options)
