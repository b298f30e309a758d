"""Scale and shift of new norms fitted to what BatchNorm gave, forward only, and the number of groups chosen by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from anybatch.convert.batches import Batch, outputs
from anybatch.convert.kinds import evaluated, wide
from anybatch.convert.normalizer_free import move_scale, told
from anybatch.convert.offsets import Moments, add_offsets, can_have
from anybatch.convert.plan import Fitted, Plan
from anybatch.convert.target import absorb
from anybatch.methods.common import widened
from anybatch.methods.filters import StandardizedFilter

Tell = Callable[[int, int], object]
"""Called with what is done and what there is to do."""

_APART = 1.4  # of numbers of groups that are tried, one over the next


class _Reached(Exception):  # noqa: N818 (no error)
    """A forward pass has come as far as it needs to."""


@contextmanager
def _seen(layers: Iterable[Any], see: Callable[[Any, Any], object], *, behind: bool = False) -> Iterator[None]:
    """Within this context what layers take is seen before they do, or what they give behind them."""
    if behind:
        handles = [layer.register_forward_hook(lambda m, _, y: see(m, y)) for layer in layers]
    else:
        handles = [layer.register_forward_pre_hook(lambda m, args: see(m, args[0])) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call_order(model: nn.Module, layers: Iterable[nn.Module], batch: Batch) -> dict[int, int]:
    """How often a network calls each of some layers, by their ids, in the order of their first calls."""
    counts: dict[int, int] = {}

    def see(layer: nn.Module, _: Tensor) -> None:
        counts[id(layer)] = counts.get(id(layer), 0) + 1

    with _seen(layers, see), torch.no_grad():
        model(batch)
    return counts


def taken_by(layer: nn.Module, model: nn.Module, batch: Batch, calls: int) -> list[Tensor]:
    """What a layer takes in a pass, which ends there."""
    found: list[Tensor] = []

    def see(_: nn.Module, x: Tensor) -> None:
        found.append(x.clone() if calls > 1 else x)  # what follows may overwrite it
        if len(found) == calls:
            raise _Reached

    try:
        with _seen([layer], see), torch.no_grad():
            model(batch)
    except _Reached:
        pass
    return found


class Sums:
    """Sums over samples and positions of two maps' channels z and t, their squares and products, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | float = 0.0

    def add(self, z: Tensor, t: Tensor) -> None:
        """Let in two maps (N, C, *) of the same shape."""
        z, t = widened(z), widened(t)
        over = (0, *range(2, z.dim()))
        self.count += z.numel() // z.shape[1]
        terms = (z, t, z.square(), t.square(), z * t)
        if z.device.type == "mps":  # which has no float64
            terms = tuple(term.cpu() for term in terms)
        self.sums = self.sums + torch.stack([term.sum(over, dtype=torch.float64) for term in terms])

    def variance(self) -> float:
        """Of z, on average of its channels."""
        z, _, zz, *_ = self.sums / self.count  # pyright: ignore[reportGeneralTypeIssues]
        return (zz - z * z).clamp_min(0).mean().item()

    def fit(self, scales: int) -> tuple[Tensor, Tensor, float]:
        """Least squares of t by ``scale * z + shift``, for each channel or for groups of as many channels.

        Args:
            scales: Number of scales, a divisor of C.

        Returns:
            Scale and shift, (scales,), and the share of the variance of t that is left. A channel of constant z, which
            tells nothing of the scale, keeps scale 1.
        """
        assert isinstance(self.sums, Tensor)
        each = self.sums.shape[1] // scales
        z, t, zz, tt, zt = self.sums.unflatten(1, (scales, each)).sum(2) / (self.count * each)
        var_z, var_t, cov = (zz - z * z).clamp_min(0), (tt - t * t).clamp_min(0), zt - z * t
        known = var_z > 1e-12 * zz.clamp_min(torch.finfo(zz.dtype).tiny)
        scale = torch.where(known, cov / var_z.where(known, torch.ones_like(var_z)), 1.0)
        rest = (var_t - torch.where(known, scale * cov, 0.0)).clamp_min(0)
        return scale, t - scale * z, (rest.sum() / var_t.sum().clamp_min(torch.finfo(zz.dtype).tiny)).item()


