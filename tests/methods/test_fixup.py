"""Fixup: its initialization by depth, and the numbers around convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anybatch
from anybatch.layers import FixupConv2d
from anybatch.methods.fixup import FixupJoin


def test_the_convolution_by_hand() -> None:
    conv = FixupConv2d(1, 1, 3, padding=1)
    nn.init.ones_(conv.weight)
    nn.init.constant_(conv.bias_in, 2.0)
    nn.init.constant_(conv.bias_out, 0.5)
    y = conv(torch.ones(1, 1, 3, 3))
    # Padding holds zeros, not the number: 4, 6 and 9 values of 3 meet in a corner, at an edge and in the middle.
    torch.testing.assert_close(y[0, 0], torch.tensor([[12.5, 18.5, 12.5], [18.5, 27.5, 18.5], [12.5, 18.5, 12.5]]))
    assert [name for name, _ in FixupConv2d(1, 1, 3, bias=False).named_parameters()] == ["weight"]


@pytest.mark.parametrize(
    ("name", "layers", "blocks"),
    [("resnet20", 2, 9), ("preact_resnet20", 2, 9), ("resnet50", 3, 16), ("preact_resnet50", 3, 16)],
)
def test_initialization(name: str, layers: int, blocks: int) -> None:
    torch.manual_seed(0)
    model = anybatch.create_model(name, "fixup", num_classes=7, width=64)
    found = [m for m in model.modules() if any(isinstance(child, FixupJoin) for child in m.children())]
    assert len(found) == blocks
    for block in found:
        branch = [getattr(block, f"conv{i + 1}") for i in range(layers)]
        assert not branch[-1].weight.any()
        plain = [block.downsample if isinstance(block.downsample, FixupConv2d) else None, *branch[:-1]]
        for conv in plain:
            if conv is None:
                continue
            w = conv.weight
            he = (2 / (w.shape[0] * w[0, 0].numel())) ** 0.5
            scale = blocks ** (-1 / (2 * layers - 2)) if conv in branch else 1
            assert w.std().item() == pytest.approx(he * scale, rel=5 * (2 * w.numel()) ** -0.5)
        assert block.join.scale.item() == 1
    assert not model.fc.weight.any()
    assert not model.fc.bias.any()
    numbers = [p for n, p in model.named_parameters() if n.endswith(("bias_in", "bias_out"))]
    assert len(numbers) == 2 * sum(isinstance(m, FixupConv2d) for m in model.modules())
    assert not any(p.any() for p in numbers)


def test_the_projection_of_post_activated_blocks_is_no_branch() -> None:
    model = anybatch.create_model("resnet20", "fixup", num_classes=7)
    projection = model.layer2[0].downsample
    assert all(m.weight.any() for m in projection.modules() if isinstance(m, FixupConv2d))


def test_released_numbers_with_one_dimension_load() -> None:
    conv = FixupConv2d(2, 2, 1)
    conv.load_state_dict({"weight": torch.ones(2, 2, 1, 1), "bias_in": torch.ones(1), "bias_out": torch.ones(1)})
    assert conv.bias_in is not None
    assert conv.bias_in.item() == 1


def test_one_step_moves_the_output_by_much_the_same_at_any_depth() -> None:
    """What Fixup is for: a step of SGD changes the logits by an amount that does not grow with depth."""

    def moved(name: str, scheme: str) -> float:
        torch.manual_seed(0)
        model = anybatch.create_model(name, scheme, num_classes=10).double()
        x, y = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.arange(8)
        step = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            step.zero_grad()
            before = model(x)
            nn.functional.cross_entropy(before, y).backward()
            step.step()
        return (model(x) - before).abs().mean().item()

    assert moved("resnet56", "fixup") < 3 * moved("resnet8", "fixup")
