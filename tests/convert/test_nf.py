"""convert_batchnorm(to="nf"): the same function without norms, what is inserted where, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch
from anybatch import layers
from anybatch.convert import convert_batchnorm, fold, precise_batchnorm
from anybatch.convert.kinds import is_batchnorm
from anybatch.convert.saved import Origin, save_converted
from anybatch.methods.normalizer_free import BranchScale, NormalizerFreeJoin
from anybatch.models.named import model_named

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def conv(i: int, o: int, size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, size, padding=size // 2, bias=False, **more)


class Block(nn.Module):
    """As torchvision writes it, with a projection where the width changes."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(i, o), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if i == o else nn.Sequential(conv(i, o, 1), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PreActivated(nn.Module):
    """Norm and activation in front, and whatever is given between the branch and the sum."""

    def __init__(self, channels: int, last: nn.Module | None) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv(channels, channels)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x + (h if self.last is None else self.last(h))


class Strange(nn.Module):
    """Cannot be traced."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x)) if x.sum() > 0 else x


class Net(nn.Sequential):
    """A stem, blocks and a classifier."""

    def __init__(self, *blocks: nn.Module, channels: int = 6) -> None:
        first = nn.Sequential(conv(3, channels), nn.BatchNorm2d(channels), nn.ReLU())
        last = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))
        super().__init__(first, *blocks, *last)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(16, 3, 8, 8).double()


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """In float64, with filters, norms and statistics as learning leaves them: means, signs and sizes of any kind."""
    model.double().eval()(x)
    with torch.no_grad():
        for module in model.modules():
            if is_batchnorm(module):
                module.weight.normal_(0.8, 0.5)  # pyright: ignore
                module.bias.normal_(0, 0.3)  # pyright: ignore
            elif isinstance(module, nn.modules.conv._ConvNd):
                module.weight += 0.5 * module.weight.std()
    precise_batchnorm(model, [x])
    return model.eval()


@pytest.fixture
def net(images: Tensor) -> nn.Module:
    return trained(Net(Block(6, 6), Block(6, 8)), images)


def assert_same(model: nn.Module, old: nn.Module, x: Tensor, relative: float = 1e-11) -> None:
    with torch.no_grad():
        wanted = old(x)
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=relative * wanted.abs().max().item())


def torchvisions() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=4)


# What is kept


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's": torchvisions,
    "ours": lambda: anybatch.create_model("resnet14", scheme="bn", num_classes=4),
    "ours, pre-activated": lambda: anybatch.create_model("preact_resnet14", scheme="bn", num_classes=4),
    "bottlenecks": lambda: anybatch.create_model("resnet50", scheme="bn", num_classes=4, width=4),
    "bottlenecks, pre-activated": lambda: anybatch.create_model("preact_resnet50", scheme="bn", num_classes=4, width=4),
    "stochastic depth": lambda: anybatch.create_model("resnet8", scheme="bn", num_classes=4, drop_path_rate=0.2),
    "by hand": lambda: Net(Block(6, 6), Block(6, 8)),
    "by hand, pre-activated": lambda: Net(PreActivated(6, None), PreActivated(6, nn.Identity())),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64).double()
    model = trained(NETWORKS[name](), x)
    made, report = convert_batchnorm(model, "nf", calibrate=[x], return_report=True)
    assert_same(made, model, x)
    assert report.drift is not None
    assert report.drift < 1e-11
    assert not report.left
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in made.modules())
    single = convert_batchnorm(model.float(), "nf")
    assert_same(single, model, x.float(), 1e-4)


@pytest.mark.parametrize("to", ["nf", "nf(skip_gain=None)", "nf(alpha=0.5)", "nf(eps_rule=add)"])
def test_options_of_the_scheme(to: str, net: nn.Module, images: Tensor) -> None:
    made: Any = convert_batchnorm(net, to)
    assert_same(made, net, images)
    scale: Any = made[1].bn2
    assert isinstance(scale, BranchScale)
    assert scale.alpha == (0.5 if "0.5" in to else 0.2)
    assert (scale.gain is None) == ("None" in to)
    assert made[1].conv1.eps_rule == ("add" if "add" in to else "max")


def test_a_branch_that_starts_at_nothing_starts_there_and_learns(images: Tensor) -> None:
    model: Any = trained(Net(Block(6, 6)), images)
    nn.init.zeros_(model[1].bn2.weight)
    made: Any = convert_batchnorm(model, "nf")
    assert_same(made, model, images)
    assert made[1].bn2.gain.item() == pytest.approx(5)
    made(images).square().sum().backward()
    assert made[1].conv2.gain.grad.abs().max() > 0


def test_calibration_draws_and_changes_nothing(net: nn.Module, images: Tensor) -> None:
    before, generator = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    plain, fitted = convert_batchnorm(net, "nf"), convert_batchnorm(net, "nf", calibrate=[images])
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    for key in plain.state_dict().keys() - {"4.weight", "4.bias"}:
        torch.testing.assert_close(fitted.state_dict()[key], plain.state_dict()[key], rtol=0, atol=0)


# What is inserted


def test_by_hand() -> None:
    """A filter (1, 3), of mean 2 and norm sqrt(2) without it, and a norm of weight 3 over a standard deviation of 2."""
    model: Any = Net(Block(6, 6)).double().eval()
    model(torch.zeros(1, 3, 8, 8).double())
    branch = model[1]
    with torch.no_grad():
        branch.conv2.weight[:] = torch.tensor([1.0, 3.0]).double().repeat(27).view(6, 3, 3).repeat(6, 1, 1, 1)
        branch.bn2.weight.fill_(3.0)
        branch.bn2.bias.fill_(1.0)
        branch.bn2.running_mean.fill_(4.0)
        branch.bn2.running_var.fill_(4.0)
        branch.bn2.eps = 0.0
    made: Any = convert_batchnorm(model, "nf")
    new = made[1].conv2
    assert isinstance(new, layers.ScaledWSConv2d)
    # 54 values of +-1 about the mean: the norm that standardizing divides by is sqrt(54).
    torch.testing.assert_close(new.weight_gamma.flatten(), torch.full((6,), 54**0.5 / 2).double())
    torch.testing.assert_close(new.weight_beta.flatten(), torch.full((6,), 2 / 2).double())
    # The branch has variance 9: it is divided by 3, and the number makes up for it, 0.2 times 15.
    torch.testing.assert_close(new.gain, torch.ones(6).double())
    torch.testing.assert_close(new.bias, torch.full((6,), (1 - 4 * 3 / 2) / 3).double())
    assert isinstance(made[1].bn2, BranchScale)
    assert made[1].bn2.gain.item() == pytest.approx(15)
    torch.testing.assert_close(new.standardized(), model[1].conv2.weight / 2)


def test_filters_stay_and_give_variance_1_at_gain_1(net: Any, images: Tensor) -> None:
    made: Any = convert_batchnorm(net, "nf")
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            new = made.get_submodule(name)
            assert isinstance(new, layers.ScaledWSConv2d)
            torch.testing.assert_close(new.weight, module.weight, rtol=0, atol=0)
    torch.testing.assert_close(made[1].conv1.gain, net[1].bn1.weight)
    with torch.no_grad():
        made[1].conv1.gain.fill_(1)
        given = made[1].conv1(made[0](images))
    torch.testing.assert_close(given.var((0, 2, 3), correction=0), torch.ones(6).double(), rtol=1e-3, atol=0)


def test_a_branch_has_variance_1(net: Any, images: Tensor) -> None:
    """Also with a norm in front of the sum whose channels differ."""
    made: Any = convert_batchnorm(net, "nf")
    with torch.no_grad():
        block = made[1]
        given = block.conv2(block.relu(block.conv1(made[0](images))))
    assert given.var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, rel=0.01)


def test_our_joins_and_identities_scale_branches(images: Tensor) -> None:
    model = trained(anybatch.create_model("preact_resnet8", scheme="bn", num_classes=4), images)
    made, report = convert_batchnorm(model, "nf", return_report=True)
    joins = [module for module in made.modules() if isinstance(module, NormalizerFreeJoin)]
    assert [join.gain.item() for join in joins if join.gain is not None] == [pytest.approx(5)] * 3
    assert [join.transition for join in joins] == [False, True, True]
    assert list(report.branches) == ["layer1.0.join", "layer2.0.join", "layer3.0.join"]

    blocks = [PreActivated(6, last) for last in (None, nn.Identity(), nn.Dropout(), nn.ReLU(), None)]
    hand = trained(Net(*blocks), images)
    made, report = convert_batchnorm(hand, "nf", return_report=True)
    assert_same(made, hand, images)
    assert isinstance(made.get_submodule("2.last"), BranchScale)
    assert list(report.branches.values()) == [
        "it ends in a convolution that the network's own code adds to; its gains scale it",
        "alpha 0.2 times 5, which learns",
        "it ends in a convolution that the network's own code adds to; its gains scale it",
        "it does not end in a convolution that was standardized; nothing is inserted",  # in ReLU
        "it does not end in a convolution that was standardized; nothing is inserted",  # no norm follows
    ]


def test_images_tell_the_variance_of_branches_that_end_in_convolutions(images: Tensor) -> None:
    model: Any = trained(anybatch.create_model("preact_resnet8", scheme="bn", num_classes=4), images)
    seen: list[Any] = []
    with torch.no_grad():
        handle = model.layer1[0].conv2.register_forward_hook(lambda _, args, y: seen.append(y))
        model(images)
        handle.remove()
        var = seen[0].var((0, 2, 3), correction=0).mean().item()
        made, report = convert_batchnorm(model, "nf", calibrate=images.split(5), return_report=True)
        made.get_submodule("layer1.0.conv2").register_forward_hook(lambda _, args, y: seen.append(y))
        made(images)
    assert_same(made, model, images)
    assert seen[1].var((0, 2, 3), correction=0).mean().item() == pytest.approx(1)
    assert made.get_submodule("layer1.0.join").gain.item() == pytest.approx(var**0.5 / 0.2)  # pyright: ignore
    wanted = f"alpha 0.2 times {var**0.5 / 0.2:.3g}, which learns; what the branch adds has variance {var:.2g}"
    assert report.branches["layer1.0.join"] == wanted


def test_gates_in_front_of_our_joins_and_of_identities(images: Tensor) -> None:
    """What does not scale along is not divided, and the number starts where nothing changes."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean((2, 3), keepdim=True).sigmoid()

    model = trained(Net(PreActivated(6, nn.Sequential(Gate(), nn.Identity())), Block(6, 6)), images)
    made, report = convert_batchnorm(model, "nf", return_report=True)
    assert_same(made, model, images)
    assert report.branches["1.last.1"] == "alpha 0.2 times 5, which learns"
    made, report = convert_batchnorm(model, "nf(skip_gain=None)", return_report=True)
    assert_same(made, model, images)
    assert "no convolution ends it" in report.branches["1.last.1"]


