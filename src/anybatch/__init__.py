"""Train ConvNets at any batch size.

Public names load on first use, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anybatch.scheme import Scheme as Scheme  # before `scheme` below, whose name the module's would otherwise take

if TYPE_CHECKING:
    from anybatch.dispatch import backend as backend
    from anybatch.models import create_model as create_model
    from anybatch.models import list_models as list_models
    from anybatch.recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "anybatch.recipe",
    "backend": "anybatch.dispatch",
    "create_model": "anybatch.models",
    "list_models": "anybatch.models",
}


def scheme(spec: str | Scheme | Mapping[str, Any] | tuple[str, Mapping[str, Any]]) -> Scheme:
    """The scheme that a text names, or that another library's setting means; see `anybatch.schemes.scheme`."""
    from anybatch.schemes import scheme as parse

    return parse(spec)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in (
        "bench",
        "convert",
        "data",
        "export",
        "functional",
        "layers",
        "models",
        "optim",
        "probe",
        "recipes",
        "report",
        "rows",
        "step",
        "study",
        "train",
    ):
        return importlib.import_module(f"anybatch.{name}")
    raise AttributeError(f"module 'anybatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
