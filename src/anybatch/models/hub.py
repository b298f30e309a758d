"""Networks in folders and on the Hugging Face Hub: ``model.safetensors`` with plain weights, and ``config.json``.

`Network` has the methods of huggingface_hub's ``PyTorchModelHubMixin`` and does not derive from it. The mixin keeps the
arguments of ``__init__``, which here are Python objects, a scheme and block classes, where a network is built again
from its name, its scheme's name and its options; and with it folders would need huggingface_hub too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from anybatch.files import save_tensors, write_file
from anybatch.models.network import Network
from anybatch.models.preprocessing import IMAGES, check_images
from anybatch.models.registry import create_network
from anybatch.models.weights import load_weights

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
WEIGHTS, CONFIG = "model.safetensors", "config.json"
ON_HUB = "hf-hub:"
"""In front of a repository's name, as timm has it, where a folder could be meant too."""


def save_pretrained(model: Network, folder: str | Path) -> None:
    """See `Network.save_pretrained`."""
    if not hasattr(model, "default_cfg"):
        raise ValueError("only networks of create_model can be saved with what it takes to build them again")
    cfg = model.default_cfg
    check_images(cfg)
    dtypes = {str(t.dtype).removeprefix("torch.") for t in model.state_dict().values() if t.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"the network's tensors are {' and '.join(sorted(dtypes))}; bring it to one dtype with to()")
    config = {
        "library_name": "anybatch",
        "architecture": cfg["architecture"],
        "scheme": cfg["scheme"],
        "options": cfg["options"],
        "num_classes": int(model.num_classes),
        "in_chans": int(model.in_chans),
        "dtype": dtypes.pop(),
        **{key: cfg[key] for key in IMAGES},
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
    text = json.dumps(config, indent=1) + "\n"
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    save_tensors(model.state_dict(), where / WEIGHTS, {"format": "pt"})
    write_file(where / CONFIG, text.encode())


def from_pretrained(source: str | Path, **download: Any) -> Network:
    """See `Network.from_pretrained`."""
    folder, repository = Path(source), str(source).removeprefix(ON_HUB)
    if repository == str(source) and folder.is_dir():
        paths = {name: folder / name for name in (CONFIG, WEIGHTS)}
    elif repository.count("/") == 1 and not repository.startswith((".", "/", "~")):
        hub = _hub()
        try:
            paths = {name: Path(hub.hf_hub_download(repository, name, **download)) for name in (CONFIG, WEIGHTS)}
        except (OSError, hub.errors.EntryNotFoundError) as error:
            raise ValueError(f"cannot get {repository} from the Hub: {error}") from None
    else:
        raise ValueError(f"{source} is neither a folder nor the name of a repository, as in 'someone/something'")
    for path in paths.values():
        if not path.is_file():
            raise ValueError(f"no network in {source}: {path.name} is missing; give what save_pretrained wrote")
    try:
        config = json.loads(paths[CONFIG].read_text(encoding="utf-8"))
        model = _build(config)
        told = {key: config[key] for key in IMAGES}
        model.default_cfg.update({key: tuple(v) if isinstance(v, list) else v for key, v in told.items()})
        check_images(model.default_cfg)
        dtype = _DTYPES[config.get("dtype", "float32")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        told = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{paths[CONFIG]} is damaged or another library's: {told}") from None
    load_weights(model.to(dtype), paths[WEIGHTS], layout="anybatch")
    return model.eval()


def push_to_hub(model: Network, repo_id: str, *, private: bool | None, message: str, token: str | None) -> str:
    """See `Network.push_to_hub`."""
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))


def _build(config: dict[str, Any]) -> Network:
    return create_network(
        config["architecture"],
        config["scheme"],
        config["options"],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
    )


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("the Hub needs huggingface_hub: pip install 'anybatch[hub]'; folders need nothing") from None
    return huggingface_hub
