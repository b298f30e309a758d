"""The normalizer-free rule: its bookkeeping by hand and in networks, its joins, its initialization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.layers import ScaledActivation, ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, StochasticDepth
from anybatch.methods.normalizer_free import NormalizerFreeJoin, NormalizerFreeRule, normalizer_free_init
from anybatch.methods.residual import Join


def joins(model: nn.Module) -> list[NormalizerFreeJoin]:
    return [m for m in model.modules() if isinstance(m, NormalizerFreeJoin)]


def test_bookkeeping_of_nfnet_f0() -> None:
    rule = NormalizerFreeRule(12)
    betas = [rule(b == 0).beta for depth in (1, 2, 6, 3) for b in range(depth)]
    expected = [1, 0.9806, 0.9806, 0.9623, 0.9806, 0.9623, 0.9449, 0.9285, 0.9129, 0.8980, 0.9806, 0.9623]
    assert [round(1 / beta, 4) for beta in betas] == expected


def test_without_a_transition_the_variance_goes_on() -> None:
    rule = NormalizerFreeRule(4, alpha=0.5)
    squared = [rule(transition).beta ** 2 for transition in (False, False, True, False)]
    assert squared == pytest.approx([1, 1.25, 1.5, 1.25])


def test_a_rule_makes_no_more_joins_than_told() -> None:
    rule = NormalizerFreeRule(1)
    rule(False)
    with pytest.raises(ValueError, match="told of 1 residual blocks, and is asked for another"):
        rule(False)


def test_a_join_by_hand() -> None:
    join = NormalizerFreeJoin(0.2, 2.0, gain=0.5)
    torch.testing.assert_close(join.prepare(torch.tensor([3.0])), torch.tensor([1.5]))
    y = join(torch.tensor([10.0]), torch.tensor([7.0]))
    torch.testing.assert_close(y, torch.tensor([8.0]))
    y.sum().backward()
    assert join.gain.grad is not None
    assert join.gain.grad.item() == pytest.approx(2.0)


def test_behind_the_join_only_a_projection_needs_the_gain() -> None:
    act = ScaledActivation("relu")
    assert NormalizerFreeJoin(0.2, 1.0, transition=True).activation(act) is act
    assert NormalizerFreeJoin(0.2, 1.0).activation(act) is act.act


def test_post_activated_blocks_keep_variance_1() -> None:
    """The walk ``relu(x + alpha * z)`` by random numbers, and the rule, which divides by 1 there."""
    generator = torch.Generator().manual_seed(1)
    rule, act = NormalizerFreeRule(19), ScaledActivation("relu")
    x = act(torch.randn(200_000, generator=generator, dtype=torch.float64))
    for _ in range(18):
        join = rule(False)
        assert join.beta == 1
        x = join.activation(act)(join(torch.randn(200_000, generator=generator, dtype=torch.float64), x))
        assert 0.93 < x.var().item() < 1.06
    nominal = NormalizerFreeRule(19)
    assert [nominal(False).beta ** 2 for _ in range(19)][-1] == pytest.approx(1.72)


@pytest.mark.parametrize("act", ["silu", "gelu", "tanh"])
def test_activations_that_shrink_the_skip_are_refused_behind_blocks(act: str) -> None:
    with pytest.raises(ValueError, match=r"behind a residual block would shrink .*; take act=relu, or"):
        anybatch.create_model("resnet8", f"nf(act={act})")
    anybatch.create_model("preact_resnet8", f"nf(act={act})")


CASES = [
    ("preact_resnet50", {}, 128, 8),
    ("preact_resnet20", {}, 32, 16),
    ("resnet8", {"width": 32}, 32, 16),
    ("resnet56", {}, 24, 16),
    ("resnet50", {}, 128, 8),
]


@pytest.mark.parametrize(("name", "options", "size", "n"), CASES, ids=[case[0] for case in CASES])
def test_signals_have_the_variance_that_blocks_divide_by(name: str, options: dict, size: int, n: int) -> None:
    """Average over channels of the variance over samples and positions, at the start, with skip gains of 1.

    What the bookkeeping leaves out is zero padding: on a map of s x s a 3 x 3 convolution has (3s - 2)² of 9s² terms,
    and so much less variance has what its branch adds, alpha² of the whole. A projection passes that on. To this comes
    5 % for widths that are not infinite (16 channels, whose variances each err by sqrt(2 / 9 * 16) or so). The block
    behind ImageNet's stem, which pools maxima, is left out.
    """
    torch.manual_seed(0)
    model = anybatch.create_model(name, "nf(skip_gain=1)", num_classes=10, **options)

    def share(s: int, convolutions: int) -> float:
        return ((3 * s - 2) / (3 * s)) ** (2 * convolutions)

    least = [share(size, 1) if model.conv1.kernel_size == (3, 3) else 1.0]
    ratios: list[float] = []

    def hook(block: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        ratios.append(args[0].var((0, 2, 3), correction=0).mean().item() / block.join.beta**2)
        padded = sum(m.kernel_size == (3, 3) for m in block.children() if isinstance(m, nn.Conv2d))
        least.append(least[-1] * (1 - 0.2**2 * (1 - share(y.shape[-1], padded))))

    for block in model.modules():
        if any(isinstance(child, Join) for child in block.children()):
            block.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.randn(n, 3, size, size))
    found = list(zip(ratios, least, strict=False))[name.endswith("50") :]
    assert len(found) >= 3
    # The walk of post-activated blocks, see their rule.
    fall, rise = (0.95, 1.04) if name.startswith("resnet") else (1.0, 1.0)
    for ratio, low in found:
        assert 0.95 * low * fall < ratio < 1.05 * rise


@pytest.mark.parametrize("name", ["resnet8", "preact_resnet8"])
def test_blocks_start_as_the_identity_with_a_skip_gain_of_0(name: str) -> None:
    model = anybatch.create_model(name, "nf(skip_gain=0)", num_classes=10)
    h = torch.randn(2, 16, 6, 6).relu()
    torch.testing.assert_close(model.layer1[0](h), h, rtol=0, atol=0)


def test_pieces_of_each_dimension() -> None:
    scheme = anybatch.scheme("nf(act=silu)")
    assert isinstance(scheme.conv, tuple)
    layers = [make(4, 4, 3) for make in scheme.conv]
    assert [type(layer) for layer in layers] == [ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d]
    assert all(layer.bias is not None for layer in layers)
    assert scheme.act is not None
    assert scheme.act().gain == pytest.approx(1.7871872221)
    released = anybatch.scheme("nf(act=silu,released=True,eps_rule=add)")
    assert released.act is not None
    assert released.act().gain == 1.7881293296813965
    assert isinstance(released.conv, tuple)
    assert (released.conv[1](4, 4, 3).eps, released.conv[1](4, 4, 3).eps_rule) == (1e-5, "add")


def test_gains_in_the_filters_and_no_skip_gain_for_timms_weights() -> None:
    model = anybatch.create_model("preact_resnet8", "nf(fold_gain=True,skip_gain=None)", num_classes=3)
    assert {m.gamma for m in model.modules() if isinstance(m, ScaledWSConv2d)} == {anybatch.scheme("nf").act().gain}
    assert {m.gain for m in model.modules() if isinstance(m, ScaledActivation)} == {1.0}
    (join, *_) = joins(model)
    torch.testing.assert_close(join(torch.ones(1), torch.ones(1)), torch.tensor([1.2]))
    assert not list(join.parameters())


def test_initialization() -> None:
    torch.manual_seed(0)
    model = anybatch.create_model("resnet20", "nf", num_classes=100, width=64)
    conv = model.layer3[1].conv1
    size = conv.weight.numel()
    assert conv.weight.std().item() == pytest.approx((9 * 256) ** -0.5, rel=5 * (2 * size) ** -0.5)
    assert conv.weight.abs().max().item() > 4 * (9 * 256) ** -0.5  # not cut off
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=5 * (2 * model.fc.weight.numel()) ** -0.5)
    assert not any(m.bias.any() for m in model.modules() if getattr(m, "bias", None) is not None)
    assert {join.gain.item() for join in joins(model)} == {1.0}


def test_linear_layers_that_do_not_classify_keep_the_variance() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.fc = nn.Linear(256, 256), nn.Linear(256, 256)

    torch.manual_seed(0)
    model = Gated()
    normalizer_free_init(model)
    assert model.squeeze.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_rates_of_stochastic_depth_rise_to_the_rate_asked_for() -> None:
    model = anybatch.create_model("resnet20", "nf", num_classes=10, drop_path_rate=0.27)
    found = [join.drop for join in joins(model)]
    assert found[0] is None
    assert [drop.p for drop in found[1:]] == pytest.approx([0.27 * i / 9 for i in range(1, 9)])
    assert {drop.scale_by_keep for drop in found[1:]} == {False}


def test_without_stochastic_depth_training_draws_nothing() -> None:
    model = anybatch.create_model("resnet8", "nf", num_classes=10).train()
    assert not any(isinstance(m, StochasticDepth) for m in model.modules())
    state = torch.get_rng_state()
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_stochastic_depth_comes_before_the_gain() -> None:
    join = NormalizerFreeJoin(1.0, 1.0, gain=3.0).train()
    join.drop = StochasticDepth(0.5)
    y = join(torch.ones(100, 1), torch.full((100, 1), 10.0))
    assert set(y.flatten().tolist()) == {10.0, 13.0}
    y.sum().backward()
    assert join.gain.grad is not None
    assert join.gain.grad.item() == (y == 13).sum()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nf(drop_path=0.1)", r"unknown option of nf 'drop_path'"),
        ("nf(act=rleu)", r"unknown nonlinearity 'rleu'; did you mean relu"),
        ("nf(alpha=-1)", r"alpha=-1 is not a number"),
        ("nf(skip_gain=x)", r"skip_gain='x' is not a number"),
        ("nf(eps_rule=sum)", r"eps_rule='sum' is neither"),
        ("nf(released=1)", r"released=1 is neither True nor False"),
        ("nf+gn+ws", r"both fill the slot 'conv'"),
    ],
)
def test_wrong_options_are_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anybatch.scheme(spec)
