"""VGG: torchvision's weights and logits with and without norms, parameter counts, first state, heads, refusals."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import anybatch
from anybatch.measure import multiply_adds
from anybatch.models import model_entry, model_options
from anybatch.models.network import FeaturePyramid
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

NAMES = ["vgg11", "vgg13", "vgg16", "vgg19"]
SCHEMES = ["bn", "gn:auto", "ws+gn:auto", "none", "pn", "evos0:auto", "kn"]


def small(scheme: str = "gn:auto", name: str = "vgg11", **options: object) -> nn.Module:
    return anybatch.create_model(name, scheme, **{"num_classes": 4, "width": 8, **options})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "scheme"), [("vgg11", "none"), ("vgg16", "bn")])
def test_torchvisions_weights_give_torchvisions_logits(name: str, scheme: str) -> None:
    suffix = "_bn" if scheme == "bn" else ""
    theirs = randomized(undrawn(lambda: torchvision.models.get_model(name + suffix, weights=None, num_classes=10)))
    with torch.device("meta"):
        ours = anybatch.create_model(name, scheme, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_layout_counts_and_accuracy_are_those_that_torchvision_documents(name: str) -> None:
    with torch.device("meta"):
        for scheme, suffix in (("bn", "_bn"), ("none", "")):
            theirs = torchvision.models.get_model(name + suffix, weights=None)
            ours = anybatch.create_model(name, scheme)
            assert_same_layout(ours, theirs)
            weights = torchvision.models.get_model_weights(name + suffix).IMAGENET1K_V1  # pyright: ignore[reportAttributeAccessIssue]
            assert parameters(ours) == weights.meta["num_params"]
            counted = multiply_adds(ours, torch.empty(1, 3, 224, 224))
            assert counted / 1e9 == pytest.approx(weights.meta["_ops"], abs=1e-3)
    bn = torchvision.models.get_model_weights(f"{name}_bn").IMAGENET1K_V1  # pyright: ignore[reportAttributeAccessIssue]
    assert model_entry(name).published == bn.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert model_entry(name).scheme == "bn"


def test_parameter_count_of_the_small_head() -> None:
    widths = [8, 16, 32, 32, 64, 64, 64, 64]
    convolutions = sum(i * o * 9 + o for i, o in zip([3, *widths], widths, strict=False))
    assert parameters(small("none", stem="cifar")) == convolutions + 64 * 4 + 4
    assert parameters(small("bn", stem="cifar")) == convolutions + 2 * sum(widths) + 64 * 4 + 4


@pytest.mark.parametrize("name", NAMES)
def test_the_name_counts_convolutions_and_linear_layers(name: str) -> None:
    with torch.device("meta"):
        model = anybatch.create_model(name)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == int(name[3:])


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_1_goes_forward_and_backward(scheme: str, stem: str) -> None:
    model = small(scheme, stem=stem, drop_rate=0.0, width=16 if stem == "cifar" else 4)
    assert_a_step_reaches_every_parameter(model, torch.randn(1, 3, 65, 67))


@pytest.mark.parametrize("name", NAMES)
def test_every_network_makes_a_step_at_batch_1(name: str) -> None:
    model = anybatch.create_model(name, num_classes=4, width=8, drop_rate=0.0)
    assert_a_step_reaches_every_parameter(model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_features(stem: str) -> None:
    model = small(stem=stem)
    assert_pyramid_fits(model, torch.randn(2, 3, 64, 64))  # pyright: ignore[reportArgumentType]
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8, 16, 32]  # pyright: ignore[reportGeneralTypeIssues]
    pyramid = small(stem=stem, features_only=True, out_indices=(1, 3))
    assert isinstance(pyramid, FeaturePyramid)
    assert [y.shape[1:] for y in pyramid(torch.randn(1, 3, 64, 64))] == [(16, 32, 32), (64, 8, 8)]
    assert not [name for name, _ in pyramid.named_parameters() if "classifier" in name]
    assert_a_step_reaches_every_parameter(nn.Sequential(pyramid, _Sum()), torch.randn(1, 3, 64, 64))


class _Sum(nn.Module):
    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([y.sum() for y in maps])


def test_levels_end_before_each_pooling_and_behind_the_last() -> None:
    model = small("none")
    kinds = [type(model.get_submodule(info["module"])) for info in model.feature_info]  # pyright: ignore[reportGeneralTypeIssues]
    assert kinds == [nn.ReLU] * 5 + [nn.MaxPool2d]


@pytest.mark.parametrize("scheme", ["bn", "none"])
def test_first_weights(scheme: str) -> None:
    model = small(scheme, width=32)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.std().item() == pytest.approx((2 / (m.out_channels * 9)) ** 0.5, rel=0.1), name
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.01, rel=0.05), name
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert m.bias is not None, name
            assert not m.bias.any(), name


def test_the_head_can_be_exchanged() -> None:
    for stem, features in (("imagenet", 512), ("cifar", 64)):
        model, x = small(stem=stem).eval(), torch.randn(1, 3, 32, 32)
        model.reset_classifier(7)  # pyright: ignore[reportCallIssue]
        assert model(x).shape == (1, 7)
        model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        assert model(x).shape == (1, features)
        assert small(stem=stem, num_classes=0)(x).shape == (1, features)


def test_dropout_stands_behind_each_hidden_layer_and_in_training_alone() -> None:
    model, x = small().eval(), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    seen: list[float] = []
    for name in ("classifier.3", "classifier.6"):  # what the second hidden layer and the classifier take
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append((args[0] == 0).double().mean()))
    model(x)
    model.train()(x)
    without, behind_second_without, behind_first, behind_second = seen
    assert behind_first > without + 0.1
    assert behind_second > behind_second_without + 0.1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_exports_and_keeps_channels_last() -> None:
    assert_survives_wrapping(small(width=4), torch.randn(2, 3, 33, 47))


def test_checkpointing_keeps_a_map_for_each_level() -> None:
    model = small(name="vgg16")
    assert_checkpointing_changes_memory_alone(model, torch.randn(2, 3, 64, 64), at_most=0.3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "small"}, "stem must be 'imagenet' or 'cifar', got 'small'"),
        ({"width": 0}, "width must be a whole number of 1 or more, got 0"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1"),
        ({"depth": 3}, "unknown option of vgg11 'depth'"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
    with pytest.raises(ValueError, match="with sides of 32 pixels or more"):
        small()(torch.zeros(1, 3, 31, 40))


def test_options() -> None:
    assert set(model_options("vgg16")) == {"width", "stem", "drop_rate"}
