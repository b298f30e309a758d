"""What there is to choose from, and what this machine has."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import re
from collections.abc import Iterable
from typing import Any


def tables(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For each of ``models``, ``schemes``, ``recipes`` and ``data``: every entry with what is known of it."""
    return {name: _TABLES[name]() for name in names}


def _sentence(function: Any) -> str:
    text = " ".join((inspect.getdoc(function) or "").split())
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


def _models() -> dict[str, dict[str, Any]]:
    from anybatch.models import list_models, model_entry
    from anybatch.models.counts import counts

    told = {}
    for name in list_models():
        entry = model_entry(name)
        told[name] = {
            "about": entry.about,
            "family": entry.family,
            "scheme": entry.scheme,
            **counts()[name],
            "size": entry.size,
            "train_size": entry.train_size,
            "published_top1": entry.published,
            "source": entry.source,
        }
    return told


def _schemes() -> dict[str, dict[str, Any]]:
    from anybatch.schemes import PARTS

    told = {}
    for name, part in PARTS.items():
        made = part()
        told[name] = {
            "about": _sentence(part),
            "sources": list(made.sources),
            "batch_free": made.batch_independent,
            "fills": list(made.filled),
            "options": {p.name: p.default for p in inspect.signature(part).parameters.values()},
        }
    return told


def _recipes() -> dict[str, str]:
    from anybatch.recipes import RECIPES

    # What a published recipe needs and what it gave there, without the paragraph on how ours differs.
    told = {name: (inspect.getdoc(recipe) or "").partition("\n\nDiffers")[0] for name, recipe in RECIPES.items()}
    return {name: " ".join(text.split()) for name, text in told.items()}


def _data() -> dict[str, str]:
    from anybatch.data import DATASETS

    return {name: _sentence(load) for name, load in DATASETS.items()}


_TABLES = {"models": _models, "schemes": _schemes, "recipes": _recipes, "data": _data}


def doctor() -> dict[str, dict[str, Any]]:
    """Versions, devices and extras of this machine."""
    import torch

    from anybatch import __version__
    from anybatch.functional import backends
    from anybatch.kernels.native_common import refused_native
    from anybatch.study import available_cores

    needed: dict[str, list[str]] = {"": []}
    for requirement in importlib.metadata.requires("anybatch") or []:
        package, _, marker = requirement.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        needed.setdefault(extra[1] if extra else "", []).append(re.split(r"[<>=!\[ ]", package)[0])
    versions = {"anybatch": __version__, "python": platform.python_version()}
    versions |= {package: _version(package) or "missing" for package in needed.pop("")}
    cuda = torch.cuda.is_available()
    devices: dict[str, Any] = {"cpu": f"{available_cores()} cores, {torch.get_num_threads()} threads in a process"}
    devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if cuda else 0)}
    if not cuda:
        devices["cuda"] = "none found"
    devices["memory"] = _memory()
    devices["backends"] = ", ".join(backends())
    devices["kernels in C"] = refused_native(torch.ones(1, 1)) or "compiled for this processor"
    extras = {}
    for extra, packages in needed.items():
        missing = [package for package in packages if _version(package) is None]
        extras[extra] = f"missing {', '.join(missing)}: pip install 'anybatch[{extra}]'" if missing else "complete"
    return {"versions": versions, "devices": devices, "extras": extras}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
