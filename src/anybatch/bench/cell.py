"""Ways to do one piece of work, each with its check against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.bench.timing import Work, captured
from anybatch.methods.stochastic_depth import StochasticDepth


@dataclass(frozen=True)
class Checked:
    """How far a result is from float64's, relative to that, and how far it may be."""

    error: float
    allowed: float
    what: str = "output"

    @property
    def refusal(self) -> str | None:
        """Why it is not timed, or None; NaN is above any bound."""
        if self.error <= self.allowed:
            return None
        return f"the {self.what} errs by {self.error:.3g} relative to float64's, {self.allowed:.3g} is allowed"


@dataclass
class Variant:
    """One way to do a cell's work, ready to run."""

    work: Work
    check: Callable[[], Checked] | None = None
    """None for what is not ours and for what another variant of the same code has checked."""
    saved: Callable[[], int] | None = None
    """Bytes kept for backward."""
    images: int | None = None
    """In one run."""
    resources: ExitStack = field(default_factory=ExitStack)


@dataclass
class Cell:
    """Work of one kind and size, and the ways to do it; `build` makes each when its turn comes."""

    case: str
    facts: dict[str, Any]
    build: dict[tuple[str, str], Callable[[], Variant]]
    """By variant and mode. In each mode the first is the baseline; without one, that of mode ``eager`` is."""
    values: dict[str, Callable[[], float]] = field(default_factory=dict)
    """In place of variants: numbers that are no times."""
    peaks: bool = False
    """Whether the most memory of a run is told too."""


def _distance(got: Tensor, exact: Tensor) -> float:
    return torch.linalg.vector_norm(got.detach().double().cpu() - exact.double().cpu()).item()


def compared(
    got: Sequence[Tensor], naive: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str], times: float = 2
) -> Checked:
    """The worst of several tensors: allowed is so many times the reference's own error, and 16 roundings of float32.

    Relative to a tensor's norm, or to a thousandth of the largest of them: sums that cancel have errors of that size.
    """
    worst: tuple[float, Checked] | None = None
    least = max((torch.linalg.vector_norm(truth.double()).item() for truth in exact), default=0.0) / 1000
    for one, other, truth, name in zip(got, naive, exact, names, strict=True):
        size = max(torch.linalg.vector_norm(truth.double()).item(), least) or 1.0
        error = _distance(one, truth) / size
        allowed = times * _distance(other, truth) / size + 16 * torch.finfo(torch.float32).eps
        excess = error / allowed if error == error else float("inf")
        if worst is None or excess > worst[0]:
            worst = excess, Checked(error, allowed, name)
    if worst is None:
        raise ValueError("nothing to compare")
    return worst[1]


def without_randomness(model: nn.Module) -> nn.Module:
    """The same module, that draws nothing."""
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, StochasticDepth)):
            module.eval()
        elif isinstance(getattr(module, "p", None), float):
            setattr(module, "p", 0.0)  # noqa: B010 (a plain attribute, which torch's stub does not know)
    return model


def in_mode(module: nn.Module, mode: str) -> Callable[..., Any]:
    """How the module is called in a mode."""
    return torch.compile(module) if mode == "compiled" else module


def graphed(run: Callable[[], object], mode: str) -> Callable[[], object]:
    return captured(run) if mode == "graph" else run
