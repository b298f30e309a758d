"""Signal propagation against published networks, the bookkeeping, and blocks small enough to work out."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import Tensor, nn

import anybatch
from anybatch.methods.normalizer_free import NormalizerFreeJoin
from anybatch.probe import signal_propagation, smoothness

# Of DeepMind's release, skip gain 1, standard normal images of 128 pixels; block by block.
NF_RESNET50 = (1.06, 1.10, 1.14, 1.06, 1.10, 1.14, 1.18, 1.03, 1.06, 1.10, 1.13, 1.17, 1.21, 0.98, 1.01, 1.04)
BOOKKEEPING = (1.04, 1.08, 1.12, 1.04, 1.08, 1.12, 1.16, 1.04, 1.08, 1.12, 1.16, 1.20, 1.24, 1.04, 1.08, 1.12)


def test_nf_resnet50_against_the_release() -> None:
    torch.manual_seed(0)
    model = anybatch.create_model("nf_resnet50", num_classes=10)
    found = signal_propagation(model, torch.randn(4, 3, 128, 128), mode="evaluation", gain=1.0)
    blocks = found.blocks[1:]
    assert [b.name for b in blocks[:4]] == ["stages.0.0", "stages.0.1", "stages.0.2", "stages.1.0"]
    assert [b.variance for b in blocks] == pytest.approx(NF_RESNET50, rel=0.15)
    assert [b.expected for b in blocks] == pytest.approx(BOOKKEEPING)
    assert [b.expected_at_gain for b in blocks] == pytest.approx(BOOKKEEPING)
    assert max(b.squared_mean for b in blocks[:7]) <= 0.009  # of later ones 4 samples tell too little
    residual = [b.residual_variance or math.nan for b in blocks]
    assert residual[:3] == pytest.approx([1.0] * 3, rel=0.15)
    assert residual[-1] == pytest.approx(0.73, rel=0.15)
    assert "The variance is what the bookkeeping expects, block by block." in [f.text for f in found.findings]


def test_gains_of_zero_keep_the_variance_of_a_stage() -> None:
    model = anybatch.create_model("nf_resnet26", num_classes=10)
    found = signal_propagation(model, torch.randn(2, 3, 64, 64))
    blocks = found.blocks[1:]
    assert [b.expected_at_gain for b in blocks] == [1.0] * 8
    assert [b.expected for b in blocks] == pytest.approx([1.04, 1.08] * 4)
    assert blocks[0].variance == pytest.approx(blocks[1].variance, abs=1e-6)
    (note,) = [f for f in found.findings if "gain 0" in f.text]
    assert note.level == "note"
    assert note.text.startswith("8 of 8 branches have gain 0, as SkipInit starts them")
    assert not any("gain 0" in f.text for f in signal_propagation(model, torch.randn(2, 3, 64, 64), gain=1).findings)
    first = next(iter(m for m in model.modules() if isinstance(m, NormalizerFreeJoin)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NormalizerFreeJoin):
                module.gain.fill_(0.5)
        assert any(
            "gain=1 measures at 1" in f.text for f in signal_propagation(model, torch.randn(2, 3, 64, 64)).findings
        )
        first.gain.zero_()
    assert any(f.text.startswith("1 of 8 branches have") for f in smoothness(model, torch.randn(2, 3, 64, 64)).findings)


@pytest.mark.parametrize("kind", ["linear", "block", "map"])
def test_channels_of_tokens_are_the_last(kind: str) -> None:
    x = torch.randn(4, 5, 5, 6) if kind == "map" else torch.randn(4, 5, 6)
    linear = nn.Linear(6, 6)
    model = nn.Sequential(_TokenBlock(linear) if kind == "block" else linear)
    with torch.no_grad():
        y = model(x).double().flatten(0, -2)
    (block,) = [b for b in signal_propagation(model, x).blocks if b.name == "0"]
    assert block.variance == pytest.approx(float(y.var(0, correction=0).mean()))
    assert block.squared_mean == pytest.approx(float(y.mean(0).square().mean()))


class _TokenBlock(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear, self.skip = nn.LayerNorm(6), linear, None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def test_channels_of_sequences_and_of_square_maps_are_the_second() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1))
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        y = model[0](x).double().transpose(0, 1).flatten(1)
    assert signal_propagation(model, x).blocks[0].variance == pytest.approx(float(y.var(1, correction=0).mean()))


def test_a_model_without_filters_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential holds no blocks, convolutions or linear layers"):
        signal_propagation(nn.Sequential(nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4))


def test_batch_norm_behind_convolutions_rises_and_resets() -> None:
    # Post-activated blocks: residual variance 1 at the start, variance rises in a stage and falls at a transition.
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    found = signal_propagation(model, torch.randn(4, 3, 96, 96))
    assert [b.name for b in found.blocks] == ["(before)", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))]
    residual = [b.residual_variance for b in found.blocks[1:]]
    assert residual == pytest.approx([1.0] * 8, abs=1e-3)
    variance = [b.variance for b in found.blocks[1:]]
    assert all(variance[i + 1] > variance[i] for i in (0, 2, 4, 6))
    assert all(variance[i + 1] < variance[i] for i in (1, 3, 5))
    assert all(b.expected is None for b in found.blocks)


def test_kernel_norm_that_adds_the_skip_itself_shows_its_branch() -> None:
    torch.manual_seed(0)
    model = anybatch.create_model("resnet8", "kn", num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    found = signal_propagation(model, x, mode="evaluation")
    block = model.get_submodule("layer1.0")
    with torch.no_grad():
        h = model.conv1(x)  # pyright: ignore[reportCallIssue]
        branch = nn.functional.conv2d(h, torch.zeros(1, 16, 1, 1))  # to see that shapes agree
        conv1, conv2 = (block.get_submodule(n) for n in ("conv1", "conv2"))
        h1 = conv1(h)
        act, conv2.activation = conv2.activation, "none"  # pyright: ignore
        branch = conv2(h1)
        conv2.activation = act  # pyright: ignore
    expected = branch.double().var((0, 2, 3), correction=0).mean()
    assert found.blocks[1].residual_variance == pytest.approx(float(expected), rel=1e-5)


class _Block(nn.Module):
    """y = x + 2 x, of channels as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, groups=2, bias=False)
        self.downsample = None
        nn.init.constant_(self.conv.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_moments_and_gradients_by_hand() -> None:
    x = torch.tensor([[[[1.0, 3.0]], [[-1.0, -5.0]]]])  # channel means 2 and -3, variances 1 and 4
    found = signal_propagation(nn.Sequential(_Block(), _Block()), x, loss=lambda y, _: y.sum())
    assert [b.name for b in found.blocks] == ["0", "1"]  # nothing with a gradient comes before
    first, second = found.blocks
    assert first.squared_mean == pytest.approx(9 * (4 + 9) / 2)
    assert first.variance == pytest.approx(9 * (1 + 4) / 2)
    assert first.residual_variance == pytest.approx(4 * (1 + 4) / 2)
    assert second.variance == pytest.approx(81 * (1 + 4) / 2)
    assert second.gradient == pytest.approx(2.0)  # of 4 values, each 1
    assert first.gradient == pytest.approx(6.0)
    # d sum / d weight of the second block: what the block takes, summed over positions: 3 * 4 and 3 * -6.
    assert second.weight_gradient == pytest.approx(math.hypot(12, 18))


def test_exploding_signals_are_told() -> None:
    found = signal_propagation(nn.Sequential(*[_Block() for _ in range(5)]), torch.randn(2, 2, 4, 4))
    assert any(f.level == "fault" and "variance grows" in f.text for f in found.findings)


def test_blocks_by_name() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    found = signal_propagation(model, torch.randn(2, 3, 64, 64), blocks=["layer[12]", "fc"])
    assert [b.name for b in found.blocks] == ["layer1", "layer2", "fc"]
    with pytest.raises(ValueError, match=r"blocks=\['layer9'\] name no module; modules are conv1"):
        signal_propagation(model, torch.randn(2, 3, 64, 64), blocks=["layer9"])
    with pytest.raises(ValueError, match="mode='train' is neither"):
        signal_propagation(model, torch.randn(2, 3, 64, 64), mode="train")  # pyright: ignore[reportArgumentType]


def test_networks_without_blocks_show_their_filters() -> None:
    found = signal_propagation(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), torch.randn(2, 3, 8, 8)
    )
    assert [b.name for b in found.blocks] == ["0", "3"]
