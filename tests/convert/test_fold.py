"""A folded network computes what it did, with fewer layers; what is not certain is left and told."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import anybatch
from anybatch import layers
from anybatch.convert import fold, freeze_batchnorm
from anybatch.methods.filters import StandardizedFilter
from anybatch.models import list_models, model_entry
from anybatch.models.counts import counts
from anybatch.models.named import model_named
from helpers import assert_error_within, error

BATCHNORMS = (nn.modules.batchnorm._BatchNorm, layers.FrozenBatchNorm)


def randomized(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter and statistic away from where it starts, and in evaluation."""
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def assert_same(model: nn.Module, folded: nn.Module, *inputs: Any, relative: float = 1e-10) -> None:
    with torch.no_grad():
        wanted, got = model(*inputs), folded(*inputs)
    for exact, value in zip(tensors(wanted), tensors(got), strict=True):
        assert_error_within(value, exact, relative * max(exact.abs().max().item(), 1e-3))


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [tensor for item in items for tensor in tensors(item)]


def left(model: nn.Module) -> int:
    return sum(isinstance(module, BATCHNORMS) for module in model.modules())


def test_by_hand() -> None:
    """w 2 and bias 1, mean 3, variance 4, scale 5, shift 7: (2 x + 1 - 3) / 2 * 5 + 7 = 5 x + 2."""
    conv, norm = nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1, eps=0.0)
    values = {conv.weight: 2.0, conv.bias: 1.0, norm.running_mean: 3.0, norm.running_var: 4.0, norm.weight: 5.0}
    with torch.no_grad():
        for tensor, value in {**values, norm.bias: 7.0}.items():
            assert tensor is not None
            tensor.fill_(value)
    folded, report = fold(nn.Sequential(conv, norm).eval(), return_report=True)
    assert folded(torch.tensor([[[10.0]]])).item() == pytest.approx(52.0)
    assert folded[0].weight.item() == pytest.approx(5.0)  # pyright: ignore[reportIndexIssue]
    assert (report.folded, report.left) == ({"1": "folded into 0"}, {})
    assert not any(p.requires_grad for p in folded.parameters())
    assert conv.weight.item() == 2
    assert conv.weight.requires_grad


