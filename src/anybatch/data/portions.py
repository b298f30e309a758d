"""Portions of a data set: balanced subsets, and a share of each class set aside."""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.data.images import Part


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ranks(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image's place, 0.., in a random order of its class, and the images in its class; both (N,) int64."""
    rank, count = torch.empty_like(labels), torch.empty_like(labels)
    order = torch.randperm(len(labels), generator=generator)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members], count[members] = torch.arange(len(members)), len(members)
    return rank, count


def balanced(labels: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of ``n`` images, as many of each class as there are or as divide evenly, and of the rest; ascending."""
    rank, _ = _ranks(labels, generator)
    order = torch.argsort(rank * (int(labels.max()) + 1) + labels)
    return order[:n].sort().values, order[n:].sort().values


def subset(part: Part, n: int | None, seed: int, what: str, argument: str) -> Part:
    """A balanced ``n`` of the images, all where ``n`` is None; ``what`` and ``argument`` name them in the error."""
    if n is None or n == len(part.labels):
        return part
    if n > len(part.labels):
        raise ValueError(f"{argument}={n} is more than the {len(part.labels)} {what} images there are")
    return part.take(balanced(part.labels, n, _generator(seed))[0])


def set_aside(part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    """What stays and what is set aside: ``fraction`` of the images, and of each class as nearly as whole images allow.

    At least one image of each class stays.

    Raises:
        ValueError: If there is not one image to set aside.
    """
    labels = part.labels
    rank, count = _ranks(labels, _generator(seed))
    # Classes take turns in the rounding: the offset, below one image, differs from class to class.
    share = (rank + (labels + 0.5) / (int(labels.max()) + 1)) / count
    share[rank == count - 1] = torch.inf
    n = min(max(1, round(fraction * len(labels))), int(share.isfinite().sum()))
    if n == 0:
        raise ValueError(f"no image can be set aside for evaluation: there is one image a class ({len(labels)} in all)")
    order = torch.argsort(share, stable=True)
    return part.take(order[n:].sort().values), part.take(order[:n].sort().values)
