"""convert_batchnorm: what it keeps, what it fits, what it refuses."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch import layers
from anybatch.convert import convert_batchnorm, fold, freeze_batchnorm, precise_batchnorm
from anybatch.convert.calibrate import Sums, group_numbers
from anybatch.convert.kinds import as_affine, is_batchnorm
from anybatch.convert.offsets import _balanced_signs, _free_signs
from anybatch.methods.common import Taken

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

TARGETS = ("gn", "ws+gn", "ln", "in", "pn", "lcn", "ws+bcn", "frn", "evos0", "kn", "sws", "nf", "frozen")


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU for all, and a sum in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.block = Block(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.act(self.norm(self.stem(x))))
        return self.head(F.relu(self.bn(self.depthwise(x)))).mean((2, 3))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """With norms that have learned something, and statistics of these images."""
    for module in model.modules():
        if is_batchnorm(module) and isinstance(module.weight, Tensor):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)  # pyright: ignore[reportCallIssue]
    precise_batchnorm(model, [x])
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    # Images differ in their brightness, as real ones do.
    return torch.randn(48, 3, 8, 8) + torch.randn(48, 1, 1, 1)


@pytest.fixture
def net(images: Tensor) -> nn.Module:
    return trained(Net(), images)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def change(model: nn.Module, old: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        before = old(x)
        return ((model(x) - before).norm() / before.norm()).item()


def left_of_batchnorm(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_batchnorm(module)]


# By hand


def test_least_squares_by_hand() -> None:
    sums = Sums()
    z = torch.tensor([[[0.0, 2.0]], [[4.0, 6.0]]])  # (2, 1, 2)
    t = torch.tensor([[[1.0, 2.0]], [[2.0, 5.0]]])
    for i in range(2):  # streamed
        sums.add(z[i : i + 1], t[i : i + 1])
    # mean z 3, mean t 2.5; cov = (3 * 1.5 + 1 * 0.5 + 1 * -0.5 ... ) = (4.5 + 0.5 - 0.5 + 7.5) / 4 = 3; var z = 5
    scale, shift, rest = sums.fit(1)
    assert scale.item() == pytest.approx(0.6)
    assert shift.item() == pytest.approx(2.5 - 0.6 * 3)
    # var t = (2.25 + 0.25 + 0.25 + 6.25) / 4 = 2.25; left: 2.25 - 0.6 * 3
    assert rest == pytest.approx(0.45 / 2.25)


def test_least_squares_of_a_constant_channel_keeps_the_scale() -> None:
    sums = Sums()
    sums.add(torch.full((2, 1, 3), 7.0), torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]]))
    scale, shift, rest = sums.fit(1)
    assert (scale.item(), shift.item(), rest) == (1.0, pytest.approx(2.0 - 7.0), pytest.approx(1.0))


def test_least_squares_of_groups_pool_their_channels() -> None:
    torch.manual_seed(0)
    z, t = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    sums = Sums()
    sums.add(z, t)
    scale, shift, _ = sums.fit(2)
    for group in range(2):
        a, b = (maps[:, 2 * group : 2 * group + 2].flatten() for maps in (z, t))
        solved = torch.linalg.lstsq(torch.stack([a, torch.ones_like(a)], 1), b).solution
        torch.testing.assert_close(torch.stack([scale[group], shift[group]]), solved)


def test_numbers_of_groups_leave_two_channels() -> None:
    assert group_numbers(16) == [1, 2, 4, 8]
    assert group_numbers(12) == [1, 2, 3, 6]
    assert group_numbers(7) == [1]


def test_constants_of_a_batchnorm() -> None:
    bn = nn.BatchNorm1d(1, eps=0.0)
    bn.load_state_dict({"weight": torch.tensor([3.0]), "bias": torch.tensor([1.0]),
                        "running_mean": torch.tensor([2.0]), "running_var": torch.tensor([4.0]),
                        "num_batches_tracked": torch.tensor(1)})  # fmt: skip
    scale, shift = as_affine(bn)
    assert (scale.item(), shift.item()) == (1.5, -2.0)


def test_signs_cancel_what_varies_together() -> None:
    torch.manual_seed(0)
    means = torch.randn(200, 1).double() + 0.1 * torch.randn(200, 8).double()  # channels that brighten together
    cov = torch.cov(means.T)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8))).double()
    spread = ((signs @ cov) * signs).sum(1)
    free, balanced = _free_signs(cov), _balanced_signs(cov)
    assert free @ cov @ free <= 2 * spread.min()
    assert balanced.sum() == 0
    assert balanced @ cov @ balanced <= 2 * spread[signs.sum(1) == 0].min()


def test_constants_make_a_group_norm_affine_to_first_order() -> None:
    """As the formula of `anybatch.convert.offsets` says, with an error that falls with the square of k."""
    torch.manual_seed(0)
    x, o = torch.randn(3, 4, 50).double(), torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    means = x.mean(2)
    affine = x - means.mean(1)[:, None, None] - (means @ o)[:, None, None] * o[None, :, None] / 4
    for k in (100.0, 1000.0):
        y = layers.GroupNorm(4, 1, eps=0.0, affine=False)(x + k * o[None, :, None])
        assert ((y - o[None, :, None]) * k - affine).abs().max() < 10 / k


# What is kept


@pytest.mark.parametrize("to", TARGETS)
def test_every_target_takes_a_batch_of_one_and_leaves_no_batchnorm(to: str, net: nn.Module, images: Tensor) -> None:
    before, generator = state(net), torch.get_rng_state()
    made, report = convert_batchnorm(net, to, return_report=True)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_state(net, before)
    exact = to in ("sws", "nf", "frozen")
    assert (change(made, net, images) < 1e-5) == exact
    assert not report.left
    assert sorted(report.replaced) == ["block.bn1", "block.bn2", "bn", "norm"]
    if to not in ("nf", "frozen"):  # which have constants, nf behind the depthwise convolution
        assert not left_of_batchnorm(made)
    assert made(images[:1]).isfinite().all()
    assert not made.training
    made.train()(images[:1]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


# Instance norm takes away how bright images are, which these tell of mostly, and no scale and shift give it back.
@pytest.mark.parametrize("to", [to for to in TARGETS if to not in ("frozen", "sws", "nf", "in")])
def test_calibration_comes_nearer(to: str, net: nn.Module, images: Tensor) -> None:
    copied = change(convert_batchnorm(net, to), net, images)
    made, report = convert_batchnorm(net, to, calibrate=[images], return_report=True)
    after = change(made, net, images)
    assert after < copied
    assert report.drift == pytest.approx(after, rel=1e-3)
    assert set(report.residuals) == set(report.replaced)
    assert all(0 <= rest <= 1 for rest in report.residuals.values())


def test_frozen_is_exact(net: nn.Module, images: Tensor) -> None:
    assert change(convert_batchnorm(net, "frozen"), net, images) < 1e-5
    made = convert_batchnorm(net, "frozen").train()
    torch.testing.assert_close(made(images[:1]), net(images[:1]), rtol=1e-5, atol=1e-5)


def test_standardized_filters_are_the_old_ones(net: nn.Module) -> None:
    made, report = convert_batchnorm(net, "ws+gn", return_report=True)
    assert sorted(report.convolutions) == ["block.conv1", "block.conv2", "stem"]
    assert "depthwise" in report.convolutions_left["depthwise"]
    assert report.convolutions_left["head"] == "no new norm behind it"
    for name in report.convolutions:
        conv: Any = made.get_submodule(name)
        assert isinstance(conv, layers.WSConv2d)
        torch.testing.assert_close(conv.standardized(), net.get_submodule(name).weight)
    assert isinstance(made.head, nn.Conv2d)
    assert not isinstance(made.head, layers.WSConv2d)


def test_without_a_norm_filters_keep_their_mean(images: Tensor) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 3, bias=True), nn.BatchNorm2d(6)), images)
    assert change(convert_batchnorm(model, "sws"), model, images) < 1e-6


def test_kernel_norm_takes_scale_and_shift_into_its_filters(images: Tensor) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), images)
    made, report = convert_batchnorm(model, "kn", return_report=True)
    assert isinstance(made, nn.Sequential)
    assert isinstance(made[0], layers.KNConv2d)
    assert report.replaced == {"1": "inside of 0"}
    weight, old = made[0].weight.detach(), model[0].weight.detach()  # pyright: ignore
    sizes = (weight - weight.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1)
    torch.testing.assert_close(sizes, model[1].weight.detach())  # pyright: ignore
    torch.testing.assert_close(F.cosine_similarity(weight.flatten(1), old.flatten(1)), torch.ones(6))
    torch.testing.assert_close(made[0].bias, model[1].bias)  # pyright: ignore


def test_groups(net: nn.Module, images: Tensor) -> None:
    assert set(convert_batchnorm(net, "gn", return_report=True)[1].groups.values()) == {4}
    assert set(convert_batchnorm(net, "gn", groups=2, return_report=True)[1].groups.values()) == {2}
    assert set(convert_batchnorm(net, "gn:8", calibrate=[images], return_report=True)[1].groups.values()) == {8}
    fixed = convert_batchnorm(net, "gn", calibrate=[images], groups=2, return_report=True)[1]
    chosen = convert_batchnorm(net, "gn", calibrate=[images], return_report=True)[1]
    assert set(fixed.groups.values()) == {2}
    assert chosen.residuals["norm"] <= fixed.residuals["norm"]


@pytest.mark.parametrize("to", ["gn", "ws+gn", "ln"])
def test_constants_keep_what_samples_are_like(to: str, net: nn.Module, images: Tensor) -> None:
    far = change(convert_batchnorm(net, to, calibrate=[images], offset=0), net, images)
    made, report = convert_batchnorm(net, to, calibrate=[images], return_report=True)
    assert change(made, net, images) < 0.7 * far  # of 8 channels two sums are much
    assert "block.conv1.bias" in report.new_parameters
    assert sorted(report.offsets) == ["block.bn1", "block.bn2", "bn", "norm"]
    with torch.no_grad():  # the constants are 4 standard deviations, of either sign in equal numbers
        x = made.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # pyright: ignore
        seen: list[Tensor] = []
        made(images)
        x.remove()
    mean, std = seen[0].mean((0, 2, 3)), seen[0].std((0, 2, 3))
    torch.testing.assert_close(std, torch.ones(8), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mean.abs(), torch.full((8,), 4.0), rtol=1e-3, atol=1e-3)
    assert mean.sum().abs() < 1e-2


def test_distillation_comes_nearer_still(net: nn.Module, images: Tensor) -> None:
    batches = list(images.split(2))
    calibrated = convert_batchnorm(net, "ws+gn", calibrate=batches)
    made = convert_batchnorm(net, "ws+gn", calibrate=batches, distill=60)
    assert change(made, net, images) < 0.95 * change(calibrated, net, images)
    assert all(p.grad is None for p in made.parameters())


def test_dtype_mode_and_other_names_stay(net: nn.Module) -> None:
    net = net.double().train()
    net.block.eval()
    made = convert_batchnorm(net, "ws+gn")
    assert {t.dtype for t in made.parameters()} == {torch.float64}
    assert made.training
    assert not made.block.training
    assert not made.block.bn1.training
    assert net.state_dict().keys() - made.state_dict().keys() == {
        f"{name}.{key}" for name in ("norm", "bn", "block.bn1", "block.bn2")
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }  # fmt: skip


def test_half_precision_is_calibrated(net: nn.Module, images: Tensor) -> None:
    half = net.bfloat16()
    made = convert_batchnorm(half, "gn", calibrate=[images])
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert change(made, half, images.bfloat16()) < change(convert_batchnorm(half, "gn"), half, images.bfloat16())


def test_in_place_keeps_parameters(net: nn.Module, images: Tensor) -> None:
    expected = convert_batchnorm(net, "ws+gn", calibrate=[images])
    weights = dict(net.named_parameters())
    made = convert_batchnorm(net, "ws+gn", calibrate=[images], inplace=True)
    assert made is net
    assert all(p is weights[name] for name, p in net.named_parameters() if name in weights)
    torch.testing.assert_close(net(images), expected(images))


def test_converted_networks_survive_copies_and_folding(net: nn.Module, images: Tensor) -> None:
    made = convert_batchnorm(net, "ws+gn", calibrate=[images])
    plain, report = convert_batchnorm(net, "ws+gn", calibrate=[images], offset=0, return_report=True)
    again = convert_batchnorm(net, "ws+gn", groups=report.groups)
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again(images), plain(images))
    torch.testing.assert_close(copy.deepcopy(made)(images), made(images))
    torch.testing.assert_close(fold(made)(images), made(images), rtol=1e-4, atol=1e-5)


# Kinds of BatchNorm, and where they are held


class Listed(nn.Module):
    """Layers in a list of Python's, and one that is registered too; a norm that serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.again = self.bn
        self.steps = [self.conv, self.bn]
        self.other = {"norm": (nn.BatchNorm2d(4), nn.ReLU())}

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.other["norm"][1](self.other["norm"][0](self.again(x)))