BEHIND = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(6), (3, 4, 9)),
    "conv2d": (
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(6, affine=False),
        (2, 4, 5, 7),
    ),
    "conv3d": (nn.Conv3d(4, 6, 2, groups=2, dilation=2), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed, groups": (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), (2, 4, 5)),
    "linear": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
    "sync": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 5, 5)),
    "our sync": (nn.Conv2d(4, 6, 3), layers.SyncBatchNorm(6), (2, 4, 5, 5)),
    "frozen": (nn.Conv2d(4, 6, 3), layers.FrozenBatchNorm(6), (2, 4, 5, 5)),
    "renorm": (nn.Conv2d(4, 6, 3), layers.BatchRenorm2d(6), (2, 4, 5, 5)),
    "ws": (layers.WSConv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "ws, transposed": (layers.WSConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "ws, linear": (layers.WSLinear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "aws": (layers.WSConv2d(4, 6, 3, variant="aws"), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "scaled ws": (layers.ScaledWSConv2d(4, 6, 3, gamma=1.7), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "bcn": (nn.Conv2d(4, 6, 3), layers.BatchChannelNorm2d(6, 3), (2, 4, 5, 5)),
    "bcn of batches": (nn.Conv2d(4, 6, 3), layers.BatchChannelNorm2d(6, 3, statistics="batch"), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("case", BEHIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_and_every_norm(case: str, dtype: torch.dtype) -> None:
    layer, norm, shape = BEHIND[case]
    model = randomized(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU(inplace=True)), dtype)
    folded, report = fold(model, return_report=True)
    assert not report.left
    assert type(folded.get_submodule("0")).__module__.startswith("torch.nn")
    assert left(folded) == 0
    assert_same(model, folded, torch.randn(shape, dtype=dtype), relative=1e-5 if dtype == torch.float32 else 1e-12)
    assert_same(folded, pickle.loads(pickle.dumps(folded)), torch.randn(shape, dtype=dtype), relative=0)


def test_frozen_layers_of_torchvision_and_timm_and_those_that_hold_an_activation() -> None:
    timm_layers, ops = pytest.importorskip("timm.layers"), pytest.importorskip("torchvision.ops")
    norms = [
        ops.FrozenBatchNorm2d(4),
        timm_layers.FrozenBatchNormAct2d(4, act_layer=nn.SiLU),
        timm_layers.BatchNormAct2d(4, act_layer=nn.GELU),
        timm_layers.BatchNormAct2d(4, apply_act=False),
    ]
    for norm in norms:
        model = randomized(nn.Sequential(timm_layers.create_conv2d(3, 4, 3, padding="same", stride=2), norm))
        folded = fold(model)
        assert sum(1 for _ in folded.parameters()) == 2
        assert_same(model, folded, torch.randn(2, 3, 7, 7, dtype=torch.float64))


def test_frozen_batchnorm_is_folded_and_stays_frozen_where_it_is_not() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    freeze_batchnorm(model)
    folded = fold(model)
    assert left(folded) == 0
    assert_same(model, folded, torch.randn(1, 2, 4, 4, dtype=torch.float64))
    assert not model.train()[1].training  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("kind", ["StdConv2d", "ScaledStdConv2d"])
def test_timm_s_standardized_filters(kind: str) -> None:
    std_conv = pytest.importorskip("timm.layers.std_conv")
    model = randomized(nn.Sequential(getattr(std_conv, kind)(3, 4, 3, padding=1)))
    folded = fold(model)
    assert type(folded.get_submodule("0")) is nn.Conv2d
    assert_same(model, folded, torch.randn(2, 3, 5, 5, dtype=torch.float64))
    same = nn.Sequential(getattr(std_conv, f"{kind}Same")(3, 4, 3, stride=2)).eval()
    assert fold(same, return_report=True)[1].left == {"0": "it pads as it finds its input"}


@pytest.mark.parametrize("eval_stats", ["clean", "expected"])
@pytest.mark.parametrize(("groups", "norm_groups"), [(1, 1), (2, 2)])
def test_centered_filters_of_kernel_normalization(eval_stats: Any, groups: int, norm_groups: int) -> None:
    layer = layers.KNConv2d(4, 8, 3, padding=1, groups=groups, norm_groups=norm_groups, p=0.2, eval_stats=eval_stats)
    layer.take_activation(nn.ReLU())
    model = randomized(nn.Sequential(layer))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64) + 3
    folded = fold(model)
    for backend in ("auto", "reference"):
        with anybatch.backend(backend):
            assert_same(model, folded, x)
    assert_same(model.float(), folded.float(), x.float(), relative=1e-5)
    assert "centered=True" in repr(folded)
    inputs = [x.float().requires_grad_(True) for _ in range(2)]
    for net, images in zip((model, folded), inputs, strict=True):
        net(images).square().sum().backward()
    exact, through = inputs[0].grad, inputs[1].grad
    assert exact is not None
    assert through is not None
    assert_error_within(through, exact, 1e-4 * exact.abs().max().item())
    model.zero_grad()
    folded.requires_grad_(True)  # trained further it centers again
    model.requires_grad_(True)
    for net in (model, folded):
        net(x.float()).square().sum().backward()
    got, wanted = (net.get_parameter("0.weight").grad for net in (folded, model))
    assert got is not None
    assert wanted is not None
    assert_error_within(got, wanted, 1e-4 * wanted.abs().max().item())


def test_filters_that_need_their_sum_and_half_precision_are_left() -> None:
    model = randomized(nn.Sequential(layers.KNConv2d(4, 8, 3, groups=4, norm_groups=2)))
    folded, report = fold(model, return_report=True)
    assert report.left["0"].endswith("and need their own sum")
    assert_same(model, folded, torch.randn(2, 4, 6, 6, dtype=torch.float64) + 3)
    model = nn.Sequential(layers.KNConv2d(4, 8, 3)).to(torch.bfloat16).eval()
    assert fold(model, return_report=True)[1].left == {"0": "bfloat16 rounds filters that were centered"}
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
    with pytest.raises(ValueError, match="centered=True is for filters that stay as they are"):
        anybatch.functional.kn_conv(x, weight, centered=True)


class Tricky(nn.Module):
    """Layers that look as if they could be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm_twice = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.fork, self.norm_fork = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.acted, self.norm_acted = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.read, self.norm_read = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.hooked, self.norm_hooked = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.weighted, self.norm_weighted = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.norm_first = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.batch = nn.BatchNorm2d(3, track_running_stats=False)
        self.unused = nn.BatchNorm2d(3)
        self.good, self.norm_good = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.hooked.register_forward_hook(lambda *_: None)
        nn.utils.parametrizations.weight_norm(self.weighted)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_twice(self.twice(self.twice(x)))
        y = self.fork(x)
        x = self.norm_fork(y) + y
        x = self.norm_acted(torch.relu(self.acted(x)))
        x = self.norm_read(self.read(x)) * self.read.weight.mean()
        x = self.norm_weighted(self.weighted(self.norm_hooked(self.hooked(x))))
        x = self.batch(self.second(self.norm_first(x)))
        return self.norm_good(self.good(x))


def test_what_is_used_twice_elsewhere_or_otherwise_is_left_with_the_reason() -> None:
    model = randomized(Tricky())
    folded, report = fold(model, return_report=True)
    assert report.folded == {"norm_good": "folded into good"}
    assert report.left == {
        "norm_twice": "twice feeds it, and it is called 2 times",
        "norm_fork": "its input, fork, is used elsewhere too",
        "norm_acted": "its input is no linear layer's: relu",
        "norm_read": "read feeds it, and its tensors are read from outside",
        "norm_hooked": "hooked feeds it, and it has hooks",
        "norm_weighted": "weighted feeds it, and it is parametrized",
        "norm_first": "its input is no linear layer's: norm_weighted",
        "batch": "it keeps no running averages, and takes statistics of each batch",
        "unused": "no trace of the network reaches it",
    }
    assert_same(model, folded, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert str(report).startswith("1 layers folded, 9 left\n")
    assert parametrize.is_parametrized(folded.get_submodule("weighted"))


def test_dropout_and_identity_between_are_passed_tied_weights_and_held_twice_untied() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = nn.Sequential(conv, nn.Identity(), nn.Dropout2d(0.5), norm, nn.Conv2d(3, 3, 1))
    model[4].weight = conv.weight  # pyright: ignore[reportAttributeAccessIssue]
    model.add_module("again", nn.Identity())
    model.again.inner = norm  # pyright: ignore[reportAttributeAccessIssue]
    randomized(model)
    folded = fold(model)
    assert left(folded) == 0
    assert_same(model, folded, torch.randn(2, 3, 4, 4, dtype=torch.float64))


class Lists(nn.Module):
    """Cannot be traced as a whole; parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared = nn.BatchNorm2d(4)
        self.part = nn.Sequential(nn.Conv2d(4, 4, 1), self.shared)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.shared(self.part(self.norm(self.conv(self.body(image))))) for image in images]


def test_a_network_that_cannot_be_traced_is_folded_where_its_parts_can() -> None:
    model = randomized(Lists())
    folded, report = fold(model, return_report=True)
    assert report.folded == {"body.1": "folded into body.0"}
    assert report.left == {"norm": "no trace of the network reaches it", "shared": "it stands in several places"}
    assert_same(model, folded, [torch.randn(2, 3, 4, 4, dtype=torch.float64)])


def test_a_linear_layer_s_batchnorm_over_other_channels_is_an_error_and_never_a_wrong_result() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    folded = fold(model)
    with pytest.raises(ValueError, match=r"folded into it gives \(N, C\), got shape \(2, 4, 4\)"):
        folded(torch.randn(2, 4, 4, dtype=torch.float64))
    other = randomized(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)))
    assert fold(other, return_report=True)[1].left == {"1": "it has 3 channels, and what feeds it 5"}


def test_in_place_changes_the_network_itself_and_training_mode_is_refused() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = copy.deepcopy(model)
    assert fold(model, inplace=True) is model
    assert_same(before, model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"in training mode.*call eval\(\)"):
        fold(before.train())
    before.eval()[1].train()  # pyright: ignore[reportIndexIssue]
    assert fold(before, return_report=True)[1].left == {"1": "it is in training mode"}
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(ValueError, match=r"1\.weight has no shape before the model has seen an input"):
        fold(lazy)


def test_what_cannot_be_folded_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model.seen = model[0].weight * 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="the model cannot be copied: Only Tensors created explicitly"):
        fold(model)
    assert left(fold(model, inplace=True)) == 0


def test_formats_dtypes_and_devices_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    folded = fold(model.to(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]
    assert folded.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    half = fold(model.to(torch.bfloat16))
    assert half.get_parameter("0.bias").dtype == torch.bfloat16
    assert error(half(torch.ones(1, 3, 3, 3).bfloat16()), model(torch.ones(1, 3, 3, 3).bfloat16())) < 0.05
    assert fold(model.to("meta")).get_parameter("0.weight").device.type == "meta"


def least_of_each_family() -> list[str]:
    found: dict[str, str] = {}
    for name in sorted(list_models(), key=lambda name: counts()[name]["multiply_adds"]):
        found.setdefault(model_entry(name).family, name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", least_of_each_family())
def test_every_family_with_its_own_scheme(name: str) -> None:
    model = randomized(anybatch.create_model(name))
    folded, report = fold(model, return_report=True)
    standardized = [m for m in model.modules() if isinstance(m, StandardizedFilter | layers.KNConv2d)]
    assert len(standardized) == sum(told in ("standardized", "centered") for told in report.folded.values())
    assert_same(model, folded, torch.randn(1, 3, 96, 96, dtype=torch.float64), relative=1e-9)


@pytest.mark.parametrize(
    ("name", "size", "remaining"),
    [
        ("torchvision:resnet18", (3, 33, 33), 0),
        ("torchvision:mobilenet_v3_small", (3, 33, 33), 0),
        ("torchvision:shufflenet_v2_x0_5", (3, 33, 33), 0),
        ("torchvision:lraspp_mobilenet_v3_large", (3, 33, 33), 0),
        ("torchvision:googlenet", (3, 64, 64), 2),  # of auxiliary heads, which evaluation does not reach,
        ("torchvision:r3d_18", (3, 2, 17, 17), 0),
        ("timm:mobilenetv3_small_100", (3, 33, 33), 0),
        ("timm:resnetv2_50", (3, 33, 33), 17),
        ("timm:nf_resnet26", (3, 33, 33), 0),
    ],
)
def test_networks_of_torchvision_and_timm(name: str, size: tuple[int, ...], remaining: int) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = randomized(model_named(name).model)
    folded, report = fold(model, return_report=True)
    assert left(folded) == remaining == len(report.left)
    assert_same(model, folded, torch.randn(2, *size, dtype=torch.float64), relative=1e-9)


def test_a_feature_pyramid() -> None:
    model = randomized(anybatch.create_model("resnet8", "bn", features_only=True))
    folded, report = fold(model, return_report=True)
    assert (left(folded), report.left) == (0, {})
    assert_same(model, folded, torch.randn(2, 3, 32, 32, dtype=torch.float64))


def test_a_detector_s_backbone_is_folded() -> None:
    model = randomized(model_named("torchvision:ssdlite320_mobilenet_v3_large", num_classes=3).model)
    folded, report = fold(model, return_report=True)
    assert left(folded) == 0 == len(report.left)
    x = torch.randn(2, 3, 320, 320, dtype=torch.float64)
    with torch.no_grad():
        assert_same(model.backbone, folded.backbone, x)  # pyright: ignore[reportArgumentType, reportCallIssue]
