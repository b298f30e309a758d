"""Which layers mix samples of a batch, which fail on small ones, and from which batch size statistics are steady."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anybatch.methods.common import widened
from anybatch.probe.layers import CONVS, Scope, layers, scope_of, values_of
from anybatch.probe.mixing import Watch, differ
from anybatch.probe.result import Cell, Finding, Result, Table, few, many
from anybatch.probe.subject import SEED, Subject, probing, seeing

Small = Literal["works", "fails", "erases"]
"""Of a layer on a batch of one: erases where any input gives the same output."""
STEADY = 0.1
"""Standard error of a mean, in standard deviations, from which statistics count as steady."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer does with a batch."""

    name: str
    kind: str
    scope: Scope | None
    """Over what a norm takes its statistics; None for what is no norm."""
    mixes_in_training: bool
    """Whether a sample's output changes with the other samples."""
    mixes_in_evaluation: bool
    seen: bool
    """Whether that was seen; False where the layer's rows are not the samples, and its kind told."""
    positions: int | None = None
    """Of the map that it took, H W for images."""
    values: int | None = None
    """From how many values one statistic is taken, at the batch size of the probe."""
    standard_error: float | None = None
    """Of the mean, in standard deviations: ``1 / sqrt(values)``, as if values were independent. Norms of batches."""
    measured_error: float | None = None
    """The same from how far the samples' means lie apart, since pixels of one image are not independent."""
    steady_from: int | None = None
    """The least batch whose mean errs by `STEADY` at most, by the larger of both errors. Norms of batches."""
    batch_of_one: Small | None = None
    """In training, on a map as it was seen. Norms."""
    single_position: Small | None = None
    """In training, of a batch of one with one position, as behind global pooling. Norms."""


@dataclass(frozen=True, kw_only=True)
class BatchDependence(Result):
    """What `batch_dependence` found."""

    title: ClassVar[str] = "Dependence on the batch"

    batch_size: int
    layers: tuple[Layer, ...]
    """Norms, and whatever else mixes samples, in the order in which they are called."""
    mixes_in_training: bool
    """Of the whole model: whether a sample's output changes with the other samples."""
    mixes_in_evaluation: bool
    fails_at_one: str | None
    """What the whole model raises in training on a batch of one; None where it works."""

    def table(self) -> Table:
        head = ("layer", "kind", "mixes samples", "values", "error", "measured", "steady from", "batch 1", "1 x 1 map")
        rows: list[tuple[Cell, ...]] = []
        for x in self.layers:
            where = {(True, True): "always", (True, False): "in training", (False, True): "in evaluation"}
            mixes = where.get((x.mixes_in_training, x.mixes_in_evaluation), "no")
            told = (x.values, x.standard_error, x.measured_error, x.steady_from, x.batch_of_one, x.single_position)
            rows.append((x.name, x.kind, mixes, *told))
        return Table(head, tuple(rows))


def batch_dependence(model: nn.Module, x: Any) -> BatchDependence:
    """Find out which layers make a sample's output depend on the other samples of its batch.

    It is seen, not guessed: each layer gets its own input again with all samples but the first exchanged, and the whole
    model a batch so changed. Layers whose rows are not the samples, such as those of a detector's heads, are judged by
    their kind. The model is run in training and evaluation without gradients, and is unchanged afterwards.

    Args:
        model: Any model that takes one tensor, or one of torchvision's detectors.
        x: (N, *), two samples or more, or a list of tensors of one shape.

    Raises:
        ValueError: If there are fewer than two samples, or the model does not take them.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    >>> print(batch_dependence(model, torch.randn(2, 3, 8, 8)).findings[0])
    [good] No layer mixes samples: a batch of any size gives each sample the same output.
    """
    with probing(model, x, least=2, whole=True) as subject, torch.no_grad():
        training, evaluation = Watch(subject, "training"), Watch(subject, "evaluation")
        mixing = training.run(), evaluation.run()
        fails = _fails_at_one(subject)
        found = _joined(subject, training, evaluation, _survey(subject))
    return BatchDependence(
        batch_size=len(subject.x),
        layers=found,
        mixes_in_training=mixing[0],
        mixes_in_evaluation=mixing[1],
        fails_at_one=fails,
        findings=tuple(_findings(found, mixing, fails, len(subject.x))),
    )