def test_shared_and_list_held_norms(images: Tensor) -> None:
    model = Listed()
    model.other["norm"][0].eval()
    trained(model, images)
    made, report = convert_batchnorm(model, "gn", calibrate=[images], return_report=True)
    assert list(report.replaced) == ["bn", "other.norm.0"]
    assert made.bn is made.again is made.steps[1]  # pyright: ignore
    assert made.steps[0] is made.conv  # pyright: ignore
    assert isinstance(made.other["norm"][0], layers.GroupNorm)  # pyright: ignore
    assert isinstance(model.other["norm"][0], nn.BatchNorm2d)
    assert made(images[:1]).isfinite().all()


@pytest.mark.parametrize(
    ("conv", "norm", "x"),
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), torch.randn(6, 3, 9)),
        (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), torch.randn(6, 3, 4, 5, 6)),
        (nn.Conv3d(3, 4, 2), nn.SyncBatchNorm(4), torch.randn(6, 3, 4, 5, 6)),
        (nn.Conv1d(3, 4, 3), layers.SyncBatchNorm(4), torch.randn(6, 3, 9)),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), torch.randn(6, 3, 5, 5)),
        (nn.Conv2d(3, 4, 3), layers.FrozenBatchNorm(4), torch.randn(6, 3, 5, 5)),
    ],
    ids=["1d", "3d", "sync", "ours", "without affine", "frozen"],
)
@pytest.mark.parametrize("to", ["ws+gn", "frn", "lcn", "kn", "frozen"])
def test_dimensions_and_kinds(conv: nn.Module, norm: nn.Module, x: Tensor, to: str) -> None:
    model = nn.Sequential(conv, norm, nn.ReLU()).eval()
    made, report = convert_batchnorm(model, to, calibrate=[x], return_report=True)
    assert list(report.replaced) == ["1"]
    if to == "frozen":
        torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
    else:
        assert change(made, model, x) < change(convert_batchnorm(model, to), model, x)


