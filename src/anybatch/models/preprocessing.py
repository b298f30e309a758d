"""Images as a network wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anybatch.models.network import Network

IMAGES = ("input_size", "mean", "std", "interpolation", "crop_pct")
"""The entries of a ``default_cfg`` that say what images a network is for."""


def check_images(cfg: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for the first entry of `IMAGES` that no image can be brought to."""
    size, crop_pct, interpolation = cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]
    wrong = {
        "input_size": "three whole numbers above 0" if not _are(size, int, 3, least=1) else "",
        "mean": "finite numbers" if not _are(cfg["mean"], (int, float)) else "",
        "std": "finite numbers above 0" if not _are(cfg["std"], (int, float), least=1e-12) else "",
        "interpolation": f"one of {', '.join(_MODES)}" if interpolation not in _MODES else "",
        "crop_pct": "a number above 0" if not _are((crop_pct,), (int, float), least=1e-12) else "",
    }
    for name, wanted in wrong.items():
        if wanted:
            raise ValueError(f"default_cfg[{name!r}] must be {wanted}, got {cfg[name]!r}")


_MODES = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


def _are(values: Any, kind: Any, count: int | None = None, *, least: float = -math.inf) -> bool:
    """Whether it is a list of so many finite numbers, none below ``least``."""
    return (
        isinstance(values, list | tuple)
        and len(values) == (count or max(len(values), 1))
        and all(isinstance(v, kind) and not isinstance(v, bool) and least <= v and math.isfinite(v) for v in values)
    )


def transforms(model: Network) -> Any:
    """What brings an image to a network, for evaluation, from the network's ``default_cfg``.

    The shorter side is resized to ``size / crop_pct`` pixels, rounded down, the central square of ``size`` cut out,
    values brought to 0..1 and normalized with ``mean`` and ``std``. Where weights were trained otherwise, as
    torchvision's with ``interpolation`` ``"bilinear"``, change the entry of ``default_cfg`` first.

    Args:
        model: A network of `create_model`.

    Returns:
        A ``torchvision.transforms.v2.Compose``. It takes an image of Pillow or (..., C, H, W) of uint8 0..255 or
        floating point 0..1, of which grey becomes RGB for networks of 3 channels, and RGB grey for networks of 1, and
        gives (..., in_chans, size, size) float32.

    Raises:
        TypeError: If the model is no `Network`.
        ValueError: If an entry is no such thing, as `check_images` tells; if ``mean`` and ``std`` are not one for each
            channel, as in networks of other than 1 or 3 channels unless set.

    >>> from anybatch.models import create_model
    >>> transforms(create_model("resnet8"))(__import__("torch").zeros(3, 40, 50)).shape
    torch.Size([3, 32, 32])
    """
    if not isinstance(model, Network):
        raise TypeError(f"model must be a network of create_model, got {type(model).__name__}")
    return transforms_of(model.default_cfg, model.in_chans)


def transforms_of(cfg: Mapping[str, Any], chans: int) -> Any:
    """The same for entries of a ``default_cfg`` and a number of channels."""
    import torch
    from torchvision.transforms import v2

    check_images(cfg)
    for name in ("mean", "std"):
        if len(cfg[name]) != chans:
            raise ValueError(
                f"default_cfg[{name!r}] is {cfg[name]} for images of {chans} channels; set one number for each channel"
            )
    size = cfg["input_size"][-1]
    mode = {1: [v2.Grayscale()], 3: [v2.RGB()]}
    return v2.Compose(
        [
            *mode.get(chans, []),
            v2.Resize([int(size / cfg["crop_pct"])], interpolation=v2.InterpolationMode(cfg["interpolation"])),
            v2.CenterCrop([size, size]),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(cfg["mean"]), list(cfg["std"])),
            v2.ToPureTensor(),
        ]
    )
