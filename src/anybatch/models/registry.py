"""The table of networks. A file in this folder that registers one is found by its being there."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import nn

from anybatch.models.network import FeaturePyramid, Network
from anybatch.scheme import Scheme
from anybatch.schemes import scheme as parse_scheme
from anybatch.suggest import unknown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Builder = Callable[..., nn.Module]
TORCHVISION = "top-1 of torchvision's IMAGENET1K_V1 weights, with bn"
"""Stands behind a source, where the accuracy is that of these weights."""


@dataclass(frozen=True)
class Entry:
    """What is known of a network beside its builder."""

    build: Builder
    family: str
    """As in ``"ResNet"``."""
    about: str
    scheme: str
    """How it normalizes unless told otherwise."""
    size: int
    """Height and width of the images it is meant for, in pixels."""
    train_size: int
    """The same for training, where a publication has another."""
    published: float | None
    """Top-1 accuracy on ImageNet's validation images, in percent, as its source gives it; ours is another matter."""
    source: str


_MODELS: dict[str, Entry] = {}


def register_model(
    build: Builder | None = None,
    *,
    family: str = "",
    scheme: str = "ws+gn",
    size: int = 224,
    train_size: int | None = None,
    published: float | None = None,
    source: str = "",
) -> Any:
    """Enter a function ``name(scheme, *, num_classes, in_chans, ...)`` into the table under its own name."""
    if build is None:
        return functools.partial(
            register_model,
            family=family,
            scheme=scheme,
            size=size,
            train_size=train_size,
            published=published,
            source=source,
        )
    if build.__name__ in _MODELS:
        raise ValueError(f"a model named {build.__name__!r} is registered already")
    about = (build.__doc__ or "").strip()
    _MODELS[build.__name__] = Entry(build, family, about, scheme, size, train_size or size, published, source)
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


def model_entry(name: str) -> Entry:
    """What is known of a network; a `ValueError` names the nearest ones where there is none of this name."""
    return _find(name)


def model_options(name: str) -> dict[str, inspect.Parameter]:
    """The arguments that a model takes beside its scheme, ``num_classes`` and ``in_chans``."""
    common = {"scheme", "num_classes", "in_chans", "device", "dtype"}
    return {key: p for key, p in inspect.signature(_find(name).build).parameters.items() if key not in common}


def _find(name: str) -> Entry:
    _load()
    if name not in _MODELS:
        raise unknown("model", name, _MODELS)
    return _MODELS[name]


def create_model(
    name: str,
    scheme: str | Scheme | Mapping[str, Any] | tuple[str, Mapping[str, Any]] | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """A network by name, normalized as the scheme says.

    Args:
        name: One of `list_models`.
        scheme: Whatever `anybatch.scheme` reads; None for the network's own (`model_entry`).
        num_classes: Outputs of the classifier; 0 for none, which gives pooled features.
        in_chans: Channels of the input.
        features_only: Give a `FeaturePyramid`, whose output is the list of its levels' maps.
        out_indices: Which levels that list holds; None for all.
        **options: The network's own, such as ``stem="cifar"``, ``width=32`` or ``drop_rate=0.2``.

    Returns:
        The network in training mode, on the CPU, initialized from torch's random state.

    Raises:
        ValueError: If the name, an option or the scheme is unknown, or the scheme does not fit the network's widths.

    >>> create_model("resnet20", scheme="gn:auto", num_classes=10)(__import__("torch").zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={out_indices!r} goes with features_only=True")
    model = create_network(name, scheme, options, num_classes=num_classes, in_chans=in_chans)
    return FeaturePyramid(model, out_indices) if features_only else model


def create_network(
    name: str,
    scheme: str | Scheme | Mapping[str, Any] | tuple[str, Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    *,
    num_classes: int,
    in_chans: int,
) -> Network:
    """What `create_model` builds, of options that were written down: none but the network's own may stand there."""
    entry = _find(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
        wanted, got = type(known[option].default), options[option]
        if wanted is float and type(got) is int:
            continue
        if wanted in (int, str, bool, float) and type(got) is not wanted:
            kind = {int: "a whole number", str: "a text", bool: "true or false", float: "a number"}[wanted]
            raise ValueError(f"option {option} of {name} must be {kind}, got {got!r}")
    for argument, got, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if isinstance(got, bool) or not isinstance(got, Integral) or got < least:
            raise ValueError(f"{argument} must be a whole number of {least} or more, got {got!r}")
    made = parse_scheme(entry.scheme if scheme is None else scheme)
    try:
        model = entry.build(made, num_classes=num_classes, in_chans=in_chans, **options)
    except ValueError as error:
        raise ValueError(f"model {name!r} with scheme {made.name!r}: {error}") from None
    if not isinstance(model, Network):
        raise TypeError(f"model {name!r} is no Network but a {type(model).__name__}")
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if in_chans == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    model.default_cfg = {
        "architecture": name,
        "scheme": made.name,
        "options": dict(options),
        "input_size": (in_chans, entry.size, entry.size),
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 0.875 if entry.size > 64 else 1.0,
        "classifier": model.classifier_name,
        "num_classes": num_classes,
    }
    return model
