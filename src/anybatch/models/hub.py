"""Networks in folders and on the Hugging Face Hub: ``model.safetensors`` with plain weights, and ``config.json``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from anybatch.files import save_tensors, write_file
from anybatch.models.network import Network
from anybatch.models.registry import create_model
from anybatch.models.weights import load_weights

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_IMAGES = ("input_size", "mean", "std", "interpolation", "crop_pct")


def save_pretrained(model: Network, folder: str | Path) -> None:
    """See `Network.save_pretrained`."""
    if not hasattr(model, "default_cfg"):
        raise ValueError("only networks of create_model can be saved with what it takes to build them again")
    cfg = model.default_cfg
    config = {
        "library_name": "anybatch",
        "architecture": cfg["architecture"],
        "scheme": cfg["scheme"],
        "options": cfg["options"],
        "num_classes": int(model.num_classes),
        "in_chans": int(model.in_chans),
        **{key: cfg[key] for key in _IMAGES},
    }
    # A scheme made of Python objects may do what its name does not tell, and layers may have been exchanged.
    try:
        with torch.device("meta"):
            again = repr(_build(config))
    except ValueError as error:
        again = str(error)
    if again != repr(model):
        raise ValueError(
            f"the network is not what create_model({cfg['architecture']!r}, {cfg['scheme']!r}) builds: its scheme was "
            f"not given as a text, or layers were exchanged; save its state_dict() instead"
        )
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    save_tensors(model.state_dict(), where / WEIGHTS, {"format": "pt"})
    write_file(where / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def from_pretrained(source: str | Path, revision: str | None = None) -> Network:
    """See `Network.from_pretrained`."""
    folder = Path(source)
    if folder.is_dir():
        paths = {name: folder / name for name in (CONFIG, WEIGHTS)}
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        download = _hub().hf_hub_download
        paths = {name: Path(download(str(source), name, revision=revision)) for name in (CONFIG, WEIGHTS)}
    else:
        raise ValueError(f"{source} is neither a folder nor the name of a repository, as in 'someone/something'")
    for path in paths.values():
        if not path.is_file():
            raise ValueError(f"no network in {source}: {path.name} is missing; give what save_pretrained wrote")
    try:
        config = json.loads(paths[CONFIG].read_text(encoding="utf-8"))
        model = _build(config)
        told = {key: config[key] for key in _IMAGES}
        model.default_cfg.update({key: tuple(v) if isinstance(v, list) else v for key, v in told.items()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{paths[CONFIG]} is damaged or another library's: {error!r}") from None
    load_weights(model, paths[WEIGHTS], layout="anybatch")
    return model.eval()


def push_to_hub(model: Network, repo_id: str, *, private: bool | None, message: str, token: str | None) -> str:
    """See `Network.push_to_hub`."""
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))


def _build(config: dict[str, Any]) -> Network:
    model = create_model(
        config["architecture"],
        config["scheme"],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
        **config["options"],
    )
    if not isinstance(model, Network):
        raise TypeError(f"options {config['options']} make no Network")
    return model


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("the Hub needs huggingface_hub: pip install 'anybatch[hub]'; folders need nothing") from None
    return huggingface_hub
