"""How steadily loss and gradient change along the gradient, and how much of it standardized filters take away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anybatch.methods.filters import StandardizedFilter
from anybatch.methods.parameters import places
from anybatch.probe.asleep import asleep
from anybatch.probe.layers import CONVS
from anybatch.probe.result import Cell, Finding, Result, Table
from anybatch.probe.subject import Loss, Subject, loss_of, probing, still

STEPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True, kw_only=True)
class Step:
    """At a distance from the weights, against the gradient."""

    length: float
    """Over the norm of all weights."""
    loss: float
    change: float
    """Norm of the gradient's change, over that of the gradient."""
    smoothness: float
    """Norm of the gradient's change over the distance: where it is large, only small steps are safe."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Of one layer's filters, shares of their gradient's squared norm."""

    name: str
    kind: str
    mean: float
    """Along the constant filter, which centering removes: ``<1, g>² / (I |g|²)``, of filters with I values."""
    radial: float
    """Along the standardized filter, which scaling removes: ``<g, W>² / (|W|² |g|²)``."""


@dataclass(frozen=True, kw_only=True)
class Smoothness(Result):
    """What `smoothness` found."""

    title: ClassVar[str] = "Smoothness"

    loss: float
    gradient: float
    """Norm of the whole gradient."""
    steps: tuple[Step, ...]
    layers: tuple[Layer, ...]
    mean: float
    """As of a layer, of all filters together."""
    radial: float
    standardized: bool
    """Whether some filters are standardized already, so that these shares are removed."""

    def table(self) -> Table:
        rows: tuple[tuple[Cell, ...], ...] = tuple((x.name, x.kind, x.mean, x.radial) for x in self.layers)
        return Table(("layer", "kind", "mean part", "radial part"), rows)


def smoothness(
    model: nn.Module,
    x: Any,
    labels: Tensor | None = None,
    *,
    steps: Sequence[float] = STEPS,
    loss: Loss | None = None,
) -> Smoothness:
    """Walk against the gradient and see how loss and gradient change; and which part of filters' gradients WS removes.

    With g the gradient with respect to a filter W of I values as the layer uses it, Weight Standardization takes two
    parts from ``|g|²``: ``<1, g>² / I`` by centering and ``<g, W>² / |W|²`` by scaling. Where filters are not
    standardized yet, W is what they would be. The model is in training, but for layers that draw random numbers, and is
    unchanged afterwards. Of torchvision's detectors the backbone is probed.

    Args:
        model: Any model that takes one tensor, or one of torchvision's detectors.
        x: (N, *).
        labels: (N,) or (N, *), classes; None for a random target.
        steps: Distances, over the norm of all weights.
        loss: As of `split_invariance`.

    Raises:
        ValueError: If a step is not above 0, or the model does not take the samples or has no parameters.

    Source:
        Santurkar et al. 2018, arXiv:1805.11604, section 3 (the walk); Qiao et al. 2019, arXiv:1903.10520, section 4
        (the two parts).
    """
    if not steps or not all(isinstance(s, (int, float)) and 0 < s < math.inf for s in steps):
        raise ValueError(f"steps must be numbers above 0, got {tuple(steps)!r}")
    with probing(model, x, labels) as subject:
        still(subject, subject.x)
        weights = [place.parameter for place in places(subject.model) if place.parameter.requires_grad]
        if not weights:
            raise ValueError(f"{type(model).__name__} has no parameters to move")
        value, grads, parts = _with_filters(subject, weights, loss)
        start = [w.detach().clone() for w in weights]
        norm, size = _norm(grads), _norm(start)
        walked = []
        for length in sorted(steps):
            distance = length * size
            with torch.no_grad():
                for w, w0, g in zip(weights, start, grads, strict=True):
                    w.copy_(w0 - g * (distance / max(norm, 1e-300)))
            there = loss_of(subject, subject.run(subject.x), subject.labels, loss)
            now = _grads(there, weights)
            change = _norm([a - b for a, b in zip(now, grads, strict=True)])
            walked.append(
                Step(
                    length=float(length),
                    loss=there.item(),
                    change=change / max(norm, 1e-300),
                    smoothness=change / max(distance, 1e-300),
                )
            )
    total = sum(part.squared for part in parts) or 1.0
    mean, radial = (sum(getattr(part, which) for part in parts) / total for which in ("mean", "radial"))
    standardized = any(part.standardized for part in parts)
    return Smoothness(
        loss=value,
        gradient=norm,
        steps=tuple(walked),
        layers=tuple(
            Layer(name=p.name, kind=p.kind, mean=p.mean / (p.squared or 1), radial=p.radial / (p.squared or 1))
            for p in parts
        ),
        mean=mean,
        radial=radial,
        standardized=standardized,
        findings=(*_findings(value, walked, mean, radial, standardized, bool(parts)), *asleep(model)),
    )


