"""Our networks in timm's registry."""

from __future__ import annotations

import pytest
import timm
import timm.data
import timm.optim
import torch
from timm.models import _registry

from anybatch.layers import GroupNorm, WSConv2d
from anybatch.models import FeaturePyramid, Network, list_models, register_timm, transforms

TIMMS = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}  # pyright: ignore
NAMES = register_timm()


def test_nothing_of_timms_is_replaced() -> None:
    assert not NAMES.keys() & TIMMS.keys()
    assert all(timm.models.model_entrypoint(name) is entry for name, entry in TIMMS.items())  # pyright: ignore
    assert set(timm.list_models()) == TIMMS.keys() | NAMES.keys()


def test_every_network_is_there_under_its_name_or_with_its_scheme_behind() -> None:
    assert sorted(NAMES.values()) == list_models()
    assert NAMES["knresnet18"] == "knresnet18"
    assert NAMES["resnet50_wsgn"] == "resnet50"
    assert NAMES["nf_resnet50_nf"] == "nf_resnet50"
    assert NAMES["convnext_tiny_pn"] == "convnext_tiny"
    assert NAMES["vgg11_anybatch"] == "vgg11"
    assert NAMES["nfnet_f0_plus"] == "nfnet_f0_plus"
    for told, name in NAMES.items():
        assert told == name or (told.startswith(f"{name}_") and name in TIMMS)


def test_registering_again_changes_nothing() -> None:
    before = dict(_registry._model_entrypoints)
    assert register_timm() == NAMES
    assert before == _registry._model_entrypoints


def test_everything_may_be_imported_from_the_module() -> None:
    names: dict[str, object] = {}
    exec("from anybatch.models.timm_registry import *", names)
    assert names.keys() > {"register_timm", "resnet50_wsgn"}


def test_timm_builds_our_networks() -> None:
    model = timm.create_model("knresnet18", num_classes=10)
    assert isinstance(model, Network)
    assert model.num_classes == 10
    model = timm.create_model("resnet50_wsgn", num_classes=3, in_chans=1, width=32, drop_path_rate=0.1)
    assert isinstance(model, Network)
    assert isinstance(model.conv1, WSConv2d)
    assert isinstance(model.bn1, GroupNorm)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 3)
    model = timm.create_model("resnet50_wsgn", scheme="bn", width=8, pretrained_cfg_overlay={"crop_pct": 1.0})
    assert "bn" in str(model.default_cfg["scheme"])
    assert model.pretrained_cfg["crop_pct"] == 1.0


def test_timm_reads_what_images_they_are_meant_for() -> None:
    model = timm.create_model("nf_regnet_b1_nf", num_classes=0)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 256, 256)
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bicubic")
    ours, theirs = transforms(model), timm.data.create_transform(**config)  # pyright: ignore
    from PIL import Image

    image = Image.effect_noise((300, 400), 64).convert("RGB")
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)


def test_features_only_gives_timms_description() -> None:
    model = timm.create_model("resnet50_wsgn", features_only=True, out_indices=(1, 3), width=32)
    assert isinstance(model, FeaturePyramid)
    assert model.feature_info.channels() == [128, 512]  # pyright: ignore
    assert model.feature_info.reduction() == [4, 16]  # pyright: ignore
    assert [y.shape[1:] for y in model(torch.zeros(1, 3, 64, 64))] == [(128, 16, 16), (512, 4, 4)]
    model.set_grad_checkpointing()
    assert model.network.grad_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, "resnet50_wsgn has no weights to download; load some with anybatch.models.load_weights"),
        ({"scheme": "gm"}, "unknown part 'gm'"),
        ({"out_indices": (1,)}, "goes with features_only=True"),
        ({"drop_block_rate": 0.1}, "unknown option of resnet50 'drop_block_rate'"),
        ({"pretrained_cfg": "a1_in1k"}, "pretrained_cfg of resnet50_wsgn must be a dictionary, got 'a1_in1k'"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("resnet50_wsgn", **options)  # pyright: ignore
