"""ConvNeXt: torchvision's weights and logits, parameter counts, first state, stochastic depth, schemes, refusals."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torchvision
from torch import nn

import anybatch
from anybatch.layers import PositionalNorm, WSConv2d
from anybatch.measure import multiply_adds
from anybatch.methods.residual import Join
from anybatch.methods.skip_init import SkipInitJoin
from anybatch.methods.stochastic_depth import StochasticDepth
from anybatch.models import model_entry, model_options
from anybatch.models.blocks import Pieces
from anybatch.models.convnext import ConvNeXt, ConvNeXtBlock
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

NAMES = ["convnext_tiny", "convnext_small", "convnext_base"]
SCHEMES = ["pn(eps=1e-6)", "gn:auto", "ln", "ws+gn:auto", "none", "evos0:auto", "kn"]
STOCHASTIC_DEPTH = {"convnext_tiny": 0.1, "convnext_small": 0.4, "convnext_base": 0.5}


def small(scheme: str = "pn(eps=1e-6)", **options: object) -> ConvNeXt:
    arguments = {"num_classes": 4, "width": 8, "layer_scale": 0.5, **options}
    return ConvNeXt(anybatch.scheme(scheme), (1, 2, 1), **arguments)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return randomized(undrawn(lambda: torchvision.models.convnext_tiny(weights=None, num_classes=10)))


def test_torchvisions_weights_give_torchvisions_logits(theirs: nn.Module) -> None:
    ours = anybatch.create_model("convnext_tiny", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_logits(ours, theirs)
    again = anybatch.create_model("convnext_tiny", num_classes=10).eval()
    again.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(x), ours(x), rtol=0, atol=0)


def test_training_draws_what_torchvision_draws(theirs: nn.Module) -> None:
    with torch.device("meta"):
        ours = anybatch.create_model("convnext_tiny", num_classes=10).train()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x = torch.randn(6, 3, 32, 32)
    found = []
    for model in (ours, copy.copy(theirs).train()):
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(model(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5 * found[1].abs().max().item())
    theirs.eval()
    with torch.no_grad():
        assert (found[1] - theirs(x)).abs().max() > 0.01 * found[1].abs().max(), "nothing was left out"


@pytest.mark.parametrize("name", NAMES)
def test_layout_and_counts_are_those_that_torchvision_documents(name: str) -> None:
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1  # pyright: ignore[reportAttributeAccessIssue]
    with torch.device("meta"):
        ours, theirs = anybatch.create_model(name), torchvision.models.get_model(name, weights=None)
        assert_same_layout(ours, theirs)
        if name == "convnext_tiny":
            counted = multiply_adds(ours, torch.empty(1, 3, 224, 224))
            assert counted / 1e9 == pytest.approx(weights.meta["_ops"], abs=1e-3)
    assert parameters(ours) == weights.meta["num_params"]
    # Where the rate is 0, in the first block, ours has no such layer.
    drops = [
        [m.p for m in model.modules() if type(m).__name__ == "StochasticDepth" and m.p] for model in (ours, theirs)
    ]
    assert len(drops[0]) == sum(isinstance(m, Join) for m in ours.modules()) - 1
    assert drops[0] == pytest.approx(drops[1])
    assert drops[0][-1] == STOCHASTIC_DEPTH[name]


def test_published_accuracy_is_the_papers() -> None:
    assert [model_entry(name).published for name in NAMES] == [82.1, 83.1, 83.8]
    assert anybatch.scheme(model_entry("convnext_tiny").scheme).name == "pn(eps=1e-06)"


def test_a_block_by_its_formula() -> None:
    block = ConvNeXtBlock(Pieces(anybatch.scheme("ln"), act=nn.GELU), 8, layer_scale=0.5)
    x = torch.randn(2, 8, 9, 7)
    depthwise, norm, wide, _, narrow = block.block
    assert depthwise.weight.shape == (8, 1, 7, 7)
    h = norm(depthwise(x)).permute(0, 2, 3, 1)
    h = nn.functional.linear(h, wide.weight[..., 0, 0], wide.bias)
    h = nn.functional.linear(nn.functional.gelu(h), narrow.weight[..., 0, 0], narrow.bias)
    torch.testing.assert_close(block(x.clone()), x + 0.5 * h.permute(0, 3, 1, 2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_1_goes_forward_and_backward(scheme: str) -> None:
    assert_a_step_reaches_every_parameter(small(scheme), torch.randn(1, 3, 33, 39))


@pytest.mark.parametrize("name", NAMES)
def test_every_network_makes_a_step_at_batch_1(name: str) -> None:
    model = anybatch.create_model(name, num_classes=4, width=8, drop_path_rate=0.0)
    assert_a_step_reaches_every_parameter(model, torch.randn(1, 3, 65, 67))


def test_the_last_norm_may_stand_before_pooling() -> None:
    x = torch.randn(1, 3, 33, 39)
    for scheme, message in (("bn", "more than 1 value per channel"), ("in", "which would erase it")):
        with pytest.raises(ValueError, match=message):
            small(scheme).train()(x)
        assert_a_step_reaches_every_parameter(small(scheme, head_norm_first=True), x)
    behind, before = small().eval(), small(head_norm_first=True).eval()
    before.load_state_dict(behind.state_dict(), strict=True)
    features = behind.forward_features(x)
    norm, _, last = behind.get_submodule("classifier").children()
    torch.testing.assert_close(before.forward_features(x), norm(features))
    torch.testing.assert_close(before(x), last(norm(features).mean((2, 3))))
    torch.testing.assert_close(behind(x), last(norm(features.mean((2, 3), keepdim=True)).flatten(1)))


def test_the_scheme_decides_the_layers() -> None:
    def kinds(scheme: str) -> set[str]:
        return {type(m).__name__ for m in small(scheme).modules() if not list(m.children())} - {
            "StochasticDepth",
            "Join",
            "AdaptiveAvgPool2d",
            "Dropout",
            "Flatten",
            "Linear",
        }

    assert kinds("pn") == {"Conv2d", "PositionalNorm", "GELU"}
    assert kinds("ws+gn:auto") == {"WSConv2d", "GroupNorm", "GELU"}
    assert kinds("none") == {"Conv2d", "Identity", "GELU"}
    assert kinds("kn") == {"KNConv2d", "Identity", "GELU"}
    own = dataclasses.replace(anybatch.scheme("gn:auto"), act=nn.SiLU)
    assert {type(m) for m in ConvNeXt(own, (1,), width=8).modules()} & {nn.GELU, nn.SiLU} == {nn.SiLU}
    model = small("ws+pn")
    assert isinstance(model.get_submodule("features.1.0.block.0"), WSConv2d)
    assert isinstance(model.get_submodule("classifier.0"), PositionalNorm)
    assert sum(isinstance(m, SkipInitJoin) for m in small("skipinit").modules()) == 4


def test_first_weights_and_scales() -> None:
    model = anybatch.create_model("convnext_tiny", num_classes=50, width=32)
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert m.bias is not None, name
            assert not m.bias.any(), name
    scales = [p for name, p in model.named_parameters() if name.endswith("layer_scale")]
    assert [tuple(p.shape) for p in scales] == [
        (32 * 2**i, 1, 1) for i, depth in enumerate((3, 3, 9, 3)) for _ in range(depth)
    ]
    assert all((p == 1e-6).all() for p in scales)

    @torch.no_grad()
    def ones(model: nn.Module) -> None:
        for p in model.parameters():
            p.fill_(1)

    own = dataclasses.replace(anybatch.scheme("pn"), init=ones)
    assert all((p == 1).all() for p in ConvNeXt(own, (1,), width=8).parameters())


def test_features() -> None:
    model = small()
    assert_pyramid_fits(model, torch.randn(2, 3, 64, 64))
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(8, 4), (16, 8), (32, 16)]
    pyramid = anybatch.create_model(
        "convnext_tiny", width=8, features_only=True, out_indices=(0, 2), drop_path_rate=0.0
    )
    maps = pyramid(torch.randn(1, 3, 64, 64))
    assert [y.shape[1:] for y in maps] == [(8, 16, 16), (32, 4, 4)]
    sum(y.square().sum() for y in maps).backward()
    assert all(p.grad is not None for p in pyramid.parameters())
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 32)


def test_evaluation_leaves_nothing_out() -> None:
    model, x = small(drop_path_rate=0.5), torch.randn(8, 3, 32, 32)
    assert [m.p for m in model.modules() if isinstance(m, StochasticDepth)] == pytest.approx([1 / 6, 1 / 3, 0.5])
    assert not torch.equal(model.train()(x), model(x))
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


def test_autocast_keeps_the_skip_connection_in_half_precision() -> None:
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.forward_intermediates(torch.randn(1, 3, 32, 32))
    assert {y.dtype for y in maps} == {torch.bfloat16}


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_exports_and_keeps_channels_last() -> None:
    model = ConvNeXt(anybatch.scheme("pn"), (1, 1), num_classes=4, width=8, layer_scale=0.5)
    assert_survives_wrapping(model, torch.randn(2, 3, 33, 47))


def test_checkpointing_keeps_each_blocks_input() -> None:
    model = anybatch.create_model("convnext_tiny", num_classes=4, width=8, layer_scale=0.5, drop_path_rate=0.2)
    assert_checkpointing_changes_memory_alone(model, torch.randn(6, 3, 32, 32), at_most=0.3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be a whole number of 1 or more, got 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 is not a probability from 0 to below 1"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1"),
        ({"stem": "cifar"}, "unknown option of convnext_tiny 'stem'"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anybatch.create_model("convnext_tiny", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="with sides of 16 pixels or more"):
        small()(torch.zeros(1, 3, 15, 40))


def test_options() -> None:
    told = {"width", "layer_scale", "drop_rate", "drop_path_rate", "downsampling", "head_norm_first"}
    assert set(model_options("convnext_tiny")) == told
