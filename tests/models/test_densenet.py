"""DenseNet: torchvision's weights and logits, CIFAR's networks, parameter counts, dropout, checkpointing, refusals."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import anybatch
from anybatch.measure import multiply_adds
from anybatch.models import list_models, model_entry, model_options
from anybatch.models.blocks import Pieces
from anybatch.models.densenet import DenseBlock, DenseLayer, DenseNet
from helpers import saved_tensors
from models.checks import (
    assert_a_step_reaches_every_parameter,
    assert_checkpointing_changes_memory_alone,
    assert_pyramid_fits,
    assert_same_layout,
    assert_same_logits,
    assert_survives_wrapping,
    parameters,
    randomized,
    undrawn,
)

NAMES = [name for name in list_models() if name.startswith("densenet") and model_entry(name).family == "DenseNet"]
IMAGENET = ["densenet121", "densenet161", "densenet169", "densenet201"]
DEEP = {"densenet161", "densenet169", "densenet201", "densenet_bc190_40", "densenet_bc250_24"}
SCHEMES = ["bn", "gn:auto", "ws+gn:auto", "none", "pn", "evos0:auto", "kn"]


def small(scheme: str = "gn:auto", **options: object) -> DenseNet:
    arguments = {"num_classes": 4, "stem": "cifar", **options}
    return DenseNet(anybatch.scheme(scheme), 4, (2, 3, 2), **arguments)  # pyright: ignore[reportArgumentType]


def test_torchvisions_weights_give_torchvisions_logits() -> None:
    theirs = randomized(undrawn(lambda: torchvision.models.densenet121(weights=None, num_classes=10)))
    ours = anybatch.create_model("densenet121", "bn", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", IMAGENET)
def test_layout_counts_and_accuracy_are_those_that_torchvision_documents(name: str) -> None:
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1  # pyright: ignore[reportAttributeAccessIssue]
    with torch.device("meta"):
        ours = anybatch.create_model(name, "bn")
        assert_same_layout(ours, torchvision.models.get_model(name, weights=None))
        if name == "densenet121":
            counted = multiply_adds(ours, torch.empty(1, 3, 224, 224))
            assert counted / 1e9 == pytest.approx(weights.meta["_ops"], abs=1e-3)
    assert parameters(ours) == weights.meta["num_params"]
    assert model_entry(name).published == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert model_entry(name).scheme == "bn"


def test_cifars_network_is_torchvisions_with_another_stem() -> None:
    def make() -> nn.Module:
        model = torchvision.models.DenseNet(12, (16, 16, 16), 24, num_classes=10)  # pyright: ignore[reportArgumentType]
        model.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        for name in ("norm0", "relu0", "pool0"):
            delattr(model.features, name)
        return model

    theirs = randomized(undrawn(make))
    ours = anybatch.create_model("densenet_bc100_12", "bn", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_logits(ours, theirs, sizes=(16, 21))


@pytest.mark.parametrize(
    ("name", "millions", "error"),
    [
        ("densenet40_12", 1.0, "5.24"),
        ("densenet100_12", 7.0, "4.10"),
        ("densenet100_24", 27.2, "3.74"),
        ("densenet_bc100_12", 0.8, "4.51"),
        ("densenet_bc250_24", 15.3, "3.62"),
        ("densenet_bc190_40", 25.6, "3.46"),
    ],
)
def test_parameter_counts_of_the_papers_table_2(name: str, millions: float, error: str) -> None:
    with torch.device("meta"):
        assert round(parameters(anybatch.create_model(name, num_classes=10)) / 1e6, 1) == millions
    assert error in model_entry(name).about


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IMAGENET])
def test_parameter_counts_of_cifars_networks(name: str) -> None:
    narrow = "_bc" in name
    depth, growth = (int(part) for part in name.removeprefix("densenet").removeprefix("_bc").split("_"))
    layers = (depth - 4) // (6 if narrow else 3)
    channels = 2 * growth if narrow else 16
    total = 3 * channels * 9
    for block in range(3):
        for _ in range(layers):
            if narrow:
                total += 2 * channels + channels * 4 * growth + 2 * 4 * growth + 4 * growth * growth * 9
            else:
                total += 2 * channels + channels * growth * 9
            channels += growth
        if block < 2:
            out_channels = channels // 2 if narrow else channels
            total += 2 * channels + channels * out_channels
            channels = out_channels
    total += 2 * channels + channels * 10 + 10
    with torch.device("meta"):
        model = anybatch.create_model(name, num_classes=10)
    assert parameters(model) == total
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth


def test_growths_are_an_option() -> None:
    assert set(model_options("densenet121")) == {"growth", "stem", "drop_rate", "proj_drop_rate"}
    with torch.device("meta"):
        assert parameters(anybatch.create_model("densenet_bc100_12", growth=24)) == parameters(
            anybatch.create_model("densenet_bc100_24")
        )


@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_layer_by_its_formula(bottleneck: bool) -> None:
    layer = DenseLayer(Pieces(anybatch.scheme("gn:auto")), 12, 6, bottleneck=bottleneck, drop_rate=0.0)
    maps = torch.randn(2, 8, 5, 5), torch.randn(2, 4, 5, 5)
    expected = layer.conv1(layer.norm1(torch.cat(maps, 1)).relu())
    if bottleneck:
        assert layer.conv1.weight.shape == (24, 12, 1, 1)
        expected = layer.conv2(layer.norm2(expected).relu())
    torch.testing.assert_close(layer(*maps), expected)
    assert expected.shape == (2, 6, 5, 5)


@pytest.mark.parametrize("scheme", ["gn:auto", "none"])
def test_a_block_passes_its_untouched_input_on(scheme: str) -> None:
    block = DenseBlock(Pieces(anybatch.scheme(scheme)), 8, 4, 3, bottleneck=True, drop_rate=0.0)
    x = torch.randn(2, 8, 5, 5)
    y = block(x.clone())
    torch.testing.assert_close(y[:, :8], x, rtol=0, atol=0)
    layers = dict(block.named_children())
    torch.testing.assert_close(y[:, 8:12], layers["denselayer1"](x))
    torch.testing.assert_close(y[:, 16:], layers["denselayer3"](y[:, :16]))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_1_goes_forward_and_backward(scheme: str, stem: str) -> None:
    assert_a_step_reaches_every_parameter(small(scheme, stem=stem), torch.randn(1, 3, 33, 35))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n for n in NAMES])
def test_every_network_makes_a_step_at_batch_1(name: str) -> None:
    size = 64 if name in IMAGENET else 16
    model = anybatch.create_model(name, num_classes=4, growth=4)
    assert_a_step_reaches_every_parameter(model, torch.randn(1, 3, size, size))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_features(stem: str) -> None:
    model = small(stem=stem)
    assert_pyramid_fits(model, torch.randn(2, 3, 64, 64))
    reductions = [2, 4, 8, 16] if stem == "imagenet" else [1, 1, 2, 4]
    assert [info["reduction"] for info in model.feature_info] == reductions
    features = model.forward_features(torch.randn(1, 3, 64, 64))
    assert features.min() == 0, "the last block's maps pass a norm and an activation"
    with torch.device("meta"):
        told = anybatch.create_model("densenet121").feature_info  # pyright: ignore[reportAttributeAccessIssue]
    assert [(info["num_chs"], info["reduction"]) for info in told] == [  # pyright: ignore[reportGeneralTypeIssues]
        (64, 2),
        (256, 4),
        (512, 8),
        (1024, 16),
        (1024, 32),
    ]


def test_first_weights() -> None:
    model = anybatch.create_model("densenet_bc100_24", "none", num_classes=4)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] ** 2
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
            assert m.bias is not None, name
            assert not m.bias.any(), name
    assert not model.get_submodule("classifier").bias.any()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


@pytest.mark.parametrize("bottleneck", [True, False])
def test_dropout_stands_behind_each_convolution_but_the_first(bottleneck: bool) -> None:
    model = small(bottleneck=bottleneck, proj_drop_rate=0.5)
    order: list[str] = []
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Dropout)) and getattr(m, "p", 0.5):
            m.register_forward_hook(lambda m, *_: order.append(type(m).__name__))
    x = torch.randn(1, 3, 16, 16)
    y = model.train()(x)
    assert order == ["Conv2d"] + ["Conv2d", "Dropout"] * (16 if bottleneck else 9)
    assert not torch.equal(model(x), y)
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_exports_and_keeps_channels_last() -> None:
    model = DenseNet(anybatch.scheme("gn:auto"), 4, (2, 1), num_classes=4)
    assert_survives_wrapping(model, torch.randn(2, 3, 33, 47))


def test_checkpointing_keeps_each_layers_new_maps_alone() -> None:
    model = anybatch.create_model("densenet40_12", "gn:auto", num_classes=4, proj_drop_rate=0.2)
    assert_checkpointing_changes_memory_alone(model, torch.randn(2, 3, 16, 16), at_most=0.3)  # pyright: ignore[reportArgumentType]

    def kept(depth: int) -> int:
        block = DenseBlock(Pieces(anybatch.scheme("gn:auto")), 8, 4, depth, bottleneck=True, drop_rate=0.0)
        block.grad_checkpointing = True
        with saved_tensors() as tensors:
            block(torch.randn(1, 8, 16, 16, requires_grad=True))
        return sum({t.data_ptr(): t.numel() for t in tensors}.values())

    assert kept(32) - kept(16) == kept(48) - kept(32), "memory grows with the depth alone"


@pytest.mark.parametrize("scheme", ["gn:auto", "none", "kn"])
def test_what_follows_a_level_leaves_its_map_alone(scheme: str) -> None:
    """Without a norm an activation in place would overwrite it."""
    model, seen = small(scheme).eval(), []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda _, __, y: seen.append(y.clone()))
    maps = model.forward_intermediates(torch.randn(1, 3, 16, 16))
    for got, expected in zip(maps, seen, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "small"}, "stem must be 'imagenet' or 'cifar', got 'small'"),
        ({"growth": 0}, "growth must be a whole number of 1 or more, got 0"),
        ({"proj_drop_rate": 1.0}, r"proj_drop_rate must be in \[0, 1\), got 1"),
        ({"drop_rate": -0.1}, r"drop_rate must be in \[0, 1\), got -0.1"),
        ({"scheme": "gn"}, "with scheme 'gn': groups=32 does not divide"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anybatch.create_model("densenet_bc100_12", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="with sides of 4 pixels or more"):
        small()(torch.zeros(1, 3, 3, 8))
