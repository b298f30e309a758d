"""A short phase in which the converted network learns to give what the old one gave. No labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.convert.batches import Batch, outputs
from anybatch.convert.calibrate import Tell
from anybatch.convert.kinds import evaluated
from anybatch.convert.plan import Fitted
from anybatch.methods.common import widened

LR = 1e-4
"""Of Adam, at the start of a cosine."""
_INNER = 10.0
"""Weight of what norms give beside what the network gives. Without it, at batch 2, less is kept: docs/studies."""


def match_outputs(
    old: nn.Module,
    new: nn.Module,
    fitted: dict[str, Fitted],
    batches: list[Batch],
    steps: int,
    *,
    lr: float = LR,
    tell: Tell | None = None,
) -> None:
    """Match what the old network and its norms give, step by step over the batches as they are.

    The loss is the squared error over the variance, of each output, and on average of each norm. Adam, of the
    parameters that ask for gradients. Both networks evaluate, so that nothing is dropped and what is left of BatchNorm
    keeps its averages.

    Raises:
        ValueError: If the networks' outputs cannot be compared, as of detectors, or the loss becomes infinite.
    """
    parameters = [p for p in new.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("distill has nothing to train: no parameter of the model asks for gradients")
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    before = [p.grad for p in parameters]
    try:
        with _recorded(fitted) as record:
            for step in range(steps):
                loss = _loss(old, new, batches[step % len(batches)], record)
                optimizer.zero_grad()
                loss.backward()
                if not loss.isfinite():
                    raise ValueError(f"the loss of distill became {loss.item()} at step {step + 1}")
                optimizer.step()
                schedule.step()
                if tell is not None:
                    tell(step + 1, steps)
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


@dataclass
class _Record:
    """What norms gave in the last pass, by name: in the old network, and here."""

    wanted: dict[str, list[Tensor]] = field(default_factory=dict)
    given: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def _recorded(fitted: dict[str, Fitted]) -> Iterator[_Record]:
    record, handles = _Record(), []

    def watch(name: str, what: Fitted) -> None:
        def see_old(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            t = evaluated(layer, args[0])
            record.wanted.setdefault(name, []).append(t.relu() if what.activated else t)

        def see_new(layer: nn.Module, args: Any, y: Tensor) -> None:
            record.given.setdefault(name, []).append(y)

        handles.append(what.old.register_forward_pre_hook(see_old))
        handles.append(what.layer.register_forward_hook(see_new))

    for name, what in fitted.items():
        watch(name, what)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _loss(old: nn.Module, new: nn.Module, batch: Batch, record: _Record) -> Tensor:
    record.wanted.clear()
    record.given.clear()
    with torch.no_grad():
        wanted = outputs(old(batch))
    with torch.enable_grad():
        given = outputs(new(batch))
        if not given:
            raise ValueError("distill compares outputs, and the model gives no tensors of floating point")
        if [y.shape for y in given] != [t.shape for t in wanted]:
            raise ValueError("distill compares outputs, and the networks' differ in their shapes, as detectors' do")
        inner = [
            _error(y, t) for name, ys in record.given.items() for y, t in zip(ys, record.wanted[name], strict=True)
        ]
        loss = torch.stack([_error(y, t) for y, t in zip(given, wanted, strict=True)]).sum()
        return loss + _INNER * torch.stack(inner).mean() if inner else loss


def _error(y: Tensor, t: Tensor) -> Tensor:
    """The squared error over the variance, in float32 or wider."""
    y, t = widened(y), widened(t)
    return (y - t).square().mean() / t.var(correction=0).clamp_min(torch.finfo(t.dtype).tiny ** 0.5)
