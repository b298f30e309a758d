"""Which layers change with a tile, how far its edge reaches, and the error map."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from anybatch.layers import KNConv2d, LocalContextNorm2d
from anybatch.probe import tile_consistency
from probe.models import small

X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_group_norm_changes_every_position() -> None:
    found = tile_consistency(small(partial(nn.GroupNorm, 4)), X)
    assert [(x.name, x.reach, x.changed) for x in found.layers if x.norm] == [
        ("1", "global", 1.0),
        ("4", "global", 1.0),
    ]
    assert min(found.profile) > 1e-4
    assert (found.error_map > 1e-5).all()
    (warning,) = (f for f in found.findings if f.level == "warning")
    assert "2 norms (GroupNorm) change every position" in warning.text
    assert "kn" in warning.fix
    assert "lcn" in warning.fix


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(LocalContextNorm2d, window=5), nn.Identity])
def test_local_norms_change_the_border_alone(norm: object) -> None:
    model = small(norm)  # pyright: ignore[reportArgumentType]
    found = tile_consistency(model, X)
    assert all(x.reach == "local" for x in found.layers)
    # A 3 x 3 convolution reaches one position, a window of 5 two: together 2, or 2 + 4.
    border = 6 if isinstance(model[1], LocalContextNorm2d) else 2
    assert found.profile[border:] == pytest.approx([0] * (len(found.profile) - border), abs=1e-6)
    assert found.profile[0] > 1e-3
    assert not any(f.level == "warning" for f in found.findings)
    if border == 2:
        assert "within 2 positions (2 pixels)" in found.findings[-1].text
        assert "4 pixels" in found.findings[-1].fix
    else:
        assert [x.border for x in found.layers if x.norm] == [2, 2]


def test_kernel_norm_changes_the_border_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(KNConv2d(3, 8, 3, padding=1), nn.ReLU(), KNConv2d(8, 4, 5, padding=2))
    found = tile_consistency(model, X)
    assert [(x.reach, x.border) for x in found.layers] == [("local", 1), ("local", 2)]
    assert max(found.profile[3:]) < 1e-5
    assert found.findings[0].level == "good"


def test_the_error_map_by_hand() -> None:
    class MeanTaken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean((2, 3), keepdim=True)

    x = torch.zeros(1, 1, 24, 24)
    x[..., 6:18, 6:18] = 1.0  # the tile is 1 everywhere, so that it gives 0; the whole gives 3/4 there
    found = tile_consistency(nn.Sequential(MeanTaken()), x)
    assert (found.size, found.tile, found.stride) == ((24, 24), (12, 12), 1.0)
    assert found.error_map.shape == (12, 12)
    # The change is 3/4 everywhere, and the size told that of the whole's part, 3/4 too.
    torch.testing.assert_close(found.error_map, torch.ones(12, 12, dtype=torch.float64))
    assert found.profile == pytest.approx([1.0] * 6)


def test_pooling_of_the_whole_map_is_found() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pool = small(nn.BatchNorm2d), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return h * self.pool(h).sigmoid()

    found = tile_consistency(Gated(), X)
    assert any("pool take all positions" in f.text for f in found.findings if f.level == "warning")
    assert found.profile[-1] > 1e-4


def test_the_map_in_front_of_a_classifier_is_compared() -> None:
    model = nn.Sequential(small(nn.BatchNorm2d), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = tile_consistency(model, X)
    assert (found.output, found.stride) == ("1", 2.0)
    assert found.error_map.shape == (12, 12)
    assert not any(f.level == "warning" for f in found.findings)  # of the head's pooling


def test_a_segmentation_network() -> None:
    torch.manual_seed(0)
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2)
    found = tile_consistency(model, torch.randn(1, 3, 96, 96), tile=64)
    assert found.output == "(the output)"
    assert found.error_map.shape == (64, 64)
    assert {x.reach for x in found.layers if x.norm} == {"local"}


@pytest.mark.parametrize(
    ("x", "tile", "told"),
    [
        (X, 48, "tile must be a whole number from 1 to 47"),
        (X, 0, "tile must be a whole number from 1 to 47"),
        (X[..., :8, :8], None, "no map in the model has 6 positions"),
        (X[:, :, 0], None, r"x must be \(N, \*, H, W\)"),
    ],
)
def test_tiles_that_cannot_be_are_refused(x: Tensor, tile: int | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tile_consistency(small(nn.BatchNorm2d), x, tile=tile)


def test_a_model_without_maps_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.adaptive_avg_pool2d(x, 1).flatten(1))

    with pytest.raises(ValueError, match="no map in the model"):
        tile_consistency(Flat(), X)


def test_padding_and_permuting_are_no_statistics() -> None:
    class LastChannels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    class FirstChannels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 3, 1, 2)

    pad = nn.ZeroPad2d((1, 2, 1, 2))
    model = nn.Sequential(pad, small(nn.BatchNorm2d), LastChannels(), nn.LayerNorm(8), FirstChannels())
    found = tile_consistency(model, X)
    assert not any(x.reach == "global" for x in found.layers)
    assert not any(f.level == "warning" for f in found.findings)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_without_padding_give_on_a_tile_what_they_give_on_the_whole(stride: int) -> None:
    # Each position's window lies in the tile, so that nothing changes; 6 windows of 3 take 12 pixels off a tile.
    torch.manual_seed(0)
    more = [nn.Conv2d(4, 4, 3) for _ in range(5)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride), *more, nn.MaxPool2d(3, 1), nn.BatchNorm2d(4))
    found = tile_consistency(model, torch.cat([X, X], -1).repeat(1, 1, 2, 1))
    assert found.stride == stride
    assert max(found.profile) < 1e-5
    assert all(x.reach == "local" for x in found.layers)
    assert not any(f.level == "warning" for f in found.findings)
    # Of 48 pixels, 48 - 14 are left, or (48 - 2) / 2 - 12 positions of 2 pixels.
    lost = 14 if stride == 1 else 48 - 2 * 11
    assert found.findings[-1].fix == f"let tiles overlap by {lost} pixels, and they agree with the whole."


def test_padding_of_its_own_reaches_as_far_as_it_is_wide() -> None:
    torch.manual_seed(0)
    found = tile_consistency(nn.Sequential(nn.ZeroPad2d(3), nn.Conv2d(3, 4, 7)), X)
    assert [(x.kind, x.reach, x.border) for x in found.layers] == [("ZeroPad2d", "local", 3)]
    assert max(found.profile[3:]) < 1e-5
    assert found.profile[2] > 1e-3
    assert "overlap by 6 pixels" in found.findings[-1].fix
