"""Converted networks in files: their tensors, the network they were made from, and how."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from anybatch.convert.conversion import convert_batchnorm
from anybatch.convert.report import ConversionReport
from anybatch.files import save_tensors
from anybatch.suggest import one_line

if TYPE_CHECKING:
    from anybatch.models.named import Named

_KEY = "converted"  # of the file's metadata
_KEYS = {"model", "how", "exclude", "dp", "to", "groups", "biases"}


@dataclass(frozen=True)
class Origin:
    """What a converted network was made from, so that it can be made again."""

    model: str
    """The text that names the network with BatchNorm; see `anybatch.models.named.model_named`."""
    how: dict[str, Any] = field(default_factory=dict)
    """Its other arguments, such as ``num_classes``."""
    exclude: tuple[str, ...] = ()
    dp: bool = False


def save_converted(model: nn.Module, path: Path, origin: Origin, report: ConversionReport) -> None:
    """Write a converted network as safetensors, whole or not at all."""
    new = [key.removesuffix(".bias") for key in report.new_parameters if key.endswith(".bias")]
    facts = {**vars(origin), "to": report.to, "groups": report.groups, "biases": new}
    save_tensors(model.state_dict(), path, {_KEY: json.dumps(facts)})


def _facts(path: Path) -> dict[str, Any] | None:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except SafetensorError:
        return None
    if text is None:
        return None
    try:
        facts = json.loads(text)
        if not isinstance(facts, dict) or _KEYS - facts.keys():
            raise ValueError("of another form")
    except ValueError:
        raise ValueError(f"{path} says that it holds a converted network, and not what it was made from") from None
    return facts


def is_converted(path: Path) -> bool:
    """Whether a file is one of `save_converted`."""
    return _facts(path) is not None


def load_converted(path: Path) -> Named:
    """The network in a file of `save_converted`, in evaluation. If it was made from a FILE.py, that is run.

    Raises:
        ValueError: If what it was made from cannot be built any more, or is another network by now.
    """
    from safetensors.torch import load_file

    from anybatch.models.named import model_named

    facts = _facts(path)
    if facts is None:
        raise ValueError(f"{path} holds no converted network, as anybatch convert writes them")
    try:
        found = model_named(facts["model"], **facts["how"])
    except ValueError as error:
        raise ValueError(f"{path} was made from {facts['model']}, which cannot be built: {error}") from None
    try:
        model = convert_batchnorm(
            found.model, facts["to"], exclude=facts["exclude"], groups=facts["groups"] or "auto", dp=facts["dp"]
        )
        for conv in map(model.get_submodule, facts["biases"]):
            if getattr(conv, "bias", None) is None:
                conv.bias = nn.Parameter(conv.get_parameter("weight").new_zeros(len(conv.get_parameter("weight"))))
        model.load_state_dict(load_file(path))
    except (ValueError, AttributeError, RuntimeError) as error:
        said = one_line(error, 200)
        raise ValueError(f"{path} was made from {facts['model']}, which is another network by now: {said}") from None
    return replace(found, model=model.eval(), name=str(path), scheme=facts["to"], architecture="", trained=True)
