"""How far channel statistics are from those of batch normalization, and which units are off or always on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anybatch.probe.layers import CONVS, has_channel_affine, layers
from anybatch.probe.result import Cell, Finding, Result, Table, few, many
from anybatch.probe.subject import probing, seeing, still

DEAD, LINEAR = 0.01, 0.99
"""Shares of values above 0, below and above which a unit counts as dead, and as always on."""
FAR = 0.5
"""A distance from batch normalization's statistics from which it is told."""
MANY = 0.05
"""A share of dead units from which it is told."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Channel statistics over all samples and positions, in front of the layer's scale and shift."""

    name: str
    kind: str
    measured: Literal["norm", "convolution"]
    """What a norm gives, or in networks without norms what convolutions give, over its root mean square."""
    means: tuple[float, ...]
    """Of each channel, m."""
    deviations: tuple[float, ...]
    """Of each channel, s."""
    spread: float
    """Standard deviation over channels of m: 0 for batch normalization."""
    distance: float
    """Mean over channels of ``|s - 1|``: 0 for batch normalization."""
    dead: float
    """Share of channels of which less than 1 % of the values are above 0, behind scale and shift."""
    linear: float
    """Share of channels of which more than 99 % are."""


@dataclass(frozen=True, kw_only=True)
class EliminationSingularities(Result):
    """What `elimination_singularities` found."""

    title: ClassVar[str] = "Elimination singularities"

    layers: tuple[Layer, ...]

    def table(self) -> Table:
        head = ("layer", "kind", "spread of means", "distance of deviations", "dead", "always on")
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (x.name, x.kind, x.spread, x.distance, x.dead, x.linear) for x in self.layers
        )
        return Table(head, rows)


