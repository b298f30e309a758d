"""SkipInit: the join by hand, and blocks that start as the identity."""

from __future__ import annotations

import pytest
import torch

import anybatch
from anybatch.methods.skip_init import SkipInitJoin


def test_by_hand() -> None:
    join = SkipInitJoin(0.5)
    y = join(torch.tensor([[2.0, 4.0]]), torch.tensor([[10.0, 20.0]]))
    torch.testing.assert_close(y, torch.tensor([[11.0, 22.0]]))
    y.sum().backward()
    assert join.gain.grad is not None
    assert join.gain.grad.item() == 6.0


def test_a_branch_counts_for_nothing_at_first_and_its_gain_learns() -> None:
    model = anybatch.create_model("preact_resnet20", "skipinit", num_classes=3)
    x = torch.randn(2, 3, 16, 16)
    block, h = model.layer1[1], torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(h), h, rtol=0, atol=0)
    model(x).sum().backward()
    assert block.join.gain.shape == ()
    assert block.join.gain.grad
    assert not block.conv1.weight.grad.any()


def test_the_gain_starts_where_told() -> None:
    model = anybatch.create_model("resnet8", "skipinit(gain=0.25)", num_classes=3)
    assert {m.gain.item() for m in model.modules() if isinstance(m, SkipInitJoin)} == {0.25}
    with pytest.raises(ValueError, match="gain='x' is not a number"):
        anybatch.scheme("skipinit(gain=x)")


def test_convolutions_keep_their_biases() -> None:
    model = anybatch.create_model("resnet8", "skipinit", num_classes=3)
    assert model.conv1.bias is not None
