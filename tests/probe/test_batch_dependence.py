"""Known answers: which layers mix samples, which fail on small batches, and how far statistics err."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn

import anybatch
from anybatch.layers import GroupNorm
from anybatch.probe import batch_dependence
from probe.models import Centered, small

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_batch_norm_mixes_in_training_alone() -> None:
    found = batch_dependence(small(nn.BatchNorm2d), X)
    assert (found.mixes_in_training, found.mixes_in_evaluation) == (True, False)
    assert [(x.name, x.mixes_in_training, x.mixes_in_evaluation) for x in found.layers] == [
        ("1", True, False),
        ("4", True, False),
    ]
    assert found.fails_at_one is None
    assert found.findings[0].level == "warning"


def test_batch_norm_without_running_statistics_mixes_in_evaluation_too() -> None:
    found = batch_dependence(small(partial(nn.BatchNorm2d, track_running_stats=False)), X)
    assert found.mixes_in_evaluation
    assert all(x.mixes_in_evaluation for x in found.layers)
    assert any(f.level == "fault" and "in evaluation too" in f.text for f in found.findings)


@pytest.mark.parametrize(
    "scheme",
    [
        "gn:auto",
        "ws+gn:auto",
        "in",
        "ln",
        "pn",
        "kn",
        "lcn(window=5)",
        "frn",
        "evos0:auto",
        "nf",
        "skipinit",
        "frozenbn",
        "dyt",
    ],
)
def test_schemes_of_single_samples_mix_nothing(scheme: str) -> None:
    found = batch_dependence(anybatch.create_model("resnet8", scheme, num_classes=3), X)
    assert not found.mixes_in_training
    assert not found.mixes_in_evaluation
    assert not any(x.mixes_in_training or x.mixes_in_evaluation for x in found.layers)
    assert found.findings[0].level == "good"


@pytest.mark.parametrize("scheme", ["bn", "brn", "evob0", "ws+bcn(group_size=4)", "syncbn"])
def test_schemes_of_the_batch_mix(scheme: str) -> None:
    found = batch_dependence(anybatch.create_model("resnet8", scheme, num_classes=3), X)
    assert found.mixes_in_training
    assert not found.mixes_in_evaluation
    mixing = [x for x in found.layers if x.mixes_in_training]
    assert len(mixing) == (4 if scheme == "evob0" else 9)  # which only normalizes where it activates
    assert all(x.scope == "batch" and x.steady_from is not None for x in mixing)


def test_code_that_mixes_without_a_norm_is_found() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Conv2d(3, 3, 1), Centered()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x))

    found = batch_dependence(Outer(), X)
    assert [(x.name, x.kind, x.mixes_in_training, x.mixes_in_evaluation) for x in found.layers] == [
        ("inner", "Centered", True, True)
    ]


def test_values_and_errors_by_hand() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    x = torch.zeros(4, 2, 3, 3)
    x += torch.tensor([-1.0, 1.0, -1.0, 1.0]).reshape(4, 1, 1, 1)  # all of the variance lies between the samples
    (layer,) = batch_dependence(model, x).layers
    assert (layer.positions, layer.values) == (9, 36)
    assert layer.standard_error == pytest.approx(1 / 6)
    assert layer.measured_error == pytest.approx((4 / 3) ** 0.5 / 2)  # unbiased between, biased in all
    assert layer.steady_from == 134  # 4/3 over 0.1 squared, rounded up


def test_independent_values_err_as_their_number_says() -> None:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (layer,) = batch_dependence(nn.Sequential(nn.BatchNorm2d(3)), x).layers
    assert layer.standard_error == 1 / 64
    assert layer.measured_error == pytest.approx(1 / 64, rel=0.2)
    assert layer.steady_from in (2, 3)


def test_layers_that_fail_on_a_single_position() -> None:
    found = batch_dependence(
        nn.Sequential(nn.BatchNorm2d(4), GroupNorm(4, 4), GroupNorm(4, 2)), torch.randn(2, 4, 2, 2)
    )
    assert [x.single_position for x in found.layers] == ["fails", "fails", "works"]
    assert [x.batch_of_one for x in found.layers] == ["works", "works", "works"]


def test_a_norm_that_erases_what_it_takes() -> None:
    class Erases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean((2, 3), keepdim=True)) * self.norm_weight.reshape(-1, 1, 1)

    class MeanNorm(Erases):
        pass

    found = batch_dependence(nn.Sequential(MeanNorm()), torch.randn(2, 4, 3, 3))
    assert [(x.single_position, x.batch_of_one) for x in found.layers] == [("erases", "works")]


def test_a_model_that_fails_on_a_batch_of_one() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    found = batch_dependence(model, X)
    assert found.fails_at_one is not None
    assert "more than 1 value per channel" in found.fails_at_one
    assert found.layers[0].batch_of_one == "fails"


def test_other_inputs_and_dtypes() -> None:
    words = nn.Sequential(nn.Embedding(10, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 2))
    found = batch_dependence(words, torch.randint(10, (3, 5)))
    assert not found.mixes_in_training
    assert [x.single_position for x in found.layers] == ["works"]
    half = small(nn.BatchNorm2d).to(torch.bfloat16)
    assert batch_dependence(half, X).mixes_in_training
    assert not batch_dependence(small(partial(nn.GroupNorm, 4)).half(), X).mixes_in_training
    signals = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4))
    assert batch_dependence(signals, torch.randn(3, 2, 9)).mixes_in_training


def test_outputs_of_segmentation_and_detection() -> None:
    dense = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=2
    )
    assert batch_dependence(dense, torch.randn(2, 3, 64, 64)).mixes_in_training
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2
    )
    found = batch_dependence(detector, [torch.rand(3, 64, 64) for _ in range(2)])
    assert any(x.kind == "BatchNorm2d" and x.mixes_in_training for x in found.layers)
    assert not found.mixes_in_evaluation


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="x holds 1 samples, and this probe needs 2"):
        batch_dependence(small(nn.BatchNorm2d), X[:1])


def test_samples_that_take_from_those_in_front_alone_are_seen() -> None:
    class Summed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(0)

    found = batch_dependence(nn.Sequential(nn.Conv2d(3, 4, 3), Summed()), torch.randn(4, 3, 8, 8))
    assert found.mixes_in_training
    assert found.mixes_in_evaluation
    assert [x.name for x in found.layers] == ["1"]
    assert not any(f.level == "good" for f in found.findings)