def test_norms_without_a_convolution_become_constants(images: Tensor) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.bn1 = conv(6, 6, groups=6), nn.BatchNorm2d(6)
            self.up, self.bn2 = nn.ConvTranspose2d(6, 6, 1), nn.BatchNorm2d(6)
            self.twice, self.bn3 = conv(6, 6), nn.BatchNorm2d(6)
            self.rows, self.bn4 = nn.LazyLinear(5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.bn2(self.up(F.silu(self.bn1(self.depthwise(x)))))
            h = self.twice(h)
            x = x + (self.bn3(h) + h)
            return self.bn4(self.rows(x.flatten(1)))

    model = trained(nn.Sequential(conv(3, 6), Odd()), images)
    made, report = convert_batchnorm(model, "nf", return_report=True)
    assert_same(made, model, images)
    assert not report.left
    frozen = [name for name, module in made.named_modules() if isinstance(module, layers.FrozenBatchNorm)]
    assert frozen == ["1.bn1", "1.bn2", "1.bn3", "1.bn4"]
    assert "1.depthwise feeds it: depthwise: few values in a filter" in report.replaced["1.bn1"]
    assert "1.up feeds it, which is a ConvTranspose2d and no convolution" in report.replaced["1.bn2"]
    assert "its input, 1.twice, is used elsewhere too" in report.replaced["1.bn3"]
    assert "1.rows feeds it, which is a Linear" in report.replaced["1.bn4"]
    assert list(report.branches.values()) == [
        "it does not end in a convolution that was standardized; nothing is inserted"
    ]


def test_what_is_excluded_stays_and_norms_without_averages_do(images: Tensor) -> None:
    model: Any = trained(Net(Block(6, 6), Block(6, 8)), images)
    model[2].bn1 = nn.BatchNorm2d(8, track_running_stats=False).double()
    made, report = convert_batchnorm(model, "nf", exclude="1", return_report=True)
    assert_same(made, model, images)
    assert report.left == {
        "1.bn1": "excluded",
        "1.bn2": "excluded",
        "2.bn1": "it keeps no running averages that could be frozen",
    }
    assert report.convolutions_left["1.conv1"] == "excluded"
    assert list(report.branches) == ["add", "2.bn2"]


def test_parts_that_cannot_be_traced_keep_constants_and_are_named(images: Tensor) -> None:
    model = trained(Net(Block(6, 6), Strange(6)), images)
    with pytest.warns(UserWarning, match=r"no trace reaches 2\.bn"):
        made, report = convert_batchnorm(model, "nf", return_report=True)
    assert_same(made, model, images)
    assert "no trace tells which convolution feeds it" in report.replaced["2.bn"]
    assert list(report.branches) == ["1.bn2"]


def test_other_kinds_of_batchnorm_and_a_network_in_training(net: nn.Module, images: Tensor) -> None:
    import torchvision
    from timm.layers.norm_act import BatchNormAct2d

    made = convert_batchnorm(net.train(), "nf")
    assert made.training
    assert_same(made, net.eval(), images)

    model: Any = Net(Block(6, 6))
    model[0][1] = BatchNormAct2d(6)
    trained(model, images)
    model[1].bn1 = frozen = torchvision.ops.FrozenBatchNorm2d(6)
    for value in (frozen.weight, frozen.bias, frozen.running_mean, frozen.running_var):
        value.uniform_(0.5, 2)  # pyright: ignore
    model.double()
    made, report = convert_batchnorm(model, "nf", return_report=True)
    assert_same(made, model, images)
    assert set(report.replaced.values()) == {"inside of 0.0", "inside of 1.conv1", "inside of 1.conv2"}
    assert isinstance(made.get_submodule("0.1"), nn.ReLU)


def test_the_report_tells(net: nn.Module, images: Tensor) -> None:
    report = convert_batchnorm(net, "nf", calibrate=[images], return_report=True)[1]
    assert report.to == "nf"
    assert report.replaced["1.bn1"] == "inside of 1.conv1"
    assert "affine=True" in report.convolutions["1.conv1"]
    assert not report.residuals
    assert not report.heads
    std = net.get_submodule("1.bn2").weight.square().mean().sqrt().item()  # pyright: ignore
    wanted = f"alpha 0.2 times {std / 0.2:.3g}, which learns; what the branch adds has variance {std**2:.2g}"
    assert report.branches["1.bn2"] == report.as_dict()["branches"]["1.bn2"] == wanted
    lines = str(report).splitlines()
    assert f"1.bn2 scales its branch: {wanted}" in lines
    assert any("the function is the old one" in line for line in lines)
    assert any("attach_agc" in line for line in lines)


# What it is good for


@pytest.mark.parametrize("name", ["by hand", "ours", "ours, pre-activated"])
def test_samples_are_on_their_own_in_training(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32).double()
    made = convert_batchnorm(trained(NETWORKS[name](), x), "nf").train()
    whole = made(x)
    alone = torch.cat([made(part) for part in x.split(1)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12 * whole.abs().max().item())
    parameters = [p for p in made.parameters() if p.requires_grad]
    together = torch.autograd.grad(whole.square().sum(), parameters)
    apart = [torch.zeros_like(p) for p in parameters]
    for part in x.split(1):
        for total, gradient in zip(apart, torch.autograd.grad(made(part).square().sum(), parameters), strict=True):
            total += gradient
    torch.testing.assert_close(apart, list(together), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["by hand", "ours, pre-activated"])
def test_training_at_batch_2_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    y = torch.arange(16) % 4
    x = torch.randn(16, 3, 16, 16) + torch.randn(4, 3, 1, 1)[y]
    made = convert_batchnorm(trained(NETWORKS[name](), x.double()).float(), "nf").train()
    optimizer = torch.optim.SGD(made.parameters(), 0.01, momentum=0.9)
    before = F.cross_entropy(made(x), y).item()
    start = {key: value.clone() for key, value in made.state_dict().items()}
    for step in range(40):
        part = slice(2 * step % 16, 2 * step % 16 + 2)
        optimizer.zero_grad()
        F.cross_entropy(made(x[part]), y[part]).backward()
        optimizer.step()
    assert F.cross_entropy(made(x), y).item() < 0.8 * before
    moved = {key for key, value in made.state_dict().items() if not torch.equal(value, start[key])}
    constant = {key for key in start if key.endswith(("weight_gamma", "weight_beta"))} | {
        f"{name}.{key}"
        for name, module in made.named_modules()
        if isinstance(module, layers.FrozenBatchNorm)
        for key, _ in module.named_buffers()
    }
    assert moved == start.keys() - constant


def test_what_asks_for_no_gradients_goes_on_so(net: Any, images: Tensor) -> None:
    for p in net[1].parameters():
        p.requires_grad_(False)
    made: Any = convert_batchnorm(net, "nf")
    assert not any(p.requires_grad for p in made[1].parameters())
    assert all(p.requires_grad for p in made[2].parameters())


def test_in_place_keeps_parameters_and_folding_the_function(net: Any, images: Tensor) -> None:
    with torch.no_grad():
        wanted, filters = net(images), net[1].conv1.weight
    made: Any = convert_batchnorm(net, "nf", inplace=True)
    assert made is net
    assert net[1].conv1.weight is filters
    torch.testing.assert_close(net(images), wanted)
    folded: Any = fold(net)
    torch.testing.assert_close(folded(images), wanted)
    assert type(folded[1].conv1) is nn.Conv2d


def test_opacus_takes_it(images: Tensor) -> None:
    opacus = pytest.importorskip("opacus")
    x, y = images[:3], torch.tensor([0, 1, 2])
    model = trained(Net(Block(6, 6), PreActivated(6, nn.Identity())), images)
    made = convert_batchnorm(model, "nf", dp=True).train()
    learned = [p for p in made.parameters() if p.requires_grad]
    alone = [torch.autograd.grad(F.cross_entropy(made(x[i : i + 1]), y[i : i + 1]), learned) for i in range(3)]
    wrapped = opacus.GradSampleModule(made, loss_reduction="sum")
    F.cross_entropy(wrapped(x), y, reduction="sum").backward()
    for k, p in enumerate(p for p in wrapped.parameters() if p.requires_grad):
        torch.testing.assert_close(p.grad_sample, torch.stack([each[k] for each in alone]), rtol=1e-8, atol=1e-10)  # pyright: ignore


def test_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    weights, at = tmp_path / "bn.pt", tmp_path / "nf.safetensors"
    model = trained(anybatch.create_model("resnet8", scheme="bn", num_classes=3), x.double()).float()
    torch.save(model.state_dict(), weights)
    how = {"scheme": "bn", "num_classes": 3}
    made, report = convert_batchnorm(model, "nf", return_report=True)
    save_converted(made, at, Origin("resnet8", how), report)
    found = model_named(str(at))  # made from a network whose weights are other ones
    assert found.scheme == "nf"
    assert_same(found.model, model, x, 1e-4)


# Refusals


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "clipping": ("nf+agc", {}, r"clipping, which is the training's.*attach_agc"),
    "activation": ("nf(act=gelu)", {}, "asks for another activation or gain"),
    "released": ("nf(released=True)", {}, "asks for another activation or gain"),
    "gain in filters": ("nf(fold_gain=True)", {}, "asks for another activation or gain"),
    "number": ("nf(skip_gain=0)", {}, "leave skip_gain out"),
    "alpha": ("nf(alpha=0)", {}, "alpha must|must be above 0"),
    "nothing to match": ("nf", {"distill": 3, "calibrate": [torch.randn(2, 3, 8, 8).double()]}, "nothing to match: nf"),
    "skipinit": ("sws+skipinit", {}, "also asks for another residual"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str, inplace: bool, net: nn.Module) -> None:
    to, more, message = REFUSED[case]
    before, text = {k: v.clone() for k, v in net.state_dict().items()}, repr(net)
    with pytest.raises(ValueError, match=message):
        convert_batchnorm(net, to, inplace=inplace, **more)
    assert repr(net) == text
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_networks_without_residual_sums_are_refused(images: Tensor) -> None:
    plain = trained(Net(), images)
    text = repr(plain)
    with pytest.raises(ValueError, match=r"is for residual networks, and no sum .* was found; take 'sws', or 'frozen'"):
        convert_batchnorm(plain, "nf", inplace=True)
    assert repr(plain) == text
    assert_same(convert_batchnorm(plain, "sws"), plain, images)
    with (
        pytest.warns(UserWarning, match="no trace reaches"),
        pytest.raises(ValueError, match="no trace of the model: "),
    ):
        convert_batchnorm(Strange(3).eval(), "nf")


def test_layers_named_as_sums_and_sums_of_other_things_are_none() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add, self.bn = conv(3, 3), nn.BatchNorm2d(3)
            self.first, self.second = conv(3, 3), conv(3, 3)
            self.shift = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.add(x)) + self.shift
            return self.first(x) + self.second(x) + 1

    with pytest.raises(ValueError, match="no sum of a branch and a skip connection"):
        convert_batchnorm(Other().eval(), "nf")