def test_torchvisions_frozen_batchnorm(images: Tensor) -> None:
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    made, report = convert_batchnorm(model, "gn", calibrate=[images], return_report=True)
    assert isinstance(made[1], layers.GroupNorm)  # pyright: ignore
    assert report.drift is not None
    assert report.drift < 1
    assert change(convert_batchnorm(model, "frozen"), model, images) < 1e-5


def test_norms_that_were_frozen_are_converted(net: nn.Module) -> None:
    freeze_batchnorm(net)
    made = convert_batchnorm(net, "gn")
    assert not left_of_batchnorm(made)
    assert not made.norm.weight.requires_grad  # pyright: ignore


def test_timms_norm_keeps_its_activation(images: Tensor) -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), timm_layers.BatchNormAct2d(4, act_layer=nn.SiLU)), images)
    made = convert_batchnorm(model, "ws+gn", calibrate=[images])
    assert isinstance(made[1].norm, layers.GroupNorm)
    assert isinstance(made[1].act, nn.SiLU)
    assert change(convert_batchnorm(model, "frozen"), model, images) < 1e-5
    relu = trained(nn.Sequential(nn.Conv2d(3, 4, 3), timm_layers.BatchNormAct2d(4)), images)
    assert isinstance(convert_batchnorm(relu, "frn")[1], layers.FilterResponseNorm2d)  # pyright: ignore