def _bare_state(layer: Any) -> dict[str, Tensor]:
    """Parameters with which a layer neither scales nor shifts nor cuts off; a convolution keeps its filters."""
    state = {"bias": torch.zeros_like(layer.bias)}
    if not isinstance(layer, nn.modules.conv._ConvNd):
        state["weight"] = torch.ones_like(layer.weight)
    if isinstance(tau := getattr(layer, "tau", None), Tensor):
        state["tau"] = torch.full_like(tau, -torch.inf)
    return state


def group_numbers(channels: int) -> list[int]:
    """Divisors that leave two channels or more in each group, a factor apart."""
    found: list[int] = []
    for number in range(1, channels // 2 + 1):
        if channels % number == 0 and (not found or number >= _APART * found[-1]):
            found.append(number)
    return found or [1]


@torch.no_grad()
def fit_norms(
    old: nn.Module,
    new: nn.Module,
    fitted: dict[str, Fitted],
    batches: list[Batch],
    *,
    choose: bool,
    offset: float = 0.0,
    tell: Tell | None = None,
) -> dict[str, float]:
    """Fit the new layers one after another, each on what it takes behind those that are fitted already.

    The target is what the old BatchNorm in the same place gives in evaluation. Passes end at the layer, so that a
    network of L norms takes about L passes over the images, in both networks together, and 2 L with ``offset``.

    Args:
        old: The network with BatchNorm, in evaluation.
        new: The converted one, in evaluation.
        fitted: What to fit, by name; ``old`` layers are those of the old network.
        batches: Images.
        choose: Whether to choose numbers of groups.
        offset: Size of the constants in front of norms, in standard deviations; see `anybatch.convert.offsets`.
        tell: Progress.

    Returns:
        The share of each target's variance that is left.

    Raises:
        ValueError: If a layer takes values that are not finite, or the networks call layers in different ways.
    """
    names = {id(what.old): name for name, what in fitted.items()}
    calls = call_order(old, [what.old for what in fitted.values()], batches[0])
    left: dict[str, float] = {}
    if tell is not None:
        tell(0, len(calls))
    for done, (key, times) in enumerate(calls.items(), 1):
        name = names[key]
        what, pairs = fitted[name], _Pairs(old, new, name, fitted[name], times, batches)
        layer: Any = what.layer
        moments = Moments() if offset and times == 1 and what.feeder is not None else None
        fit = _best(what, pairs, _choices(layer) if choose else [], moments)
        if moments is not None and can_have(layer):
            fit = _with_offsets(what, pairs, fit, moments, offset)
        if isinstance(layer, nn.modules.conv._ConvNd):
            absorb(layer, fit.scale, fit.shift)
        else:
            layer.weight.copy_(fit.scale)
            layer.bias.copy_(fit.shift)
        left[name] = fit.left
        if tell is not None:
            tell(done, len(calls))
    return left


@torch.no_grad()
def measure_branches(model: nn.Module, plan: Plan, batches: list[Batch]) -> None:
    """Give branches that end in a convolution variance 1 too, on average of their channels, on some images.

    Args:
        model: The converted network, in evaluation.
        plan: Whose ``unmeasured`` branches these are.
        batches: Images.
    """
    sums = {id(conv): Sums() for conv, _ in plan.unmeasured.values()}
    if sums:
        convs = [conv for conv, _ in plan.unmeasured.values()]
        with _seen(convs, lambda conv, y: sums[id(conv)].add(y, y), behind=True):
            for batch in batches:
                model(batch)
    for name, (conv, scale) in plan.unmeasured.items():
        if not sums[id(conv)].count:
            continue  # these images do not come there
        variance = sums[id(conv)].variance()
        if not math.isfinite(variance):
            raise ValueError(f"the branch that ends in {name!r} gives values that are not finite, or too large")
        move_scale(conv, scale, math.sqrt(variance) or 1.0)
        plan.branches[name] = told(scale, variance)


class Fit(NamedTuple):
    """Least squares of a layer's output."""

    scale: Tensor
    shift: Tensor
    left: float
    """The share of the target's variance that is left."""


@dataclass(frozen=True)
class _Pairs:
    """What a layer takes, and what BatchNorm gave there."""

    old: nn.Module
    new: nn.Module
    name: str
    what: Fitted
    times: int
    batches: list[Batch]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            theirs = taken_by(self.what.old, self.old, batch, self.times)
            ours = taken_by(self.what.layer, self.new, batch, self.times)
            if len(theirs) != len(ours):
                raise ValueError(
                    f"layer {self.name!r} is called {len(theirs)} times in one network, {len(ours)} in the other"
                )
            for x, u in zip(ours, theirs, strict=True):
                t = evaluated(self.what.old, u)
                yield x, t.relu() if self.what.activated else t


def _best(what: Fitted, pairs: _Pairs, numbers: list[int], moments: Moments | None = None) -> Fit:
    """The fit of the layer, with the number of groups of which least is left, and moments of what it takes."""
    layer: Any = what.layer
    tried = {number: Sums() for number in numbers or [0]}
    for x, t in pairs:
        for number, sums in tried.items():
            sums.add(_plain(layer, x, number), t)
        if moments is not None:
            moments.add(x)
    fits = {number: Fit(*sums.fit(layer.bias.numel())) for number, sums in tried.items()}
    best = min(fits, key=lambda number: fits[number].left)
    fit = fits[best]
    if not (fit.scale.isfinite().all() and fit.shift.isfinite().all()):
        raise ValueError(f"layer {pairs.name!r} takes values that are not finite, or too large to calibrate on")
    if best:
        layer.num_groups = best
    return fit


def _with_offsets(what: Fitted, pairs: _Pairs, fit: Fit, moments: Moments, offset: float) -> Fit:
    """The fit with constants in front of the norm, which are taken back where they do not serve."""
    conv: Any = what.feeder
    weight: Tensor = conv.weight.clone()
    own = conv.bias
    bias = None if own is None else own.clone()
    add_offsets(conv, what.layer.num_groups, moments, offset)  # pyright: ignore[reportArgumentType]
    better = _best(what, pairs, [])
    if better.left < fit.left:
        what.offset = offset
        return better
    conv.weight.copy_(weight)
    if isinstance(conv, StandardizedFilter):
        conv.restore_filters()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    if own is not None and bias is not None:
        own.copy_(bias)
    conv.bias = own
    return fit


def _choices(layer: Any) -> list[int]:
    """Numbers of groups to try; none where the layer's scales are those of its groups, or it has no groups."""
    if getattr(layer, "num_groups", 1) == 1 or layer.weight.numel() != layer.num_channels:
        return []
    return group_numbers(layer.num_channels)


def _plain(layer: Any, x: Tensor, groups: int) -> Tensor:
    before = getattr(layer, "num_groups", 0)
    try:
        if groups:
            layer.num_groups = groups
        return functional_call(layer, _bare_state(layer), (x,))
    finally:
        if groups:
            layer.num_groups = before


@torch.no_grad()
def drift(old: nn.Module, new: nn.Module, batches: list[Batch], *, tell: Tell | None = None) -> float | None:
    """Norm of the change of the output over the norm of the output; None where outputs differ in their shapes."""
    change = size = 0.0
    for done, batch in enumerate(batches, 1):
        before, after = outputs(old(batch)), outputs(new(batch))
        if [t.shape for t in before] != [t.shape for t in after]:
            return None  # as detectors, which find other boxes
        for t, y in zip(before, after, strict=True):
            change += (wide(y) - wide(t)).square().sum().item()
            size += wide(t).square().sum().item()
        if tell is not None:
            tell(done, len(batches))
    return (change / size) ** 0.5 if size else None
