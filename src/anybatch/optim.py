"""Parameter groups, gradient clipping, optimizers and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from anybatch import kernels as kernels
from anybatch.methods.adaptive_gradient_clipping import AGC as AGC
from anybatch.methods.adaptive_gradient_clipping import AttachedAGC as AttachedAGC
from anybatch.methods.adaptive_gradient_clipping import Clipped as Clipped
from anybatch.methods.adaptive_gradient_clipping import adaptive_clip_grad_ as adaptive_clip_grad_
from anybatch.methods.adaptive_gradient_clipping import attach_agc as attach_agc
from anybatch.methods.parameters import decays, places
from anybatch.methods.sam import SAM as SAM
from anybatch.recipe import Recipe, Schedule
from anybatch.scheme import check_number


def param_groups(model: nn.Module, weight_decay: float, *, decay_all: bool = False) -> list[dict[str, Any]]:
    """Filters and weight matrices with decay; gains, scales, biases and single numbers without.

    The weight of a linear layer, convolution or embedding decays, whatever its shape. Of the rest, norms' parameters
    and whatever has at most one dimension larger than 1 do not: biases, gains (also of shape (C, 1, 1, 1), on which
    timm's groups put decay), skip gains, as in the recipe of the normalizer-free networks (arXiv:2102.06171,
    appendix A).

    Args:
        model: Whose trainable parameters are grouped, each once.
        weight_decay: L2 coefficient of the first group.
        decay_all: Give the second group the same, as the GroupNorm and WS papers do on ImageNet.

    Returns:
        Groups for a torch optimizer; an empty group is left out.

    Raises:
        ValueError: If ``weight_decay`` is not a finite number of 0 or more, which torch does not check in groups.
    """
    check_number("weight_decay", weight_decay)
    trained = [place for place in places(model) if place.parameter.requires_grad]
    decayed = {place.name for place in trained if decays(place)}
    groups = [
        {"params": [place.parameter for place in trained if place.name in decayed], "weight_decay": weight_decay},
        {
            "params": [place.parameter for place in trained if place.name not in decayed],
            "weight_decay": weight_decay if decay_all else 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters, at the peak learning rate."""
    o = recipe.optim
    groups = param_groups(model, o.weight_decay, decay_all=o.decay_all)
    # A fused step under mixed precision undoes the gradients' scale by itself, too late for clipping.
    # Opacus' gradients may lie in memory otherwise than the weights, which a fused step walks side by side.
    fused = not recipe.train.precision.endswith("-mixed") and recipe.privacy.epsilon is None
    if o.name == "sgd":
        made = torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=o.momentum, nesterov=o.nesterov, fused=fused)
    else:
        made = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(o.momentum, 0.999), fused=fused)
    return made if o.sam_rho is None else SAM(made, o.sam_rho)


def lr_factor(schedule: Schedule, step: int, steps_per_epoch: int) -> float:
    """Share of the peak learning rate at a step: a straight line up to 1, then the course.

    Warm-up: ``(step + 1) / (warm + 1)``. Cosine: ``(1 + cos(pi * t)) / 2`` with t from 0 at the end of the warm-up to
    1 at the end of the run (Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5, without restarts), scaled to end at
    ``floor``. Step: ``factor`` for each of the milestones that lies behind.

    >>> lr_factor(Schedule(epochs=2, warmup=0), 5, 5)
    0.5
    """
    total = schedule.epochs * steps_per_epoch
    warm = min(round(schedule.warmup * steps_per_epoch), total - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        return schedule.factor ** sum(step >= round(share * total) for share in schedule.milestones)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))
    return schedule.floor + (1 - schedule.floor) * cosine