def test_norms_that_activate_take_the_relu_behind_them(net: nn.Module, images: Tensor) -> None:
    made: Any = convert_batchnorm(net, "frn")
    assert isinstance(made.act, Taken)
    assert made.norm.apply_act
    assert isinstance(made.block.relu, nn.ReLU)
    assert made.block.bn1.apply_act
    assert not made.block.bn2.apply_act
    assert made.bn.apply_act  # behind it a function


# What is refused, and leaves everything as it was


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) if x.abs().sum().item() > 0 else x


def test_what_cannot_be_traced_warns_by_name(images: Tensor) -> None:
    model = Untraceable().eval()
    with pytest.warns(UserWarning, match="no trace reaches bn"):
        made, report = convert_batchnorm(model, "ws+gn", return_report=True)
    assert isinstance(made.bn, layers.GroupNorm)
    assert report.convolutions_left == {"conv": "no new norm behind it"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(convert_batchnorm(model, "gn").bn, layers.GroupNorm)  # needs no trace
    with pytest.raises(ValueError, match="no trace tells which convolution feeds it"):
        convert_batchnorm(model, "kn")


def test_a_norm_without_averages(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)).eval()
    made, report = convert_batchnorm(model, "frozen", return_report=True)
    assert report.left == {"1": "it keeps no running averages that could be frozen"}
    assert isinstance(made[1], nn.BatchNorm2d)  # pyright: ignore
    assert change(convert_batchnorm(model, "gn", calibrate=[images]), model, images) < 1


