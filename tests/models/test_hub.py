"""Networks saved into folders and repositories, and built from them again."""

from __future__ import annotations

import builtins
import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import anybatch
from anybatch.models import Network
from anybatch.schemes import PARTS

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name: str = "resnet8", scheme: Any = "bn", **options: Any) -> Network:
    torch.manual_seed(0)
    model = anybatch.create_model(name, scheme, num_classes=4, **options)
    assert isinstance(model, Network)
    for p in model.parameters():  # away from where a new network starts
        torch.nn.init.normal_(p, 0.1, 0.3)
    model(X[:, : model.in_chans])  # so that running statistics are not new either
    return model.eval()


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("resnet8", "bn", {"width": 8}),
        ("resnet8", "ws+bcn:auto", {"in_chans": 1}),
        ("knresnet18", "kn(p=0.3)", {"width": 16, "stem": "cifar"}),
        ("nf_regnet_b0", None, {"drop_path_rate": 0.2, "drop_rate": 0.1}),
        ("convnext_tiny", None, {"width": 8}),
    ],
)
def test_a_saved_network_comes_back_with_its_logits(
    tmp_path: Path, name: str, scheme: str | None, options: dict[str, Any]
) -> None:
    model = network(name, scheme, **options)
    model.save_pretrained(tmp_path / "a" / "b")
    again = Network.from_pretrained(tmp_path / "a" / "b")
    assert not again.training
    assert repr(again.train()) == repr(model.train())
    x = X[:, : model.in_chans]
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)
    assert again.default_cfg == model.default_cfg
    assert load_file(tmp_path / "a" / "b" / "model.safetensors").keys() == model.state_dict().keys()


def test_what_changed_after_building_comes_back_too(tmp_path: Path) -> None:
    model = network()
    model.reset_classifier(7)
    model.default_cfg["mean"] = (0.1, 0.2, 0.3)
    model.save_pretrained(tmp_path)
    again = Network.from_pretrained(tmp_path)
    assert again.num_classes == 7
    assert again.default_cfg["mean"] == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("part", sorted(set(PARTS) - {"agc", "none", "syncbn"}))
def test_every_scheme_is_known_again_by_its_name(tmp_path: Path, part: str) -> None:
    scheme = {"ws": "ws+gn:auto", "sws": "sws+gn:auto", "gn": "gn:auto", "evos0": "evos0:auto", "bcn": "ws+bcn:auto"}
    model = anybatch.create_model("resnet8", scheme.get(part, part), num_classes=4)
    assert isinstance(model, Network)
    model.save_pretrained(tmp_path)


def test_networks_that_would_come_back_as_others_are_refused(tmp_path: Path) -> None:
    from anybatch.methods.group_norm import gn

    with pytest.raises(ValueError, match=r"is not what create_model\('resnet8', 'gn'\) builds: its scheme was not"):
        network(scheme=gn(groups=4)).save_pretrained(tmp_path)
    model = network()
    model.bn1 = torch.nn.GroupNorm(4, 16)
    with pytest.raises(ValueError, match="layers were exchanged; save its state_dict"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_no_network_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "none", "./a/b", "a/b/c"):
        with pytest.raises(ValueError, match="is neither a folder nor the name of a repository"):
            Network.from_pretrained(source)
    with pytest.raises(ValueError, match=r"config\.json is missing; give what save_pretrained wrote"):
        Network.from_pretrained(tmp_path)
    network().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    told = json.loads(config.read_text())
    broken = [{"options": {"features_only": True}}, {"options": {"num_classes": 3}}, {"dtype": "int8"}]
    broken += [{"mean": None}, {"mean": []}, {"std": [0, 1, 1]}, {"input_size": []}, {"input_size": [3, 32, 0]}]
    broken += [{"crop_pct": None}, {"crop_pct": float("nan")}, {"crop_pct": True}, {"interpolation": "cubic"}]
    deep = "[" * 100_000
    for text in ("{", "[]", "{}", deep, *(json.dumps({**told, **change}) for change in broken)):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is damaged or another library's"):
            Network.from_pretrained(tmp_path)
    config.write_text(json.dumps({**told, "architecture": "resnet7"}))
    with pytest.raises(ValueError, match="unknown model 'resnet7'; did you mean resnet"):
        Network.from_pretrained(tmp_path)
    config.write_text(json.dumps({**told, "architecture": "resnet14"}))
    with pytest.raises(ValueError, match="holds another network's weights"):
        Network.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    config.write_text(json.dumps(told))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="safetensors"):
        Network.from_pretrained(tmp_path)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = network()
    model.default_cfg["mean"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"default_cfg\['mean'\] must be finite numbers, got tensor"):
        model.save_pretrained(tmp_path / "a")
    mixed = network().half()
    mixed.get_classifier().float()
    with pytest.raises(ValueError, match=r"tensors are float16 and float32; bring it to one dtype"):
        mixed.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    network().to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in Network.from_pretrained(tmp_path).parameters()} == {dtype}


def test_others_may_read_what_is_written_where_they_may_read_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        network().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    weights = tmp_path / "model.safetensors"
    assert stat.S_IMODE(weights.stat().st_mode) == 0o640
    weights.chmod(0o604)  # a file that is replaced keeps what it allowed
    network().save_pretrained(tmp_path)
    assert stat.S_IMODE(weights.stat().st_mode) == 0o604


def test_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
            assert (repo_id, private, exist_ok) == ("net", True, True)
            return SimpleNamespace(repo_id="someone/net")

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            for file in Path(folder_path).iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            return f"https://hub/{repo_id}/{commit_message}"

    def download(repo_id: str, filename: str, **asked: object) -> str:
        assert repo_id == "someone/net"
        assert asked == {"revision": "v1", "token": "secret", "cache_dir": "here", "local_files_only": True}
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = network()
    address = model.push_to_hub("net", private=True, commit_message="first", token="secret")
    assert address == "https://hub/someone/net/first"
    again = Network.from_pretrained(
        "someone/net", revision="v1", token="secret", cache_dir="here", local_files_only=True
    )
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


def test_without_huggingface_hub_only_repositories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "huggingface_hub")
    monkeypatch.setattr(builtins, "__import__", without)
    model = network()
    model.save_pretrained(tmp_path)
    Network.from_pretrained(tmp_path)
    with pytest.raises(ImportError, match=r"pip install 'anybatch\[hub\]'"):
        Network.from_pretrained("someone/net")
    with pytest.raises(ImportError, match=r"pip install 'anybatch\[hub\]'"):
        model.push_to_hub("someone/net")
