"""Whether one batch gives the gradient that its parts, accumulated, give."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anybatch.methods.parameters import places
from anybatch.probe.layers import scope_of
from anybatch.probe.result import Finding, Result, Table, few, many
from anybatch.probe.subject import Loss, Subject, loss_of, probing, still
from anybatch.suggest import one_line

FLOOR = 1e-3
"""Differences of smaller gradients than this share of the whole one's norm are told relative to that share of it."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2}
"""By dtype, the relative difference that rounding explains; half precision has 0.2."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one layer's gradient."""

    name: str
    kind: str
    relative: float
    """The norm of the difference over that of the gradient."""
    cosine: float
    norm: float
    """Of the gradient from the whole batch."""


@dataclass(frozen=True, kw_only=True)
class SplitInvariance(Result):
    """What `split_invariance` found."""

    title: ClassVar[str] = "Gradient of a batch against its parts"

    batch_size: int
    micro: int
    """Samples in each part."""
    dtype: str
    layers: tuple[Difference, ...]
    """Layers with parameters, in the model's order."""
    relative: float
    """Of the whole gradient."""
    worst: float
    """The largest of any layer."""
    tolerance: float
    """What rounding explains, in this dtype."""
    invariant: bool
    """Whether that is all."""

    def table(self) -> Table:
        head = ("layer", "kind", "relative difference", "cosine", "norm")
        return Table(head, tuple((x.name, x.kind, x.relative, x.cosine, x.norm) for x in self.layers))


def split_invariance(
    model: nn.Module,
    x: Any,
    labels: Tensor | None = None,
    *,
    micro: int = 1,
    loss: Loss | None = None,
    double: bool = True,
) -> SplitInvariance:
    """Compare the gradient of one batch with the mean over its parts, as accumulating gradients gives it.

    The model is in training, but for layers that draw random numbers, such as dropout, which would draw otherwise for
    each part. The model is unchanged afterwards. Of torchvision's detectors the backbone is probed, since their losses
    are no means over images.

    Args:
        model: Any model that takes one tensor, or one of torchvision's detectors.
        x: (N, *), two samples or more.
        labels: (N,) or (N, *), classes; None for a random target.
        micro: Samples in each part, a divisor of N.
        loss: Of output and labels, a mean over samples; None for cross-entropy with labels, and without them half the
            mean square of the distance to a random target.
        double: Whether to compute in float64, on a copy, so that what differs is not rounding.

    Raises:
        ValueError: If ``micro`` does not divide N or is N, or the model does not take the samples, or their parts.
    """
    with probing(_doubled(model) if double else model, x, labels, least=2) as subject:
        n = len(subject.x)
        if isinstance(micro, bool) or not isinstance(micro, int) or micro < 1 or micro >= n or n % micro:
            raise ValueError(f"micro must be a divisor of the {n} samples of x and less, got {micro!r}")
        left = still(subject, subject.x)
        slots = [place for place in places(subject.model) if place.parameter.requires_grad]
        whole = _gradients(subject, loss, slice(None))
        parts: list[Tensor] = [torch.zeros_like(g) for g in whole]
        for start in range(0, n, micro):
            for total, g in zip(parts, _gradients(subject, loss, slice(start, start + micro)), strict=True):
                total += g * (micro / n)
        by_layer: dict[str, list[int]] = {}
        for i, place in enumerate(slots):
            by_layer.setdefault(place.name.rpartition(".")[0], []).append(i)
        least = FLOOR * float(_flat(whole).norm())
        found = []
        for name, indices in by_layer.items():
            one, other = (_flat([grads[i] for i in indices]) for grads in (whole, parts))
            norm = float(one.norm())
            found.append(
                Difference(
                    name=name or "(the model itself)",
                    kind=type(subject.model.get_submodule(name)).__name__,
                    relative=float((one - other).norm()) / (max(norm, least) or 1.0),
                    cosine=float(one @ other / (one.norm() * other.norm()).clamp_min(1e-300)),
                    norm=norm,
                )
            )
        all_one, all_other = _flat(whole), _flat(parts)
        relative = float((all_one - all_other).norm() / all_one.norm().clamp_min(1e-300))
        worst = max((d.relative for d in found), default=0.0)
        dtype = whole[0].dtype if whole else subject.x.dtype
        tolerance = TOLERANCE.get(dtype, 0.2)
        invariant = worst <= tolerance
        mixing = [name for name, m in subject.model.named_modules() if m.training and scope_of(m) == "batch"]
    return SplitInvariance(
        batch_size=n,
        micro=micro,
        dtype=str(dtype).removeprefix("torch."),
        layers=tuple(found),
        relative=relative,
        worst=worst,
        tolerance=tolerance,
        invariant=invariant,
        findings=tuple(_findings(n, micro, relative, worst, invariant, mixing, left)),
    )


def _doubled(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        return model  # which is told of further on
    try:
        return copy.deepcopy(model).double()
    except (RuntimeError, TypeError, ValueError) as error:
        why = one_line(error, 200)
        raise ValueError(f"the model cannot be copied to float64 ({why}); pass double=False") from error


def _gradients(subject: Subject, loss: Loss | None, part: slice) -> list[Tensor]:
    labels = None if subject.labels is None else subject.labels[part]
    value = loss_of(subject, subject.run(subject.x[part]), labels, loss)
    asked = [place.parameter for place in places(subject.model) if place.parameter.requires_grad]
    grads = torch.autograd.grad(value, asked, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(asked, grads, strict=True)]


def _flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads]) if grads else torch.zeros(1)


def _findings(
    n: int, micro: int, relative: float, worst: float, invariant: bool, mixing: list[str], left: list[str]
) -> list[Finding]:
    parts = f"{n // micro} parts of {micro}"
    if invariant:
        told = [
            Finding(
                "good",
                f"One batch of {n} gives the gradient of {parts}, within {worst:.1g} in every layer: accumulating "
                f"gradients, and splitting a batch over devices, change nothing.",
            )
        ]
    else:
        why = f" {many(len(mixing), 'layer')} take statistics of the batch ({few(mixing)})." if mixing else ""
        told = [
            Finding(
                "warning",
                f"One batch of {n} and {parts} give gradients that differ by {100 * relative:.3g} % (in the worst "
                f"layer by {100 * worst:.3g} %): accumulating gradients does not stand in for a large batch.{why}",
                "convert these layers to a norm of single samples, such as ws+gn, or freeze them before accumulating."
                if mixing
                else "see which layers mix samples: anybatch.probe.batch_dependence.",
            )
        ]
    if left:
        told.append(
            Finding("note", f"{few(left)} draw random numbers in code of their own, which counts as difference here.")
        )
    return told