def _fails_at_one(subject: Subject) -> str | None:
    subject.set_mode("training")
    try:
        subject.run(subject.x[:1])
    except ValueError as error:
        return str(error)
    return None


def _small(module: nn.Module, x: Tensor) -> Small:
    """What a copy of a norm does in training with a batch of one."""
    outputs = []
    for seed in (0, 1):
        layer = copy.deepcopy(module)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            weight.fill_(1)  # a scale of 0 would look like an erased input
        layer.train()
        made = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.manual_seed(SEED)
        try:
            outputs.append(layer.forward(made.to(x.device, x.dtype)))
        except (ValueError, RuntimeError):
            return "fails"
    one, other = outputs
    return "works" if not isinstance(one, Tensor) or differ([one], [other]) else "erases"


@dataclass(frozen=True)
class _Taken:
    """What a norm took, of all samples, when it was called first."""

    like: Tensor
    """Of its shape, dtype and device."""
    spread: float
    """The root mean square over channels of how far samples' means lie apart, in the channel's deviations."""


def _survey(subject: Subject) -> dict[str, _Taken]:
    taken: dict[str, _Taken] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if name not in taken and args and isinstance(args[0], Tensor) and args[0].numel():
            x = args[0]
            taken[name] = _Taken(
                x.new_empty(()).expand(x.shape), _spread(x) if scope_of(module) == "batch" else math.nan
            )

    names = [name for name, module in layers(subject.model) if scope_of(module) not in (None, "nothing")]
    subject.set_mode("training")
    torch.manual_seed(SEED)
    with seeing(subject.model, names, lambda *_: None, before=before):
        subject.run(subject.x)
    return taken


def _spread(x: Tensor) -> float:
    if x.dim() < 2 or len(x) < 2:
        return math.nan
    wide = widened(x).flatten(2) if x.dim() > 2 else widened(x).unsqueeze(2)
    within, means = torch.var_mean(wide, 2, correction=0)
    between = means.double().var(0, correction=0)
    total = between + within.double().mean(0)
    known = total > 1e-12 * total.max()
    unbiased = len(x) / (len(x) - 1)
    return float((unbiased * between[known] / total[known]).mean().sqrt()) if known.any() else math.nan


def _joined(subject: Subject, training: Watch, evaluation: Watch, taken: dict[str, _Taken]) -> tuple[Layer, ...]:
    found = []
    for name in dict.fromkeys([*training.mixing, *evaluation.mixing]):
        module = subject.model.get_submodule(name)
        scope = scope_of(module)
        mixes = [watch.mixing.get(name, False) for watch in (training, evaluation)]
        seen = None not in mixes
        if not seen:
            by_kind = scope == "batch"
            tracks = getattr(module, "running_mean", True) is not None
            mixes = [by_kind, by_kind and not tracks]
        if scope is None and not any(mixes):
            continue
        facts = _facts(module, taken[name], scope) if name in taken and scope is not None else {}
        found.append(
            Layer(
                name=name or "(the model itself)",
                kind=type(module).__name__,
                scope=scope,
                mixes_in_training=bool(mixes[0]),
                mixes_in_evaluation=bool(mixes[1]),
                seen=seen,
                **facts,
            )
        )
    return tuple(found)


def _facts(module: nn.Module, taken: _Taken, scope: Scope) -> dict[str, Any]:
    x, spread = taken.like, taken.spread
    # Behind the channels; layers of one position have theirs last.
    last = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and "2d" not in type(module).__name__
    positions = math.prod(x.shape[1:-1] if last else x.shape[2:])
    one = x.shape[-1:] if last else x.shape[1:2]
    single = (1, *(1 for _ in x.shape[1:-1]), *one) if last else (1, *one, *(1 for _ in x.shape[2:]))
    facts: dict[str, Any] = {"positions": positions, "values": values_of(module, x)}
    facts["batch_of_one"] = _small(module, x[:1])
    if not isinstance(module, CONVS):  # of which most take no map that is smaller than their window
        facts["single_position"] = _small(module, x.new_empty(single))
    if scope == "batch":
        rows = max(len(x), 1)
        facts["standard_error"] = (rows * positions) ** -0.5
        by_count = math.ceil(1 / (STEADY**2 * positions))
        facts["steady_from"] = max(by_count, 1)
        if math.isfinite(spread):
            facts["measured_error"] = spread / rows**0.5
            facts["steady_from"] = max(by_count, math.ceil(spread**2 / STEADY**2 - 1e-9), 1)
    return facts


