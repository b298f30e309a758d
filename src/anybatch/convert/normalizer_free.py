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
  or in the place of the branch's last BatchNorm or of an identity in front of the sum. What BatchNorm of weight w gives
  has variance ``mean w²``; the branch's last convolution is divided by the root of that, so that the branch has
  variance 1, and the number starts at what makes up for it. Of branches that end in a convolution, as pre-activated
  ones do, no variance is known: their number starts at ``1 / alpha``.

A BatchNorm that no convolution can take in becomes constants, `FrozenBatchNorm`: those in front of the activations of
pre-activated networks, where they stand for beta, channel by channel; those behind linear, transposed and depthwise
layers. Convolutions without BatchNorm behind keep their filters as constants do: Scaled WS with gain 1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
_DROPS = ("StochasticDepth", "DropPath")  # of several libraries


@dataclass(frozen=True)
class Sum:
    """Where a branch meets its skip connection."""

    name: str
    branch: fx.Node
    join: Join | None
    """The layer that adds, in a network of ours."""
    projected: bool
    """Whether the skip connection has filters."""


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
        place, end = _end(planner, graphs, at)
        name = at.name if place is None else planner.name(place)
        planner.plan.branches.setdefault(name, end if isinstance(end, str) else _scale(planner, at, place, *end))


def residual_sums(graphs: Graphs) -> Iterator[Sum]:
    """Sums of two tensors that have parted: one has passed filters since, the other those of one layer, or none."""
    for part, graph in graphs.parts.items():
        for node in graph.nodes:
            module = graphs.module(node)
            join = module if isinstance(module, Join) else None
            if (join is None and node.target not in _SUMS) or node.kwargs or len(node.args) != 2:
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


def _end(planner: Planner, graphs: Graphs, at: Sum) -> tuple[nn.Module | None, tuple[Any, nn.Module | None] | str]:
    """The layer in whose place a branch can be scaled, and its last convolution with the norm that this took in.

    None and why, where there is no such layer, or something stands between that does not scale along.
    """
    place: nn.Module | None = at.join
    if place is not None and type(place) is not Join:
        return None, f"{type(place).__name__} stays, which scales on its own"
    node: Any = at.branch
    swaps = planner.plan.swaps
    while isinstance(node, fx.Node) and len(node.users) == 1:
        module = graphs.module(node)
        if module is None or graphs.obstacle(module) is not None or id(module) in planner.excluded:
            break
        if is_batchnorm(module):
            conv = planner.plan.new.get(planner.name(module))
            if not isinstance(conv, StandardizedFilter) or not isinstance(swaps[id(module)], nn.Identity):
                break
            return place or module, (conv, module)
        if isinstance(conv := swaps.get(id(module)), StandardizedFilter):
            if place is None:
                return None, "it ends in a convolution that the network's own code adds to; its gains scale it"
            return place, (conv, None)
        if isinstance(module, nn.Identity):
            place = place or module
        elif not isinstance(module, nn.modules.dropout._DropoutNd) and type(module).__name__ not in _DROPS:
            break
        node = node.args[0] if node.args else None
    return None, "it does not end in a convolution of its own, with or without BatchNorm; nothing is inserted"


def _scale(planner: Planner, at: Sum, place: Any, conv: Any, norm: Any) -> str:
    """Divide a branch's last convolution, and multiply by as much in a layer behind it."""
    rule: Any = planner.target.scheme.residual
    alpha, learned = rule.keywords["alpha"], rule.keywords["skip_gain"] is not None
    weight = None if norm is None else norm.weight
    std = 1.0 if weight is None else wide(weight.detach()).square().mean().sqrt().item()
    factor = (std or 1.0) if learned else alpha
    gain = factor / alpha if learned else None
    absorb(conv, conv.gain.new_tensor(1 / factor), wide(conv.bias) / factor)
    if isinstance(place, Join):
        new: Any = NormalizerFreeJoin(alpha, 1.0, gain=gain, transition=at.projected)
        new.drop, new.post_activated = place.drop, True  # of what was trained no variance is expected
    else:
        new = BranchScale(alpha, gain)
    new.to(conv.weight.device, conv.weight.dtype).train(place.training)
    if gain is not None:
        nn.init.constant_(new.gain, gain)  # once more, in the digits of this dtype
    planner.plan.swaps[id(place)] = new
    number = f"alpha {alpha:g}" + ("" if gain is None else f" times {gain:.3g}, which learns")
    return number if norm is None else f"{number}; what the branch adds has variance {std**2:.2g}"
