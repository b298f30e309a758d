"""What every network offers: features, pyramids, an exchangeable head, checkpointing, refusals."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import anybatch
from anybatch.methods.residual import Join
from anybatch.methods.stochastic_depth import StochasticDepth
from anybatch.models import model_entry
from anybatch.models.counts import counts
from anybatch.models.network import FeaturePyramid, Network
from helpers import assert_same_gradients, gradients


def network(**options: object) -> Network:
    torch.manual_seed(0)
    made = anybatch.create_model("resnet18", "gn:auto", num_classes=4, width=8, **options)
    assert isinstance(made, Network)
    return made


def test_the_head_of_the_features_gives_the_logits() -> None:
    model, x = network().eval(), torch.randn(2, 3, 40, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))


def test_intermediate_maps_are_those_of_the_levels() -> None:
    model, x = network().eval(), torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x)
    assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info] == [8, 8, 16, 32, 64]
    assert [64 // y.shape[2] for y in maps] == [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert [info["module"] for info in model.feature_info] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    torch.testing.assert_close(maps[-1], model.forward_features(x), rtol=0, atol=0)
    for got, i in zip(model.forward_intermediates(x, [-1, 1]), (4, 1), strict=True):
        torch.testing.assert_close(got, maps[i], rtol=0, atol=0)
    assert len(model.forward_intermediates(x, 2)) == 2


@pytest.mark.parametrize("wrong", [[5], [-6], 9, 0, -1, [], ("a",), "a", True, [True], 2.0, [1.0]], ids=repr)
def test_other_numbers_of_levels_are_refused(wrong: Any) -> None:
    model, x = network().eval(), torch.randn(1, 3, 64, 64)
    told = re.escape(f"last; got {wrong!r}")
    with pytest.raises(
        ValueError, match=f"there are 5 levels, numbered from 0 to 4; give the numbers of some.* {told}"
    ):
        model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match=told):
        FeaturePyramid(model, wrong)


def test_a_pyramid_gives_the_same_maps_and_has_no_head() -> None:
    model, x = network().eval(), torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x)
    pyramid = FeaturePyramid(copy.deepcopy(model), (1, 3))
    assert [info["reduction"] for info in pyramid.feature_info] == [4, 16]
    for got, i in zip(pyramid(x), (1, 3), strict=True):
        torch.testing.assert_close(got, maps[i], rtol=0, atol=0)
    names = {name for name, _ in pyramid.named_parameters()}
    assert not [name for name in names if "layer4" in name or "fc" in name]
    sum(y.sum() for y in pyramid.train()(x)).backward()
    assert all(p.grad is not None for p in pyramid.parameters())  # DDP refuses parameters without a gradient


def test_the_classifier_can_be_exchanged() -> None:
    model, x = network().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="num_classes must be 0 or more, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool must be 'avg', as these networks pool, or None, got 'max'"):
        model.reset_classifier(3, "max")


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    model, x = network().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    kept: list[int] = []
    found = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(x).square().sum()
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], relative=1e-12)
    assert kept[1] < 0.7 * kept[0]


def test_dropout_before_the_classifier_drops_in_training_alone() -> None:
    model, x = network(drop_rate=0.5), torch.randn(2, 3, 32, 32)
    assert (model.forward_head(model.forward_features(x), pre_logits=True) == 0).any()
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\), got 1"):
        network(drop_rate=1.0)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "knresnet18", "nfnet_f0", "nf_regnet_b0"])
@pytest.mark.parametrize("scheme", ["gn:auto", "skipinit", "nf"])
def test_rates_of_stochastic_depth_rise_from_block_to_block(name: str, scheme: str) -> None:
    with torch.device("meta"):
        model = anybatch.create_model(name, scheme, num_classes=4, drop_path_rate=0.4)
        plain = anybatch.create_model(name, scheme, num_classes=4, drop_path_rate=0.0)
    found = [m.drop for m in model.modules() if isinstance(m, Join)]
    assert len(found) >= 6
    assert found[0] is None
    assert [drop.p for drop in found[1:]] == pytest.approx([0.4 * i / len(found) for i in range(1, len(found))])
    assert {drop.scale_by_keep for drop in found[1:]} == {scheme != "nf"}
    assert not any(isinstance(m, StochasticDepth) for m in plain.modules())


def test_stochastic_depth_leaves_out_branches_of_single_samples() -> None:
    x = torch.randn(1, 3, 32, 32).expand(64, 3, 32, 32)
    model = network(drop_path_rate=0.5)
    outputs = model(x).detach()
    assert 4 < len(outputs.unique(dim=0)) < 64  # 7 of the 8 blocks drop, by themselves in each sample
    torch.testing.assert_close(model.eval()(x), network().eval()(x), rtol=0, atol=0)
    model.train().requires_grad_(False)
    for join in (m for m in model.modules() if isinstance(m, Join)):
        join.drop = StochasticDepth(0.5, scale_by_keep=True)
        torch.manual_seed(1)
        y = join(torch.ones(2000, 1), torch.full((2000, 1), 10.0))
        assert set(y.flatten().tolist()) == {10.0, 12.0}
        assert y.mean().item() == pytest.approx(11, abs=5 / 2000**0.5)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_other_rates_of_stochastic_depth_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_path_rate=.* is not a probability from 0 to below 1"):
        network(drop_path_rate=rate)


@pytest.mark.parametrize("name", ["in_chans", "num_classes"])
@pytest.mark.parametrize("wrong", [-1, 2.0, "3", True, None])
def test_numbers_of_channels_and_classes_are_whole(name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of [01] or more, got {wrong!r}"):
        anybatch.create_model("resnet8", **{name: wrong})  # pyright: ignore[reportArgumentType]


def test_every_family_refuses_images_smaller_than_its_stride() -> None:
    families = {model_entry(name).family: name for name in reversed(anybatch.list_models())}
    for name in families.values():
        with torch.device("meta"):
            model = anybatch.create_model(name)
            assert isinstance(model, Network)
            least = model.min_size or model.levels[-1].reduction
            if least > 1:
                with pytest.raises(ValueError, match=f"with sides of {least} pixels or more, got shape"):
                    model(torch.zeros(1, 3, least - 1, 64))
            with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\) .* got shape \(1, 4, 64, 64\)"):
                model(torch.zeros(1, 4, 64, 64))


def quick() -> set[str]:
    """Networks of up to 12 million parameters, and the least of each family where it has up to 40 million."""
    sizes = {name: told["parameters"] for name, told in counts().items()}
    families: dict[str, list[str]] = {}
    for name in anybatch.list_models():
        families.setdefault(model_entry(name).family, []).append(name)
    least = {min(names, key=sizes.__getitem__) for names in families.values()}
    return {name for name, size in sizes.items() if size <= 12e6 or (size <= 40e6 and name in least)}


QUICK = quick()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in anybatch.list_models()]
)
def test_a_step_of_every_network(name: str) -> None:
    """At its full width, on one image of twice the least size, since a last map of 1 x 1 would leave a norm nothing."""
    model: Any = anybatch.create_model(name, num_classes=3)
    if isinstance(classifier := model.get_classifier(), nn.Linear):
        nn.init.normal_(classifier.weight)  # those that start at 0 hand back no gradient
    size = 2 * (model.min_size or model.levels[-1].reduction)
    y = model.train()(torch.randn(2 if "bn" in model_entry(name).scheme else 1, 3, size, size))
    assert y.shape[:2] == (len(y), 3)
    y.square().sum().backward()
    moved = 0
    for key, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), key
        moved += p.grad is not None and bool(p.grad.any())
    assert moved
    assert next(model.parameters()).grad.any()  # the first convolution's weight, behind everything else


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)], ids=str)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\) with sides of 32 pixels or more, got shape \("):
        network()(torch.zeros(shape))
