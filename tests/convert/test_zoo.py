"""torchvision's and timm's networks, converted: nothing is left of BatchNorm, and one image passes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from anybatch.convert import convert_batchnorm
from anybatch.convert.kinds import is_batchnorm
from anybatch.methods.batch_norm import FrozenBatchNorm
from anybatch.models.named import model_named
from convert.test_fold import randomized

_FAST = (
    *("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"),
    *("lraspp_mobilenet_v3_large", "r3d_18"),
)
_WITHOUT = ("alexnet", "convnext", "maxvit", "swin", "vit", "squeezenet", "mvit", "vgg11", "vgg13", "vgg16", "vgg19")


def _has_batchnorm(name: str) -> bool:
    return name.endswith("_bn") or not name.startswith(_WITHOUT)


def _names() -> list[str]:
    modules = (torchvision.models, torchvision.models.segmentation, torchvision.models.video)
    names = [name for module in modules for name in torchvision.models.list_models(module)]
    return [name for name in names if name == "maxvit_t" or _has_batchnorm(name)]


def _image(name: str) -> torch.Tensor:
    if name in torchvision.models.list_models(torchvision.models.video):
        return torch.randn(1, 3, 16, 48, 48)  # s3d pools over 7 x 7 of what is left at 224, but averages smaller maps
    side = {"inception_v3": 96, "maxvit_t": 224}.get(name, 64)
    return torch.randn(1, 3, side, side)


@pytest.mark.parametrize(
    "name", [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in _names()]
)
def test_a_builder_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = model_named(f"torchvision:{name}").model
    before = [key for key, module in model.named_modules() if is_batchnorm(module)]
    for to in ("gn", "ws+gn", "frozen"):
        made, report = convert_batchnorm(model, to, return_report=True)
        left = [key for key, module in made.named_modules() if is_batchnorm(module)]
        assert not report.left
        assert sorted(report.replaced) == sorted(before)
        if to == "frozen":
            assert all(isinstance(made.get_submodule(key), FrozenBatchNorm) for key in left)
        else:
            assert not left
        x = _image(name)
        if name == "s3d":
            x = torch.randn(1, 3, 16, 224, 224)
        with torch.no_grad():
            given = made(x)
        given = given["out"] if isinstance(given, dict) else given
        assert given.isfinite().all()


@pytest.mark.parametrize("to", [pytest.param("gn", marks=pytest.mark.slow), "ws+gn", "frozen"])
def test_a_detector(to: str) -> None:
    torch.manual_seed(0)
    model = model_named("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn").model
    images = [torch.rand(3, 80, 64), torch.rand(3, 64, 96)]
    loader = [(images, "labels")] if to == "gn" else None
    made, report = convert_batchnorm(model, to, calibrate=loader, return_report=True)
    assert not report.left
    assert bool(report.residuals) == (to == "gn")
    if to == "ws+gn":
        assert "backbone.body.0.0" in report.convolutions
        assert not any(name.startswith(("backbone.fpn", "rpn", "roi_heads")) for name in report.convolutions)
    with torch.no_grad():
        assert len(made(images[:1])) == 1


@pytest.mark.parametrize(
    "name",
    ["resnet18", "regnetx_002", *(pytest.param(n, marks=pytest.mark.slow) for n in ("efficientnet_b0", "densenet121"))],
)
@pytest.mark.parametrize("to", ["gn", "ws+gn", "frozen"])
def test_timm(name: str, to: str) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = model_named(f"timm:{name}").model
    made, report = convert_batchnorm(model, to, return_report=True)
    assert not report.left
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        given = made(x)
        if to == "frozen":
            torch.testing.assert_close(given, model(x), rtol=1e-4, atol=1e-4)
    assert given.isfinite().all()


@pytest.mark.parametrize(
    ("name", "scaled"),
    [
        ("torchvision:mobilenet_v3_small", 6),
        ("timm:seresnet18", 0),  # each branch ends in a gate, and the network's own code adds
        ("timm:resnetv2_18", 8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("torchvision:regnet_y_400mf", 16),
                ("torchvision:efficientnet_b0", 9),
                ("torchvision:fcn_resnet50", 16),
                ("torchvision:r3d_18", 8),
                ("timm:regnety_002", 13),
                ("timm:resnest14d", 4),
            )
        ),
    ],
)
def test_normalizer_free(name: str, scaled: int) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = model_named(name).model
    randomized(model)
    model.double().eval()
    made, report = convert_batchnorm(model, "nf", return_report=True)
    assert not report.left
    assert sum(what.startswith("alpha") for what in report.branches.values()) == scaled
    x = torch.randn(1, 3, 8, 48, 48) if name.endswith("r3d_18") else torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        given, wanted = made(x.double()), model(x.double())
    given, wanted = (y["out"] if isinstance(y, dict) else y for y in (given, wanted))
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-11 * wanted.abs().max().item())