@dataclass
class _Parts:
    name: str
    kind: str
    standardized: bool
    squared: float
    mean: float
    radial: float


def _with_filters(
    subject: Subject, weights: list[nn.Parameter], loss: Loss | None
) -> tuple[float, list[Tensor], list[_Parts]]:
    """Loss, gradients, and the two parts of the gradient with respect to the filters that layers use."""
    named = {name: m for name, m in subject.model.named_modules() if _has_filters(m)}
    used: dict[str, list[Tensor]] = {name: [] for name in named}
    for name, module in named.items():
        if isinstance(module, StandardizedFilter):
            module.__dict__["standardized"] = _noting(module, used[name])
    output = subject.run(subject.x)
    value = loss_of(subject, output, subject.labels, loss)
    for name, module in named.items():
        if not isinstance(module, StandardizedFilter):
            weight = module.get_parameter("weight")
            used[name] = [weight] if weight.requires_grad else []
        else:
            del module.__dict__["standardized"]
    inner = [t for tensors in used.values() for t in tensors]
    found = torch.autograd.grad(value, [*weights, *inner], allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=False)]
    of_filters = iter(found[len(weights) :])
    parts = []
    for name, tensors in used.items():
        pairs = [(t, g) for t, g in zip(tensors, of_filters, strict=False) if g is not None]
        if pairs:
            parts.append(_parts(name, named[name], pairs))
    return value.item(), grads, parts


def _has_filters(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    kinds = (*CONVS, StandardizedFilter)  # a classifier's filters are left as they are
    return isinstance(module, kinds) and isinstance(weight, Tensor) and weight[0].numel() > 1


def _noting(layer: StandardizedFilter, into: list[Tensor]) -> Callable[[], Tensor]:
    def standardized() -> Tensor:
        made = type(layer).standardized(layer)
        if made.requires_grad:
            into.append(made)
        return made

    return standardized


@torch.no_grad()
def _parts(name: str, module: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> _Parts:
    g = sum((_rows(module, g) for _, g in pairs[1:]), _rows(module, pairs[0][1]))
    w = _rows(module, pairs[0][0])
    w = w - w.mean(1, keepdim=True)
    size = w.square().sum(1)
    along = torch.where(size > 0, (g * w).sum(1).square() / size.clamp_min(1e-300), 0)
    return _Parts(
        name=name,
        kind=type(module).__name__,
        standardized=isinstance(module, StandardizedFilter),
        squared=float(g.square().sum()),
        mean=float((g.sum(1).square() / g.shape[1]).sum()),
        radial=float(along.sum()),
    )


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    """(O, I): one filter a row, in float64."""
    if getattr(module, "transposed", False):
        groups: int = module.groups  # pyright: ignore[reportAssignmentType]
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.detach().double().flatten(1)


def _grads(value: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, list(weights), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def _findings(
    value: float, walked: list[Step], mean: float, radial: float, standardized: bool, filters: bool
) -> list[Finding]:
    told = []
    falling = [s for s in walked if s.loss < value]
    safe = max((s.length for s in walked if s.change < 1 and s.loss <= value), default=0.0)
    if not falling:
        told.append(
            Finding(
                "warning",
                f"The loss does not fall along its gradient from steps of {walked[0].length:g} of the weights' norm "
                f"on: the landscape is rough there.",
                "take smaller steps, a warm-up, or a scheme with a norm or standardized filters.",
            )
        )
    else:
        told.append(
            Finding(
                "good" if safe else "warning",
                f"The loss falls along its gradient, and the gradient changes by less than its own size, up to steps "
                f"of {safe:g} of the weights' norm."
                if safe
                else f"The gradient turns within a step of {walked[0].length:g} of the weights' norm.",
                "" if safe else "take smaller steps, a warm-up, or standardized filters (ws).",
            )
        )
    if filters:
        both = f"{100 * mean:.1f} % by centering and {100 * radial:.1f} % by scaling"
        told.append(
            Finding("note", f"Standardized filters remove {both} of the squared gradient here.")
            if standardized
            else Finding(
                "note",
                f"Standardizing the filters would remove {both} of their squared gradient.",
                "add ws to the scheme where that is much." if mean + radial > 0.1 else "",
            )
        )
    return told
