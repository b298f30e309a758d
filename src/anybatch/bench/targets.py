"""The bars that measurements are held against, and what rows say of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

Mark = Literal["aim", "must", "short", "not measured"]
FUSED = ("eager", "helpers")
"""Modes of which a target takes the faster: what our code reaches without compiling the network."""


@dataclass(frozen=True)
class Target:
    """A bar: what must hold, and what is aimed at, of a number of which less is better.

    Args:
        what: What is measured and against what.
        before: The same of released code, torch or timm.
        must: The bar.
        aim: Where we want to be.
        case: A name in `anybatch.bench.CASES`.
        variants: Whose rows count; ``*`` stands for anything.
        facts: What rows must say of themselves; a tuple lists alternatives.
        number: The field of a row.
        reduce: How several rows become one number.
        gpu: Whether rows of GPUs count, or of the CPU.
        modes: Whose rows count; of several the fastest, cell by cell.
        precision: Whose rows count.
    """

    what: str
    before: str
    must: float
    aim: float
    case: str
    variants: tuple[str, ...]
    facts: tuple[tuple[str, Any], ...] = ()
    number: str = "ratio"
    reduce: Literal["geometric mean", "largest"] = "geometric mean"
    gpu: bool = False
    modes: tuple[str, ...] = FUSED
    precision: str = "32-true"

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether a row counts."""
        return (
            row["status"] == "ok"
            and not row["quick"]
            and row["case"] == self.case
            and any(fnmatchcase(row["variant"], pattern) for pattern in self.variants)
            and row["mode"] in self.modes
            and row["precision"] == self.precision
            and is_gpu(row["machine"]) == self.gpu
            and row.get(self.number) is not None
            and all(
                row["facts"].get(name) in (value if isinstance(value, tuple) else (value,))
                for name, value in self.facts
            )
        )


def is_gpu(machine: str) -> bool:
    """Whether a kind of machine is one of GPUs."""
    return machine.partition("-")[0] != "cpu"


@dataclass(frozen=True)
class Judged:
    """A target and what was measured: one number, and the range of the rows behind it."""

    target: Target
    measured: float | None
    low: float | None
    high: float | None
    cells: int

    @property
    def mark(self) -> Mark:
        """How it stands."""
        if self.measured is None:
            return "not measured"
        if self.measured <= self.target.aim:
            return "aim"
        return "must" if self.measured <= self.target.must else "short"


def _target(
    what: str, before: str, must: float, aim: float, case: str, variants: str, facts: dict[str, Any], **more: Any
) -> Target:
    return Target(what, before, must, aim, case, tuple(variants.split("|")), tuple(facts.items()), **more)


def _gpu(
    what: str, before: str, must: float, aim: float, case: str, variants: str, facts: dict[str, Any], mode: str
) -> Target:
    how: dict[str, Any] = {"modes": (mode,), "precision": "bf16-mixed", "gpu": True}
    return _target(what, before, must, aim, case, variants, {"memory_format": "channels_last", **facts}, **how)


_SMALL = {"batch_size": (2, 8)}
_NHWC = {**_SMALL, "memory_format": "channels_last"}
_NCHW = {**_SMALL, "memory_format": "contiguous"}
_R50 = {"model": "resnet50", "size": 224}
_R18 = {"model": "resnet18", "size": 32}
_ANY_KN = "kn(p=0)|kn"