def elimination_singularities(model: nn.Module, x: Any) -> EliminationSingularities:
    """Measure how near units are to being off for all inputs, where they stop to learn.

    Batch normalization gives each channel mean 0 and deviation 1 over the data, so that a unit behind it can die by its
    own scale and shift alone. Norms of single samples bind only the mean over a group, so that one channel may lie far
    below 0 for every sample. For each norm this tells the channels' statistics without scale and shift, and the share
    of units that a ReLU behind it would leave off, or on, for nearly all values. In networks without norms it tells the
    same of convolutions, relative to the root mean square of what the layer gives. The model is in training, but for
    layers that draw random numbers, and is unchanged afterwards. Of torchvision's detectors the backbone is probed.

    Args:
        model: Any model that takes one tensor, or one of torchvision's detectors.
        x: (N, *), as many samples as memory allows, best of real data.

    Raises:
        ValueError: If the model has neither norms of channels nor convolutions, or does not take the samples.

    Source:
        Qiao et al. 2019, arXiv:1911.09738, section 3; the statistics are ours, in its spirit.
    """
    with probing(model, x) as subject, torch.no_grad():
        still(subject, subject.x)
        known = dict(layers(subject.model))
        names = [name for name, m in known.items() if has_channel_affine(m)]
        measured: Literal["norm", "convolution"] = "norm" if names else "convolution"
        names = names or [name for name, m in known.items() if isinstance(m, CONVS)]
        if not names:
            raise ValueError(f"{type(model).__name__} has neither norms of channels nor convolutions to look at")
        found: dict[str, Layer] = {}
        taken: dict[str, tuple[Any, ...]] = {}
        buffers: dict[str, list[Tensor]] = {}

        def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            taken[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            buffers[name] = [b.clone() for b in module.buffers()]

        def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = taken.pop(name)
            if name not in found and isinstance(output, Tensor) and output.dim() > 1 and output.numel():
                made = _plain(module, given, buffers.pop(name))
                found[name] = _layer(name, module, measured, made, output)

        with seeing(subject.model, names, see, before=before):
            subject.run(subject.x)
    return EliminationSingularities(layers=tuple(found.values()), findings=tuple(_findings(list(found.values()))))


def _plain(module: nn.Module, args: tuple[Any, ...], buffers: list[Tensor]) -> Tensor:
    """What the layer gives without scale, shift and activation, and from the statistics that it started from."""
    now = [b.clone() for b in module.buffers()]
    kept, acts = getattr(module, "activation", None), dict(module.named_children())
    parameters = {} if isinstance(module, CONVS) else dict(module.named_parameters())
    plain = {name: torch.full_like(p, float(name.endswith("weight"))) for name, p in parameters.items()}
    try:
        for b, value in zip(module.buffers(), buffers, strict=True):
            b.copy_(value)
        if kept is not None:
            setattr(module, "activation", "none")  # noqa: B010 (a plain attribute, which types of modules do not know)
        for name, child in acts.items():  # timm's norms hold their activation
            if not any(True for _ in (*child.parameters(), *child.buffers())):
                setattr(module, name, nn.Identity())
        values = {name: p.clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(plain[name])
        made = module.forward(*args)
        for name, p in parameters.items():
            p.copy_(values[name])
    finally:
        for name, child in acts.items():
            setattr(module, name, child)
        if kept is not None:
            setattr(module, "activation", kept)  # noqa: B010
        for b, value in zip(module.buffers(), now, strict=True):
            b.copy_(value)
    return made


def _layer(
    name: str, module: nn.Module, measured: Literal["norm", "convolution"], made: Tensor, output: Tensor
) -> Layer:
    values = made.double().transpose(0, 1).flatten(1)
    if measured == "convolution":
        values = values / values.square().mean().sqrt().clamp_min(1e-300)
    var, mean = torch.var_mean(values, 1, correction=0)
    on = (output > 0).double().transpose(0, 1).flatten(1).mean(1)
    weight = getattr(module, "weight", None)
    if measured == "norm" and isinstance(weight, Tensor) and len(weight) == len(on):
        on = on[weight != 0]  # a scale of 0 is a branch that starts as nothing, and not a dead unit
    std = var.sqrt()
    return Layer(
        name=name,
        kind=type(module).__name__,
        measured=measured,
        means=tuple(mean.tolist()),
        deviations=tuple(std.tolist()),
        spread=float(mean.std(correction=0)),
        distance=float((std - 1).abs().mean()),
        dead=float((on < DEAD).double().mean()) if len(on) else 0.0,
        linear=float((on > LINEAR).double().mean()) if len(on) else 0.0,
    )


def _findings(found: list[Layer]) -> list[Finding]:
    told = []
    broken = [x.name for x in found if not math.isfinite(x.spread + x.distance)]
    if broken:
        fix = "start from weights and inputs that are finite."
        return [Finding("fault", f"{few(broken)} give values that are not finite.", fix)]
    dead = [x for x in found if x.dead >= MANY]
    worst = max(found, key=lambda x: x.dead)
    if dead:
        told.append(
            Finding(
                "warning",
                f"In {many(len(dead), 'layer')} {100 * MANY:.0f} % of the units or more are off for nearly all values, "
                f"most in {worst.name} ({100 * worst.dead:.0f} %): a ReLU behind them lets no gradient through.",
                "take ws+gn, or ws+bcn, which keep channels near mean 0 and deviation 1, or a smaller learning rate.",
            )
        )
    else:
        told.append(
            Finding("good", f"Units that are off for nearly all values: at most {100 * worst.dead:.1f} % in a layer.")
        )
    linear = [x for x in found if x.linear >= MANY]
    if linear:
        most = max(linear, key=lambda x: x.linear)
        told.append(
            Finding(
                "note",
                f"In {many(len(linear), 'layer')} {100 * MANY:.0f} % of the units or more are always on, where ReLU is "
                f"linear, most in {most.name} ({100 * most.linear:.0f} %).",
            )
        )
    far = [x for x in found if x.measured == "norm" and max(x.spread, x.distance) > FAR]
    most = max(found, key=lambda x: max(x.spread, x.distance))
    if far:
        told.append(
            Finding(
                "warning",
                f"Channels of {many(len(far), 'norm')} are far from the mean 0 and deviation 1 of batch normalization, "
                f"most in {most.name} (means spread by {most.spread:.2g}, deviations off by "
                f"{most.distance:.2g}).",
                "standardize the filters (ws), or add a batch part with estimated statistics (ws+bcn).",
            )
        )
    elif most.measured == "norm":
        told.append(
            Finding(
                "good",
                f"Channels keep near mean 0 and deviation 1: means spread by {most.spread:.2g} and deviations are off "
                f"by {most.distance:.2g} at most.",
            )
        )
    return told
