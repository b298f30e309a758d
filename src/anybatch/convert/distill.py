"""A short phase in which the converted network learns to give what the old one gave. No labels."""

from __future__ import annotations

import math

import torch
from torch import nn

from anybatch.convert.batches import Batch, outputs
from anybatch.convert.calibrate import Tell

LR = 1e-3
"""Of Adam, at the start of a cosine."""


def match_outputs(
    old: nn.Module, new: nn.Module, batches: list[Batch], steps: int, *, lr: float = LR, tell: Tell | None = None
) -> None:
    """Match the outputs of the old network, step by step over the batches as they are.

    The loss is the squared error of each output over its variance. Adam, of the parameters that ask for gradients.
    Both networks evaluate, so that nothing is dropped and what is left of BatchNorm keeps its averages.

    Raises:
        ValueError: If the networks' outputs cannot be compared, as of detectors, or become infinite.
    """
    parameters = [p for p in new.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("distill has nothing to train: no parameter of the model asks for gradients")
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    before = [p.grad for p in parameters]
    with torch.no_grad():
        scales = [t.float().var().clamp_min(torch.finfo(torch.float32).tiny) for t in outputs(old(batches[0]))]
    try:
        for step in range(steps):
            batch = batches[step % len(batches)]
            with torch.no_grad():
                wanted = outputs(old(batch))
            with torch.enable_grad():
                given = outputs(new(batch))
                if not given or [t.shape for t in given] != [t.shape for t in wanted]:
                    raise ValueError("distill compares outputs, and the networks' differ in their shapes, as detectors' do")
                loss = sum(
                    ((y.float() - t.float()).square().mean() / s for y, t, s in zip(given, wanted, scales, strict=True)),
                    torch.zeros(()),
                )
                optimizer.zero_grad()
                loss.backward()
            if not loss.isfinite():
                raise ValueError(f"the loss of distill became {loss.item()} at step {step + 1}; take a lower rate")
            optimizer.step()
            schedule.step()
            if tell is not None:
                tell(step + 1, steps)
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


