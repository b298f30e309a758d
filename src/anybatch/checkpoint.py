"""Checkpoints: tensors in safetensors, everything else as JSON beside or inside; nothing is unpickled.

Two kinds of file. ``model.safetensors`` with ``model.json`` is a trained model: plain weights that any reader of
safetensors can open, and what is needed to build the network and prepare its images. ``resume.safetensors`` is a whole
state of training, nested dictionaries and all, in one file that is replaced atomically.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from anybatch.files import save_tensors, write_file
from anybatch.models import Network, load_weights
from anybatch.recipe import Recipe

_STATE = "anybatch_state"
MODEL, FACTS, RESUME = "model.safetensors", "model.json", "resume.safetensors"


@dataclass(frozen=True)
class ModelFacts:
    """What `model.json` holds: how to build the network and how to prepare images for it."""

    recipe: dict[str, Any]
    classes: list[str]
    in_chans: int
    size: int
    """Height and width in pixels."""
    mean: list[float]
    """Of each channel, on the scale 0 to 1."""
    std: list[float]
    error: float
    """On the evaluated images, 0 to 1."""
    epochs: int
    version: str
    epsilon: float | None = None
    """Of a private run: the privacy spent, at the recipe's `privacy.delta`."""


def save_model(model: nn.Module, facts: ModelFacts, folder: Path) -> None:
    """Write ``model.safetensors`` and ``model.json`` into the folder."""
    save_tensors(model.state_dict(), folder / MODEL)
    write_file(folder / FACTS, (json.dumps(asdict(facts), indent=1) + "\n").encode())


def load_model(path: str | Path) -> tuple[Network, ModelFacts]:
    """The trained model in a run's folder, or beside a ``model.safetensors``, in evaluation mode on the CPU.

    Raises:
        ValueError: If a file is missing, cut off or no checkpoint, or the weights are another network's.
    """
    folder = Path(path)
    if folder.name == MODEL:
        folder = folder.parent
    if not Path(path).exists():
        raise ValueError(f"{path} is not there; give the folder that `anybatch train` wrote")
    for name in (MODEL, FACTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"no checkpoint in {folder}: {name} is missing; give the folder that `anybatch train` wrote"
            )
    try:
        facts = ModelFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{folder / FACTS} is damaged: {error}") from None
    recipe = Recipe.parse(facts.recipe, where=str(folder / FACTS))
    model = recipe.model.build(num_classes=len(facts.classes), in_chans=facts.in_chans)
    load_weights(model, folder / MODEL, layout="anybatch")
    return model.eval(), facts


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write nested dictionaries, lists, tuples, numbers, texts and tensors into one file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors)
    save_tensors(tensors, path, {_STATE: json.dumps(tree)})


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; a `ValueError` says that the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})[_STATE])
            return _unpack(tree, file)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged, cut off or no state of training ({error}); delete it to start that run anew"
        ) from None


_FORMATS = {"t": torch.contiguous_format, "t4": torch.channels_last, "t5": torch.channels_last_3d}


def _channels_last_kind(value: Tensor) -> str:
    kind = f"t{value.dim()}"
    return kind if kind in _FORMATS and value.is_contiguous(memory_format=_FORMATS[kind]) else "t"


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        # Files hold contiguous tensors, and a fused optimizer walks weights and their state in step.
        kind = "t" if value.is_contiguous() else _channels_last_kind(value)
        return {kind: name}
    if isinstance(value, Mapping):
        return {"d": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"l" if isinstance(value, list) else "u": [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers, texts and collections of them, got {type(value).__name__}")


def _unpack(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _FORMATS:
        return file.get_tensor(content).contiguous(memory_format=_FORMATS[kind])
    if kind == "d":
        return {_unpack(key, file): _unpack(item, file) for key, item in content}
    items = [_unpack(item, file) for item in content]
    return items if kind == "l" else tuple(items)


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as `save_state` writes them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_state(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_state(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
