"""Parameter groups, optimizers and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from anybatch.recipe import Recipe, Schedule


def param_groups(model: nn.Module, weight_decay: float, *, decay_all: bool = False) -> list[dict[str, Any]]:
    """Filters and weight matrices with decay; scales, shifts and biases (one dimension or none) without.

    Args:
        model: Whose trainable parameters are grouped, each once.
        weight_decay: L2 coefficient of the first group.
        decay_all: Give the second group the same, as the GroupNorm and WS papers do on ImageNet.

    Returns:
        Groups for a torch optimizer; an empty group is left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": weight_decay if decay_all else 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters, at the peak learning rate."""
    o = recipe.optim
    groups = param_groups(model, o.weight_decay, decay_all=o.decay_all)
    # A fused step under mixed precision undoes the gradients' scale by itself, too late for clipping.
    fused = not recipe.train.precision.endswith("-mixed")
    if o.name == "sgd":
        return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=o.momentum, nesterov=o.nesterov, fused=fused)
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(o.momentum, 0.999), fused=fused)


def lr_factor(schedule: Schedule, step: int, steps_per_epoch: int) -> float:
    """Share of the peak learning rate at a step: a straight line up to 1, then the course.

    Warm-up: ``(step + 1) / (warm + 1)``. Cosine: ``(1 + cos(pi * t)) / 2`` with t from 0 at the end of the warm-up to
    1 at the end of the run (Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5, without restarts).

    >>> lr_factor(Schedule(epochs=2, warmup=0), 5, 5)
    0.5
    """
    total = schedule.epochs * steps_per_epoch
    warm = min(round(schedule.warmup * steps_per_epoch), total - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    if schedule.name == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))