def _findings(found: tuple[Layer, ...], mixing: tuple[bool, bool], fails: str | None, n: int) -> list[Finding]:
    told: list[Finding] = []
    training = [x for x in found if x.mixes_in_training]
    batch = [x for x in training if x.scope == "batch"]
    if not any(mixing) and not training:
        told.append(Finding("good", "No layer mixes samples: a batch of any size gives each sample the same output."))
    elif training:
        kinds = ", ".join(sorted({x.kind for x in training}))
        told.append(
            Finding(
                "warning",
                f"{many(len(training), 'layer')} ({kinds}) mix samples in training: what a sample gives, and its "
                f"gradient, depends on the others in its batch, and changes with the batch size.",
                _remedy(batch),
            )
        )
    evaluation = [x for x in found if x.mixes_in_evaluation]
    if evaluation or (mixing[1] and not mixing[0]):
        told.append(
            Finding(
                "fault",
                f"{few([x.name for x in evaluation]) or 'the model'} mix samples in evaluation too: predictions depend "
                f"on what else is in the batch.",
                "build these layers with track_running_stats=True, or exchange them for a norm of single samples.",
            )
        )
    if mixing[0] and not training:
        told.append(
            Finding(
                "warning",
                "The model mixes samples in training, in code that no module shows.",
                "look for means or norms over dim 0 in its forward.",
            )
        )
    if fails is not None:
        told.append(
            Finding(
                "fault",
                f"Training fails on a batch of one: {fails}.",
                "drop the last incomplete batch, or take norms of single samples.",
            )
        )
    worst = max(batch, key=lambda x: x.steady_from or 0, default=None)
    noisy = [x for x in batch if max(x.standard_error or 0, x.measured_error or 0) > STEADY]
    if noisy and worst is not None:
        told.append(
            Finding(
                "warning",
                f"At a batch of {n} the statistics of {many(len(noisy), 'layer')} err by more than {STEADY} standard "
                f"deviations; the noisiest, {worst.name}, is steady from a batch of {worst.steady_from}.",
                f"train with {worst.steady_from} samples a device, join devices (SyncBatchNorm), or exchange the norm.",
            )
        )
    elif batch and worst is not None:
        told.append(
            Finding(
                "good", f"At a batch of {n} the statistics of all norms err by {STEADY} standard deviations or less."
            )
        )
    told += _small_findings(found)
    unseen = [x for x in found if not x.seen]
    if unseen:
        told.append(
            Finding(
                "note",
                f"{few([x.name for x in unseen])}: rows are not samples; the layer's kind told whether it mixes them.",
            )
        )
    return told


def _remedy(batch: list[Layer]) -> str:
    if not batch:
        return "look for means or norms over dim 0 in the forward of these modules."
    return "at small batches take a norm of single samples, such as scheme ws+gn, or freeze it: anybatch.convert."


def _small_findings(found: tuple[Layer, ...]) -> list[Finding]:
    told = []
    remedy = "keep more than one position there, or take a norm with several channels in a group."
    says: dict[Small, str] = {"fails": "cannot be trained on", "erases": "give the same output for any input on"}
    for small, what in says.items():
        if names := [x.name for x in found if x.batch_of_one == small]:
            told.append(Finding("fault", f"{many(len(names), 'norm')} {what} a batch of one ({few(names)}).", remedy))
        if names := [x.name for x in found if x.single_position == small and x.positions != 1]:
            what_then = "training would fail" if small == "fails" else "they would erase their input"
            told.append(
                Finding(
                    "note",
                    f"{many(len(names), 'norm')} ({few(names)}) could not take a batch of one with a map of 1 x 1, as "
                    f"of small images: {what_then}.",
                    remedy,
                )
            )
    return told
