"""Images as a network wants them."""

from __future__ import annotations

from typing import Any

from anybatch.models.network import Network


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
        ValueError: If ``mean`` and ``std`` are not one for each channel, as in networks of other than 1 or 3 channels
            unless set.

    >>> from anybatch.models import create_model
    >>> transforms(create_model("resnet8"))(__import__("torch").zeros(3, 40, 50)).shape
    torch.Size([3, 32, 32])
    """
    import torch
    from torchvision.transforms import v2

    if not isinstance(model, Network):
        raise TypeError(f"model must be a network of create_model, got {type(model).__name__}")
    cfg, chans = model.default_cfg, model.in_chans
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
