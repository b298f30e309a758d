"""What is special about group normalization: values by hand, torch's own norms, limits, group counts, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anybatch
from anybatch.dispatch import backend
from anybatch.functional import group_norm
from anybatch.layers import GroupNorm
from anybatch.methods.group_norm import resolve_groups

CHOICES = pytest.mark.parametrize("choice", ["auto", "reference"])


def offset_input(*shape: int) -> Tensor:
    """Samples and channels with means and scales of their own."""
    x = torch.randn(shape, dtype=torch.float64)
    per_channel = (1, shape[1], *(1 for _ in shape[2:]))
    return x * torch.rand(per_channel, dtype=torch.float64) + 3 * torch.randn(per_channel, dtype=torch.float64)


@CHOICES
def test_by_hand(choice: str) -> None:
    # Group 1 holds 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5. Group 2 holds 0, 0, 2, 2: mean 1, variance 1.
    x = torch.tensor([[[1.0, 3.0], [5.0, 7.0], [0.0, 0.0], [2.0, 2.0]]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 10.0, 20.0], dtype=torch.float64)
    a, b = 9**-0.5, 1.25**-0.5  # 1 / sqrt(var + eps) with eps = 4 and 1/4
    with backend(choice):
        wide = group_norm(x, 2, weight, bias, eps=4.0)
        narrow = group_norm(x, 2, eps=0.25)
    expected = [[-3 * a, -a], [2 * a, 6 * a]]
    torch.testing.assert_close(wide[0, :2], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(narrow[0, 2:], torch.tensor([[-b, -b], [b, b]], dtype=torch.float64))
    torch.testing.assert_close(wide[0, 2:], torch.tensor([[10 - 3 * 5**-0.5] * 2, [20 + 4 * 5**-0.5] * 2]).double())


@CHOICES
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 12, 1, 1), (3, 12, 9), (2, 12, 2, 3, 3), (4, 12)])
def test_equals_torchs_group_norm(shape: tuple[int, ...], choice: str) -> None:
    x = offset_input(*shape)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    with backend(choice):
        torch.testing.assert_close(group_norm(x, 3, weight, bias, eps=1e-3), F.group_norm(x, 3, weight, bias, 1e-3))


@CHOICES
def test_one_group_is_layer_norm_over_channels_and_positions(choice: str) -> None:
    x = offset_input(2, 6, 5, 7)
    with backend(choice):
        torch.testing.assert_close(group_norm(x, 1, eps=1e-3), F.layer_norm(x, (6, 5, 7), eps=1e-3))


@CHOICES
def test_a_group_per_channel_is_instance_norm(choice: str) -> None:
    x = offset_input(2, 6, 5, 7)
    with backend(choice):
        torch.testing.assert_close(group_norm(x, 6, eps=1e-3), F.instance_norm(x, eps=1e-3))


@CHOICES
def test_scale_and_shift_of_a_group_change_nothing(choice: str) -> None:
    x = offset_input(2, 6, 5, 7)
    other = x.clone()
    other[0, :3] = 7 * x[0, :3] - 100
    with backend(choice):
        expected = group_norm(x, 2, eps=0.0)
        torch.testing.assert_close(group_norm(other, 2, eps=0.0), expected)
        other[0, 0] += 100  # one channel of a group by itself does change it
        assert (group_norm(other, 2, eps=0.0) - expected).abs().max() > 0.1


def test_groups_are_of_neighbouring_channels() -> None:
    x = offset_input(1, 6, 5, 7)
    y = group_norm(x, 3)
    for g in range(3):
        torch.testing.assert_close(y[:, 2 * g : 2 * g + 2], group_norm(x[:, 2 * g : 2 * g + 2], 1))


def test_layer_loads_torchs_state_dict() -> None:
    theirs = torch.nn.GroupNorm(3, 12, eps=1e-3).double()
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours = GroupNorm(12, 3, eps=1e-3).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = offset_input(2, 12, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_starts_as_the_plain_norm_and_resets_to_it() -> None:
    layer, x = GroupNorm(12, 3).double(), offset_input(2, 12, 5, 7)
    torch.testing.assert_close(layer(x), group_norm(x, 3))
    torch.nn.init.normal_(layer.weight)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), group_norm(x, 3))


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [
        (64, 32, 32),
        (64, 1, 1),
        (64, 64, 64),
        # "auto": the divisor nearest to 32 that leaves two channels or more.
        (1, "auto", 1),
        (2, "auto", 1),
        (3, "auto", 1),
        (4, "auto", 2),
        (7, "auto", 1),
        (16, "auto", 8),
        (31, "auto", 1),
        (32, "auto", 16),
        (36, "auto", 18),
        (37, "auto", 1),
        (40, "auto", 20),
        (62, "auto", 31),
        (64, "auto", 32),
        (72, "auto", 36),  # 36 is 4 away, 24 is 8 away
        (96, "auto", 32),
        (112, "auto", 28),
        (127, "auto", 1),
        (194, "auto", 2),  # 2 x 97: 1, 2 and 97, of which 2 is nearest
        (480, "auto", 32),
        (1680, "auto", 30),  # 30 and 35 divide, 32 does not
        (2048, "auto", 32),
    ],
)
def test_number_of_groups(channels: int, groups: int | str, expected: int) -> None:
    assert resolve_groups(channels, groups) == expected


def test_the_lower_of_two_divisors_as_near_is_taken() -> None:
    assert all(420 * 31 * 33 % g == 0 for g in (31, 33))
    assert 420 * 31 * 33 % 32
    assert resolve_groups(420 * 31 * 33, "auto") == 31


@pytest.mark.parametrize("channels", range(1, 200))
def test_auto_always_divides_and_never_leaves_one_channel(channels: int) -> None:
    groups = resolve_groups(channels, "auto")
    assert channels % groups == 0
    assert channels // groups >= 2 or channels == 1
    nearer = [g for g in range(1, channels // 2 + 1) if channels % g == 0 and abs(g - 32) < abs(groups - 32)]
    assert nearer == []


@pytest.mark.parametrize(("channels", "size", "expected"), [(96, 16, 6), (96, 96, 1), (96, 1, 96), (7, 7, 1)])
def test_group_size(channels: int, size: int, expected: int) -> None:
    assert resolve_groups(channels, group_size=size) == expected


def test_refusals_of_the_number_of_groups() -> None:
    with pytest.raises(ValueError, match=r"groups=32 does not divide 48 channels; use groups='auto' .*here 24\)"):
        GroupNorm(48)
    with pytest.raises(ValueError, match="groups=0 does not divide 48"):
        GroupNorm(48, 0)
    with pytest.raises(ValueError, match="groups=-2 does not divide 48"):
        GroupNorm(48, -2)
    with pytest.raises(ValueError, match="groups='Auto' is neither a number nor 'auto'"):
        resolve_groups(48, "Auto")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="group_size=5 does not divide 48"):
        GroupNorm(48, group_size=5)
    with pytest.raises(ValueError, match="group_size=0 does not divide 48"):
        GroupNorm(48, group_size=0)


@CHOICES
def test_refusals_of_the_input(choice: str) -> None:
    with backend(choice):
        with pytest.raises(ValueError, match=r"x must be \(N, C, \*\), got shape \(5,\)"):
            group_norm(torch.zeros(5), 1)
        for groups in (4, 0, -3):
            with pytest.raises(ValueError, match=f"groups={groups} does not divide the 6 channels of x"):
                group_norm(torch.zeros(2, 6, 3, 3), groups)
        for shape in [(2, 6), (2, 6, 1), (2, 6, 1, 1), (1, 6, 1, 1), (1, 6, 1, 1, 1)]:
            with pytest.raises(
                ValueError, match=r"groups=6 leaves one value in each group .* would erase it; use fewer"
            ):
                group_norm(torch.ones(shape), 6)


@CHOICES
def test_two_values_in_a_group_are_enough(choice: str) -> None:
    with backend(choice):
        y = group_norm(torch.tensor([[1.0, 3.0, 8.0, 4.0]]), 2, eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[-1.0, 1.0, 1.0, -1.0]]))


def test_parts() -> None:
    made = {name: anybatch.scheme(name).norm for name in ("gn", "ln", "in", "gn/8", "gn:auto", "gn(eps=0.5)")}
    layers = {name: factory(64) for name, factory in made.items()}  # pyright: ignore[reportOptionalCall, reportCallIssue]
    groups = {name: layer.num_groups for name, layer in layers.items()}
    assert groups == {"gn": 32, "ln": 1, "in": 64, "gn/8": 8, "gn:auto": 32, "gn(eps=0.5)": 32}
    assert layers["gn(eps=0.5)"].eps == 0.5
    assert all(layer.weight.shape == (64,) for layer in layers.values())
    for name in ("gn(affine=False)", "ln(affine=False)", "in(affine=False)"):
        assert anybatch.scheme(name).norm(64).weight is None  # pyright: ignore[reportOptionalCall, reportCallIssue]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gn(groups=0)", "groups=0 is neither a number above 0 nor 'auto'"),
        ("gn(groups=-8)", "groups=-8 is neither"),
        ("gn(groups=8.5)", "groups=8.5 is neither"),
        ("gn:many", "groups='many' is neither"),
        ("gn/0", "group_size must be a whole number of 1 or more, got 0"),
        ("gn(group_size=auto)", "group_size must be a whole number of 1 or more, got 'auto'"),
        ("gn(affine=no)", "affine='no' is neither True nor False"),
        ("ln(affine=1)", "affine=1 is neither True nor False"),
    ],
)
def test_refusals_of_the_part(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anybatch.scheme(spec)


def test_gradients_of_each_sample_through_the_recomputing_kernel() -> None:
    """As differential privacy takes them: vmap over samples equals a loop over them."""
    x = torch.randn(3, 6, 5, 5).to(torch.bfloat16)
    weight, bias = torch.randn(6), torch.randn(6)

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return group_norm(sample[None], 3, weight, bias).float().pow(3).sum()

    with backend("recompute"):
        together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
        singly = torch.stack([torch.func.grad(loss)(weight, sample) for sample in x])
    torch.testing.assert_close(together, singly, rtol=1e-5, atol=1e-4)  # sums in another order