def test_tied_filters(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    model.eval()
    made: Any = convert_batchnorm(model, "ws+gn")
    assert made[0].weight is made[2].weight
    with pytest.raises(ValueError, match="whose weight is another layer's too"):
        convert_batchnorm(model, "kn")


def test_kernel_norm_leaves_norms_without_a_convolution_in_front() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    made, report = convert_batchnorm(model, "kn", return_report=True)
    assert list(report.left) == ["0"]
    assert "no convolution in front can take it in" in report.left["0"]
    assert isinstance(made[0], nn.BatchNorm2d)  # pyright: ignore
    assert any("1 BatchNorm layer" in line for line in report.advice)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"to": "gnn"}, "unknown part 'gnn'"),
    "incomplete": ({"to": "ws"}, "needs a norm"),
    "clipping": ({"to": "nf+agc"}, "also asks for clipping"),
    "batchnorm": ({"to": "bn"}, "BatchNorm again"),
    "nothing": ({"to": "none"}, "nothing to put in the place"),
    "lrn": ({"to": "lrn"}, "no scale and shift"),
    "groups": ({"groups": 0}, "groups=0 is neither"),
    "groups of another width": ({"to": "gn", "groups": 3}, "groups=3 does not divide 8"),
    "exclude": ({"exclude": "nrm"}, "unknown module to exclude 'nrm'.*norm"),
    "empty": ({"calibrate": []}, "loader is empty"),
    "labels": ({"calibrate": [torch.zeros(4, dtype=torch.int64)]}, "must give images.*int64"),
    "nan": ({"calibrate": [torch.full((2, 3, 8, 8), torch.nan)]}, "not finite"),
    "other images": ({"calibrate": [torch.zeros(2, 4, 8, 8)]}, "channels"),
    "steps": ({"distill": -1}, "distill=-1"),
    "distill alone": ({"distill": 5}, "distill needs images"),
    "dp": ({"to": "gn", "dp": True, "exclude": "bn"}, "dp=True: bn"),
    "dp of bcn": ({"to": "ws+bcn", "dp": True}, "dp=True: norm.bn"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("inplace", [False, True])
def test_refusals_change_nothing(case: str, inplace: bool, net: nn.Module) -> None:
    arguments, message = REFUSED[case]
    if arguments.get("dp"):
        pytest.importorskip("opacus")
    net.train()
    before, text = state(net), repr(net)
    with pytest.raises((ValueError, RuntimeError), match=message):
        convert_batchnorm(net, **arguments, inplace=inplace)
    assert repr(net) == text
    assert net.training
    assert_same_state(net, before)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_refusals_of_models(images: Tensor) -> None:
    with pytest.raises(ValueError, match="no BatchNorm of the model becomes gn: it has none"):
        convert_batchnorm(nn.Conv2d(3, 4, 3), "gn")
    with pytest.raises(ValueError, match="has no shape before the model has seen an input"):
        convert_batchnorm(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), "gn")
    with pytest.raises(ValueError, match="which is a BatchNorm"):
        convert_batchnorm(nn.BatchNorm2d(4), "gn", inplace=True)
    assert isinstance(convert_batchnorm(nn.BatchNorm2d(4), "gn"), layers.GroupNorm)