TARGETS: tuple[Target, ...] = (
    _target("KNConv + ReLU, p = 0", "1.4", 1.08, 0.97, "conv", "kn(p=0)", _SMALL),
    _target("KNConv + ReLU, p > 0", "1.8", 1.12, 1.00, "conv", "kn", _SMALL),
    _target("KNConv + ReLU, worst shape", "20", 1.3, 1.3, "conv", _ANY_KN, _SMALL, reduce="largest"),
    _target("KNConv + ReLU in groups of channels", "2-8", 1.12, 1.00, "grouped", _ANY_KN, _SMALL),
    _target("KN step, ResNet-50, 224 px", "", 1.05, 0.97, "step", _ANY_KN, _R50 | _SMALL, reduce="largest"),
    *(
        _target(f"KN step, ResNet-18, 32 px, batch {n}", before, must, 1.00, "step", _ANY_KN, _R18 | {"batch_size": n},
                reduce="largest")
        for n, before, must in ((2, "1.36", 1.12), (8, "1.43", 1.08), (32, "1.7", 1.08))
    ),
    _target("KN ResNets, memory kept for backward", "2.25-2.6", 0.60, 0.50, "step", _ANY_KN,
            {"model": ("resnet18", "resnet50")}, number="saved_ratio", reduce="largest"),
    _target("GN + ReLU, channels_last", "0.9-2.1", 1.0, 0.5, "norm", "gn", _NHWC),
    _target("GN + ReLU, contiguous", "0.45-0.54", 0.6, 0.35, "norm", "gn", _NCHW),
    _target("BCN + ReLU, channels_last", "2.1-3.5", 1.3, 0.8, "norm", "bcn", _NHWC),
    _target("PN + ReLU", "4-6", 0.7, 0.45, "norm", "pn", _SMALL),
    _target("LCN + ReLU, windows smaller than the map", "6-16", 2.0, 1.0, "norm", "lcn(window=*)", _SMALL),
    _target("norm + ReLU + conv, recomputed", "1", 1.03, 0.95, "recompute", "gn|bcn", _SMALL),
    _target("norm + ReLU + conv, recomputed, memory kept for backward", "1", 0.55, 0.50, "recompute", "gn|bcn", _SMALL,
            number="saved_ratio"),
    _target("WS of a ResNet-50 beside a step of 2 images", "0.49, timm 0.14", 0.06, 0.02, "weight_standardize", "ws",
            {}, reduce="largest"),
    _target("Scaled WS, the same", "", 0.06, 0.02, "weight_standardize", "sws", {}, reduce="largest"),
    _target("WS in evaluation, the same", "0.53-1.7 of a forward", 0.002, 0.001, "weight_standardize",
            "ws, in evaluation", {}, reduce="largest"),
    _target("AGC of a network against timm's loop", "1", 0.4, 0.15, "agc", "agc", {}, reduce="largest"),
    *(
        _target(f"{name} in float32 at mean/std 1000, relative error of 1/std", "0.2 or NaN", 1e-5, 1e-5, "accuracy",
                variant, {"what": "1/std, float32", "mean": 1e3}, number="value", reduce="largest")
        for name, variant in (("KNConv", "kn"), ("GN", "gn"))
    ),
    _target("KNConv in float32 at mean/std 10,000, relative error of 1/std", "NaN", 1e-4, 1e-6, "accuracy", "kn",
            {"what": "1/std, float32", "mean": 1e4}, number="value", reduce="largest"),
    _target("KNConv in bfloat16 at mean/std 10, error", "0.14", 3e-3, 3e-3, "accuracy", "kn",
            {"what": "output, bfloat16"}, number="value", reduce="largest"),
    _gpu("KN step, ResNet-50, batch 32-128, eager", "2.6-3.0", 0.95, 0.75, "step", _ANY_KN,
         _R50 | {"batch_size": (32, 128)}, "eager"),
    _gpu("KN step, ResNet-50, batch 32-128, CUDA graphs", "", 0.95, 0.75, "step", _ANY_KN,
         _R50 | {"batch_size": (32, 128)}, "graph"),
    _gpu("KN step, ResNet-50, batch 2-8, CUDA graphs", "", 0.85, 0.60, "step", _ANY_KN, _R50 | _SMALL, "graph"),
    _gpu("GN + ReLU, channels_last", "2", 1.0, 0.65, "norm", "gn", {}, "graph"),
)  # fmt: skip
"""Ratios to the BatchNorm of the same work in the same run, where nothing else is said."""


def judged(rows: Iterable[Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> list[Judged]:
    """Each target with what the rows say of it."""
    known = list(rows)
    return [_judge(target, known) for target in targets]


def _judge(target: Target, rows: Sequence[Mapping[str, Any]]) -> Judged:
    best: dict[tuple[str, ...], float] = {}
    for row in rows:
        if not target.takes(row):
            continue
        cell = (row["variant"], *(f"{name}={value}" for name, value in row["facts"].items()))
        value = row[target.number]
        best[cell] = min(value, best.get(cell, value))
    values = list(best.values())
    if not values:
        return Judged(target, None, None, None, 0)
    measured = max(values) if target.reduce == "largest" else statistics.geometric_mean(values)
    return Judged(target, measured, min(values), max(values), len(values))
