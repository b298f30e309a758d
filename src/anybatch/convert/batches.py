"""Images without labels, taken from a loader once and kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.suggest import one_line

IMAGES = 512
"""As many are taken from a loader at most; scale and shift of a channel need no more."""
TOGETHER = 64  # images in a forward pass, whatever the loader's batches

Batch = Tensor | list[Tensor]
"""(N, C, *), or images of different sizes, as detectors take them."""


def taken(loader: Iterable[Any], like: nn.Module, images: int = IMAGES) -> list[Batch]:
    """The first images of a loader in its batches, on the device and in the dtype of a network.

    Raises:
        ValueError: If it gives none, or something else than images.
    """
    if isinstance(loader, Tensor):
        loader = [loader]
    tensors: Any = itertools.chain(like.parameters(), like.buffers())
    value = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    found: list[Batch] = []
    count = 0
    for item in loader:
        batch = _images(item)
        batch = [x.to(value) for x in batch] if isinstance(batch, list) else batch.to(value)
        if len(batch):
            found.append(batch[: images - count])
            count += len(found[-1])
        if count >= images:
            break
    if not found:
        raise ValueError("the calibration loader is empty: give a few hundred images, which need no labels")
    return found


def _images(item: Any) -> Batch:
    several = isinstance(item, list | tuple) and bool(item)
    if several and all(_is_image(part) for part in item):
        return list(item)  # of different sizes
    first = item[0] if several else item
    if isinstance(first, list | tuple) and first and all(_is_image(part) for part in first):
        return list(first)
    if isinstance(first, Tensor) and first.is_floating_point() and first.dim() >= 2:
        return first
    what = f"{first.dtype} of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
    raise ValueError(
        f"the calibration loader must give images, tensors of floating point, alone or in front of labels; got {what}"
    )


def _is_image(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point() and part.dim() == 3


def together(batches: list[Batch]) -> list[Batch]:
    """The same images in larger batches, for passes in which samples are on their own."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for batch in batches:
        if isinstance(batch, list):
            return batches
        by_shape.setdefault(batch.shape[1:], []).append(batch)
    return [part for group in by_shape.values() for part in torch.cat(group).split(TOGETHER)]


@torch.no_grad()
def check_takes(model: nn.Module, batch: Batch) -> None:
    """Raise a `ValueError` with what a network says where it does not take such images."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model is on the meta device, without values to calibrate")
    try:
        model(batch)
    except Exception as error:  # of the network's own code
        shape = tuple(batch[0].shape)
        said = f"{type(error).__name__}: {one_line(error, 300)}"
        raise ValueError(f"the model fails on an image of shape {shape}: {said}") from error


def outputs(given: Any) -> list[Tensor]:
    """Every floating-point tensor in what a network returned."""
    if isinstance(given, Tensor):
        return [given] if given.is_floating_point() else []
    parts = given.values() if isinstance(given, dict) else given if isinstance(given, list | tuple) else ()
    return [tensor for part in parts for tensor in outputs(part)]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within this context the networks are in evaluation."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
