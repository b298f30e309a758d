"""The table of networks. A file in this folder that registers one is found by its being there."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from anybatch.scheme import Scheme
from anybatch.schemes import scheme as parse_scheme
from anybatch.suggest import unknown

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Enter a function ``name(scheme, *, num_classes, in_chans, ...)`` into the table under its own name."""
    if build.__name__ in _MODELS:
        raise ValueError(f"a model named {build.__name__!r} is registered already")
    _MODELS[build.__name__] = build
    return build


@functools.cache
def _load() -> None:
    package = importlib.import_module("anybatch.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"anybatch.models.{module.name}")


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    _load()
    return sorted(_MODELS)


def describe_models() -> dict[str, str]:
    """Each model's name and what its builder says of it."""
    _load()
    return {name: (_MODELS[name].__doc__ or "").strip() for name in sorted(_MODELS)}


def model_options(name: str) -> dict[str, inspect.Parameter]:
    """The arguments that a model takes beside its scheme, ``num_classes`` and ``in_chans``."""
    common = {"scheme", "num_classes", "in_chans", "device", "dtype"}
    return {key: p for key, p in inspect.signature(_find(name)).parameters.items() if key not in common}


def _find(name: str) -> Callable[..., nn.Module]:
    _load()
    if name not in _MODELS:
        raise unknown("model", name, _MODELS)
    return _MODELS[name]


def create_model(
    name: str,
    scheme: str | Scheme | Mapping[str, Any] | tuple[str, Mapping[str, Any]] = "ws+gn",
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    **options: Any,
) -> nn.Module:
    """A network by name, normalized as the scheme says.

    Args:
        name: One of `list_models`.
        scheme: Whatever `anybatch.scheme` reads.
        num_classes: Outputs of the classifier; 0 for none, which gives pooled features.
        in_chans: Channels of the input.
        **options: The network's own, such as ``stem="cifar"`` or ``width=32``.

    Returns:
        The network in training mode, on the CPU, initialized from torch's random state.

    Raises:
        ValueError: If the name, an option or the scheme is unknown, or the scheme does not fit the network's widths.

    >>> create_model("resnet20", scheme="gn:auto", num_classes=10)(__import__("torch").zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    build = _find(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
        wanted, got = type(known[option].default), options[option]
        if wanted in (int, str, bool) and type(got) is not wanted:
            kind = {int: "a whole number", str: "a text", bool: "true or false"}[wanted]
            raise ValueError(f"option {option} of {name} must be {kind}, got {got!r}")
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be 1 or more, got {in_chans}")
    made = parse_scheme(scheme)
    try:
        return build(made, num_classes=num_classes, in_chans=in_chans, **options)
    except ValueError as error:
        raise ValueError(f"model {name!r} with scheme {made.name!r}: {error}") from None
