"""Parameters and multiply-adds of every network at its own size, kept in ``counts.json``, since counting takes long.

python -m anybatch.models.counts
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

import torch

from anybatch.files import write_file
from anybatch.measure import multiply_adds
from anybatch.models.network import Network
from anybatch.models.registry import create_model, list_models, model_entry


class Count(TypedDict):
    parameters: int
    multiply_adds: int
    """Of one image in evaluation."""
    strides: list[int]
    """Of its levels."""


def count(name: str) -> Count:
    """Counted on a model without values."""
    size = model_entry(name).size
    with torch.device("meta"):
        model = create_model(name)
        adds = multiply_adds(model, torch.empty(1, 3, size, size))
    strides = [level.reduction for level in model.levels] if isinstance(model, Network) else []
    return Count(parameters=sum(p.numel() for p in model.parameters()), multiply_adds=adds, strides=strides)


@functools.cache
def counts() -> dict[str, Count]:
    """The kept counts by name."""
    return json.loads(files("anybatch.models").joinpath("counts.json").read_text(encoding="utf-8"))


def main() -> None:
    told = {name: count(name) for name in list_models()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in told.items())
    write_file(Path(__file__).with_name("counts.json"), f"{{\n{lines}\n}}\n".encode())


if __name__ == "__main__":
    main()