def test_excluded_modules_stay(net: nn.Module) -> None:
    made, report = convert_batchnorm(net, "ws+gn", exclude=("block", "stem"), return_report=True)
    assert report.left == {"block.bn1": "excluded", "block.bn2": "excluded"}
    assert report.convolutions_left["stem"] == "excluded"
    assert isinstance(made.block.bn1, nn.BatchNorm2d)  # pyright: ignore


def test_hooked_and_strange_norms_stay() -> None:
    class Strange(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Strange(4), nn.BatchNorm2d(4))
    model[1].register_forward_hook(lambda *_: None)
    report = convert_batchnorm(model, "gn", return_report=True)[1]
    assert report.left == {"1": "it has hooks", "2": "Strange has a forward of its own"}


# Opacus


@pytest.mark.parametrize("to", ["gn", "ws+gn", "kn", "sws"])
def test_dp_has_nothing_in_place(to: str, net: nn.Module, images: Tensor) -> None:
    pytest.importorskip("opacus")
    plain = convert_batchnorm(net, to, calibrate=[images])
    made = convert_batchnorm(net, to, calibrate=[images], dp=True)
    assert not any(getattr(module, "inplace", False) for module in made.modules())
    assert not list(made.buffers())
    assert made.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(made(images), plain(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to", ["gn", *(pytest.param(to, marks=pytest.mark.slow) for to in ("ws+gn", "kn"))])
def test_opacus_trains_a_converted_resnet(to: str) -> None:
    opacus = pytest.importorskip("opacus")
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = convert_batchnorm(resnet18(num_classes=3).double(), to, dp=True)
    if to == "kn":
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0  # whose mask a loop over samples would draw anew
    x, y = torch.randn(2, 3, 40, 40, dtype=torch.float64), torch.tensor([0, 2])
    alone = copy.deepcopy(model)
    wrapped = opacus.GradSampleModule(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 1e-3)
    for _ in range(2):
        alone.load_state_dict(model.state_dict())
        loop = []
        for i in range(2):
            loss = F.cross_entropy(alone(x[i : i + 1]), y[i : i + 1])
            loop.append(torch.autograd.grad(loss, [p for p in alone.parameters() if p.requires_grad]))
        for p in wrapped.parameters():
            p.grad_sample = None  # pyright: ignore
        F.cross_entropy(wrapped(x), y).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, *each in zip(trained, *loop, strict=True):
            torch.testing.assert_close(p.grad_sample, torch.stack(each), rtol=1e-6, atol=1e-6)  # pyright: ignore
        optimizer.step()
        optimizer.zero_grad()
