"""The normalizer-free rule: its bookkeeping by hand and in networks, its joins, its initialization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import anybatch
from anybatch.layers import ScaledActivation, ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, StochasticDepth
from anybatch.methods.normalizer_free import NormalizerFreeJoin, NormalizerFreeRule, Spread, normalizer_free_init
from anybatch.methods.residual import Join

RELU_GAIN = (2 / (1 - 1 / math.pi)) ** 0.5


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


def betas_squared(transitions: list[bool], act: str = "relu", alpha: float = 0.2) -> list[float]:
    """Of a post-activated network with these blocks."""
    rule, found = NormalizerFreeRule(len(transitions), act=act, alpha=alpha), []
    for transition in transitions:
        join = rule(transition)
        join.activation(ScaledActivation(act))
        found.append(join.beta**2)
    return found


def test_one_post_activated_block_by_hand() -> None:
    # x = gain * relu(u), half of it 0. Behind relu(x + alpha * z) that half has moments alpha / sqrt(2 pi) and
    # alpha² / 2. Of the other half, with u > 0 and s = gain * u + alpha * z, integrate s over s > 0 and u > 0: the two
    # are normal with correlation r = gain / sqrt(gain² + alpha²).
    alpha, gain = 0.2, RELU_GAIN
    std = math.hypot(gain, alpha)
    r = gain / std
    angle = 1 / 4 + math.asin(r) / (2 * math.pi)  # P(s > 0, u > 0)
    first = std * (1 + r) / (2 * math.sqrt(2 * math.pi))  # E[s; s > 0, u > 0]
    second = std**2 * (angle + r * math.sqrt(1 - r**2) / (2 * math.pi))
    mean = 0.5 * alpha / math.sqrt(2 * math.pi) + first
    variance = 0.5 * alpha**2 / 2 + second - mean**2
    assert betas_squared([False, False]) == pytest.approx([1, variance], abs=2e-3)


@pytest.mark.parametrize("act", ["relu", "silu", "gelu"])
def test_the_walk_of_post_activated_blocks_against_random_numbers(act: str) -> None:
    generator = torch.Generator().manual_seed(1)
    n = 400_000
    scaled = ScaledActivation(act)

    def normal() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    x, drawn = scaled(normal()), []
    for transition in [False] * 6 + [True] + [False] * 5:
        drawn.append(x.var().item())
        x = scaled(math.sqrt(1.04) * normal()) if transition else scaled.act(x + 0.2 * normal())
    deviation = 2 * n**-0.5  # of a variance of about 1, whose kurtosis is below 5
    assert betas_squared([False] * 6 + [True] + [False] * 5, act) == pytest.approx(drawn, abs=4 * deviation)


def test_a_projection_makes_it_start_anew() -> None:
    assert betas_squared([True, True]) == pytest.approx([1, 1.04], abs=2e-3)
    assert betas_squared([False, True, False])[2] == pytest.approx(1.04, abs=2e-3)


def test_spreads_keep_their_mass() -> None:
    spread = Spread.normal(lambda s: 3 * s, 1.0)
    assert spread.variance == pytest.approx(9, rel=1e-2)  # of it 0.4 % lies beyond the grid
    assert spread.step(torch.relu, 0.2).mass.sum().item() == pytest.approx(1)


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
    for ratio, low in found:
        assert 0.95 * low < ratio < 1.05


def test_nominal_bookkeeping_would_be_wrong_in_post_activated_blocks() -> None:
    (*_, last) = betas_squared([False] * 9)
    assert last == pytest.approx(0.956, abs=2e-3)
    assert last < 0.75 * (1 + 8 * 0.2**2)


@pytest.mark.parametrize("name", ["resnet8", "preact_resnet8"])
def test_blocks_start_as_the_identity(name: str) -> None:
    model = anybatch.create_model(name, "nf", num_classes=10)
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


def test_initialization() -> None:
    torch.manual_seed(0)
    model = anybatch.create_model("resnet20", "nf", num_classes=100, width=64)
    conv = model.layer3[1].conv1
    size = conv.weight.numel()
    assert conv.weight.std().item() == pytest.approx((9 * 256) ** -0.5, rel=5 * (2 * size) ** -0.5)
    assert conv.weight.abs().max().item() > 4 * (9 * 256) ** -0.5  # not cut off
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=5 * (2 * model.fc.weight.numel()) ** -0.5)
    assert not any(m.bias.any() for m in model.modules() if getattr(m, "bias", None) is not None)
    assert {join.gain.item() for join in joins(model)} == {0.0}


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
    model = anybatch.create_model("resnet20", "nf(drop_path=0.27)", num_classes=10)
    found = [join.drop for join in joins(model)]
    assert found[0] is None
    assert [drop.p for drop in found[1:] if drop] == pytest.approx([0.27 * i / 9 for i in range(1, 9)])
    assert {drop.scale_by_keep for drop in found[1:] if drop} == {False}


def test_without_stochastic_depth_training_draws_nothing() -> None:
    model = anybatch.create_model("resnet8", "nf", num_classes=10).train()
    assert not any(isinstance(m, StochasticDepth) for m in model.modules())
    state = torch.get_rng_state()
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_stochastic_depth_comes_before_the_gain() -> None:
    join = NormalizerFreeJoin(1.0, 1.0, gain=3.0, drop_path=0.5).train()
    y = join(torch.ones(100, 1), torch.full((100, 1), 10.0))
    assert set(y.flatten().tolist()) == {10.0, 13.0}
    y.sum().backward()
    assert join.gain.grad is not None
    assert join.gain.grad.item() == (y == 13).sum()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nf(drop_path=1)", r"drop_path=1 is not a probability"),
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
