"""What is special about squeeze-excite: values by hand, the gate's start, timm's block, refusals."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from anybatch.layers import SqueezeExcite


def test_by_hand() -> None:
    layer = SqueezeExcite(2, ratio=0.5).double()
    state = {
        "fc1.weight": torch.tensor([[1.0, -1.0]]),
        "fc1.bias": torch.tensor([0.5]),
        "fc2.weight": torch.tensor([[2.0], [0.0]]),
        "fc2.bias": torch.tensor([-1.0, 1.0]),
    }
    layer.load_state_dict(state)
    # Means 2 and 1: hidden relu(2 - 1 + 0.5) = 1.5; gates 2 sigmoid(2) and 2 sigmoid(1).
    x = torch.tensor([[[1.0, 3.0], [0.0, 2.0]]], dtype=torch.float64)
    gates = 2 * torch.tensor([2.0, 1.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(layer(x), x * gates[None, :, None])
    # Means 0 and 1: the hidden unit is off.
    x = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    gates = 2 * torch.tensor([-1.0, 1.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(layer(x), x * gates[None, :, None])


def test_starts_near_the_identity() -> None:
    x = torch.randn(4, 256, 8, 8)
    layer = SqueezeExcite(256)
    assert (layer(x) - x).abs().max() < 0.2 * x.abs().max()
    for linear in (layer.fc1, layer.fc2):
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.03)
        assert linear.weight.abs().max() <= 2.28 * linear.in_features**-0.5  # 2 / 0.8796
        assert not linear.bias.any()


@pytest.mark.parametrize(("channels", "ratio", "hidden"), [(6, 0.5, 3), (7, 0.5, 3), (2, 0.25, 1), (64, 0.25, 16)])
def test_hidden_channels(channels: int, ratio: float, hidden: int) -> None:
    assert SqueezeExcite(channels, ratio).fc1.out_features == hidden


def test_equals_timms_in_its_nfnet() -> None:
    with torch.device("meta"):
        net = timm.create_model("dm_nfnet_f0")
    block = net.stages[0][0]
    theirs = block.attn_last.to_empty(device="cpu").double()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    ours = SqueezeExcite(256, 0.5, gain=block.attn_gain).double()
    assert block.attn_gain == SqueezeExcite(256).gain == 2
    state = theirs.state_dict()
    ours.load_state_dict(state, strict=True)
    assert state["fc1.weight"].dim() == 4  # the caller's own is left as it was
    x = torch.randn(2, 256, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), block.attn_gain * theirs(x))
    outer = nn.Sequential(SqueezeExcite(256)).double()
    outer.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=True)
    torch.testing.assert_close(outer(x), ours(x))


def test_dimensions_agree() -> None:
    layer, x = SqueezeExcite(6).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    for shape in [(2, 6, 3, 4), (2, 6, 3, 2, 2)]:
        torch.testing.assert_close(layer(x.reshape(shape)).reshape(x.shape), layer(x))
    torch.testing.assert_close(layer(x[..., :1])[..., 0], layer(x[..., 0]))


def test_half_precision_keeps_no_float32_map() -> None:
    x = torch.randn(2, 6, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kept: list[torch.Tensor] = []
        SqueezeExcite(6, dtype=torch.bfloat16)(x)
    assert kept
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]


def test_means_of_half_precision_are_taken_in_float32() -> None:
    layer = SqueezeExcite(2)
    x = torch.full((1, 2, 64, 64), 300.0)  # the sum passes the largest half, 65504
    torch.testing.assert_close(layer.half()(x.half()).float(), layer.float()(x), rtol=2e-3, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_channels must be 1 or more, got 0"):
        SqueezeExcite(0)
    with pytest.raises(ValueError, match=r"ratio must be above 0, got 0\.0"):
        SqueezeExcite(8, 0.0)
    for shape in [(2, 5, 3, 3), (8,)]:
        with pytest.raises(ValueError, match=r"SqueezeExcite is made for \(N, 8, \*\), got x of shape"):
            SqueezeExcite(8)(torch.zeros(shape))
