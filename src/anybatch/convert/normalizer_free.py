"""A BatchNorm residual network made normalizer-free, with the function that it has in evaluation.

What is inserted:

- **Scaled Weight Standardization.** A convolution takes in the BatchNorm that it feeds. It multiplies with ``gain *
  (weight_gamma * W' + weight_beta)``, W' its standardized filter. The gain is BatchNorm's weight, and goes on learning,
  as do filter and bias. The other two are constants, of which ``weight_beta`` is what standardizing takes of a filter's
  mean.
- **Activation gains and 1 / beta.** Both are in ``weight_gamma``, since a convolution of ``gamma * act(h) / beta`` is
  one with filters times ``gamma / beta``; so skip connections do not meet them, and activations stay what they are. No
  nominal values are taken: BatchNorm's running variance tells, filter by filter, what gives the output variance 1 at
  gain 1.
- **alpha and the learnable number.** Each branch ends in ``alpha * gain * branch``: in the join of a network of ours,
  or in the place of the branch's last BatchNorm or of an identity in front of the sum. The branch's last convolution is
  divided so that the branch has variance 1, and the number starts at what makes up for it. What BatchNorm of weight w
  gives has variance ``mean w²``; of branches that end in a convolution, as pre-activated ones do, ``calibrate=`` tells
  it, and without that their number starts at ``1 / alpha``.

A BatchNorm that no convolution can take in becomes constants, `FrozenBatchNorm`: those in front of the activations of
pre-activated networks, where they stand for beta, channel by channel; those behind linear, transposed and depthwise
layers. Convolutions that feed no BatchNorm become Scaled WS too, at gain 1, where a norm comes before other filters.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from anybatch.convert.graph import Graphs
from anybatch.convert.kinds import is_batchnorm, wide
from anybatch.convert.target import absorb
from anybatch.methods.filters import StandardizedFilter
from anybatch.methods.normalizer_free import BranchScale, NormalizerFreeJoin
from anybatch.methods.residual import Join

if TYPE_CHECKING:
    from anybatch.convert.plan import Planner

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_DROPS = ("StochasticDepth", "DropPath", "stochastic_depth")  # of several libraries


@dataclass(frozen=True)
class Sum:
    """Where a branch meets its skip connection."""

    name: str
    branch: fx.Node
    join: Join | None
    """The layer that adds, in a network of ours."""
    projected: bool
    """Whether the skip connection has filters."""


class End(NamedTuple):
    """Where a branch can be scaled."""

    place: nn.Module
    """The layer in whose place."""
    conv: Any
    """The convolution that the branch ends in, if it can be divided by as much."""
    norm: nn.Module | None
    """The BatchNorm that this took in."""


def scale_branches(planner: Planner) -> None:
    """Plan a scale for each residual branch.

    Raises:
        ValueError: If no trace of the network shows a residual sum.
    """
    # Traces in training, where there are any, show what heads add; they show the same branches again.
    graphs, found = next(((g, sums) for g in planner.graphs if (sums := list(residual_sums(g)))), (None, []))
    if graphs is None:
        untraced = [
            f"{name or 'the model'}: {why}" for graphs in planner.graphs for name, why in graphs.untraced.items()
        ]
        raise ValueError(
            f"to={planner.target.scheme.name!r} is for residual networks, and no sum of a branch and a skip connection "
            f"was found{f' (no trace of {untraced[0]})' if untraced else ''}; take 'sws', or 'frozen'"
        )
    for at in found:
        end = _end(planner, graphs, at)
        if isinstance(end, End):
            _scale(planner, at, end)
        else:
            planner.plan.branches[at.name] = end


def residual_sums(graphs: Graphs) -> Iterator[Sum]:
    """Sums of two tensors that have parted: one has passed filters since, the other those of one layer, or none."""
    for part, graph in graphs.parts.items():
        for node in graph.nodes:
            module = graphs.module(node)
            join = module if isinstance(module, Join) else None
            adds = node.op in ("call_function", "call_method") and node.target in _SUMS
            if not (adds or join is not None) or node.kwargs or len(node.args) != 2:
                continue
            pair = [arg for arg in node.args if isinstance(arg, fx.Node)]
            if len(pair) != 2:
                continue
            name = f"{part}.{node.name}" if part else node.name
            first, second = (_before(arg) for arg in pair)
            passed = [_filters(graphs, own - other) for own, other in ((first, second), (second, first))]
            if join is not None:
                yield Sum(name, pair[0], join, passed[1] > 0)
            elif first & second and min(passed) <= 1 and passed[0] != passed[1]:
                yield Sum(name, pair[passed[0] < passed[1]], None, min(passed) > 0)


def _before(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made of."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        if (at := waiting.pop()) not in found:
            found.add(at)
            waiting += at.all_input_nodes
    return found


def _filters(graphs: Graphs, nodes: set[fx.Node]) -> int:
    modules = [graphs.module(node) for node in nodes]
    return sum(module is not None and any(p.dim() > 1 for p in module.parameters()) for module in modules)


def _end(planner: Planner, graphs: Graphs, at: Sum) -> End | str:
    """Where a branch can be scaled, or why it cannot."""
    place: Any = at.join
    if place is not None and (type(place) is not Join or id(place) in planner.excluded):
        return f"its {type(place).__name__} stays, which is excluded or scales on its own"
    node: Any = at.branch
    swaps = planner.plan.swaps
    while isinstance(node, fx.Node) and len(node.users) == 1:
        module = graphs.module(node)
        if module is None and getattr(node.target, "__name__", "") in _DROPS:
            node = node.args[0]
            continue
        if module is None or graphs.obstacle(module) is not None or id(module) in planner.excluded:
            break
        if is_batchnorm(module):
            conv = planner.plan.new.get(planner.name(module))
            if not isinstance(conv, StandardizedFilter) or not isinstance(swaps[id(module)], nn.Identity):
                break
            return End(place or module, conv, module)
        if isinstance(conv := swaps.get(id(module)), StandardizedFilter):
            if place is None:
                return "it ends in a convolution that the network's own code adds to; its gains scale it"
            return End(place, conv, None)
        if isinstance(module, nn.Identity):
            place = place or module
        elif not isinstance(module, nn.modules.dropout._DropoutNd) and type(module).__name__ not in _DROPS:
            break
        node = node.args[0] if node.args else None
    if place is None:
        return "it does not end in a convolution that was standardized; nothing is inserted"
    return End(place, None, None)


def _scale(planner: Planner, at: Sum, end: End) -> None:
    """Divide a branch's last convolution, and multiply by as much in a layer behind it."""
    rule: Any = planner.target.scheme.residual
    alpha, learned = rule.keywords["alpha"], rule.keywords["skip_gain"] is not None
    plan, name = planner.plan, planner.name(end.place)
    if not learned and end.conv is None:
        plan.branches[name] = f"nothing, since no convolution ends it that could be divided by alpha {alpha:g}"
        return
    variance = None
    if end.norm is not None:
        weight: Any = end.norm.weight
        variance = 1.0 if weight is None else wide(weight.detach()).square().mean().item()
    factor = (math.sqrt(variance or 1.0)) if learned else alpha
    if isinstance(end.place, Join):
        new: Any = NormalizerFreeJoin(alpha, 1.0, gain=1.0 if learned else None, transition=at.projected)
        new.drop, new.post_activated = end.place.drop, True  # of what was trained no variance is expected
    else:
        new = BranchScale(alpha, 1.0 if learned else None)
    plan.swaps[id(end.place)] = new.to(planner.like.device, planner.like.dtype).train(end.place.training)
    if learned:
        nn.init.constant_(new.gain, 1 / alpha)
    if end.conv is not None:
        new.requires_grad_(end.conv.gain.requires_grad)
        move_scale(end.conv, new, factor)
    if learned and variance is None and end.conv is not None:
        plan.unmeasured[name] = (end.conv, new)
    plan.branches[name] = told(new, variance)


@torch.no_grad()
def move_scale(conv: Any, scale: Any, factor: float) -> None:
    """Divide a convolution, and multiply the number behind it, where there is one."""
    absorb(conv, conv.gain.new_tensor(1 / factor), wide(conv.bias) / factor)
    if scale.gain is not None:
        scale.gain.mul_(factor)


def told(scale: Any, variance: float | None) -> str:
    """What the report says of a branch."""
    number = f"alpha {scale.alpha:g}" + ("" if scale.gain is None else f" times {scale.gain.item():.3g}, which learns")
    return number if variance is None else f"{number}; what the branch adds has variance {variance:.2g}"
