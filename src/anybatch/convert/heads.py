"""Layers behind the last new norm, fitted in closed form to what they gave in the old network."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.convert.batches import Batch
from anybatch.convert.calibrate import call_order, taken_by
from anybatch.convert.kinds import changed, wide

_RIDGES = (1.0, 0.1, 0.01, 0.001)
"""Weights of the old values, over the mean square of an input; the best on images held out is taken, or none."""
_MOST = 4096
"""Inputs of a layer; its normal equations are as large."""


def heads(model: nn.Module, norms: list[nn.Module], batch: Batch) -> list[str]:
    """Linear layers and convolutions of one position that a network calls once, and behind its last norm."""
    tied = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {
        module: name
        for name, module in model.named_modules()
        if _solvable(module) and all(tied[id(p)] == 1 for p in module.parameters())
    }
    calls = call_order(model, [*norms, *layers], batch)
    order = list(calls)
    last = max(order.index(id(norm)) for norm in norms if id(norm) in calls)
    return [name for layer, name in layers.items() if calls.get(id(layer)) == 1 and order.index(id(layer)) > last]


def _solvable(module: Any) -> bool:
    conv = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1
    pointwise = conv and {*module.kernel_size, *module.stride} == {1}
    if not (type(module) is nn.Linear or pointwise) or changed(module):
        return False
    return module.bias is not None and module.weight[0].numel() <= _MOST


class _Equations:
    """Normal equations of the change of weight and bias that takes what a layer gives to what it gave."""

    def __init__(self) -> None:
        self.left: Tensor | float = 0.0
        self.right: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Let in inputs with a last 1, and the outputs that are missing, one row for each sample and position."""
        self.left = self.left + inputs.T @ inputs
        self.right = self.right + inputs.T @ missing
        self.square = self.square + missing.square().sum()

    def solved(self, ridge: float) -> Tensor:
        left: Any = self.left
        return torch.linalg.solve(left + ridge * left.diagonal().mean() * torch.eye(len(left)).to(left), self.right)

    def error(self, change: Tensor) -> float:
        """The squared error that is left with a change."""
        left, right = self.left, self.right
        return (self.square - 2 * (change * right).sum() + (change * (left @ change)).sum()).item()  # pyright: ignore


@torch.no_grad()
def fit_heads(old: nn.Module, new: nn.Module, norms: list[nn.Module], batches: list[Batch]) -> list[str]:
    """Least squares with a ridge around the old values, chosen on every other batch; one layer after another.

    Args:
        old: The network with BatchNorm, in evaluation.
        new: The converted one, in evaluation, whose layers of the same names are changed.
        norms: Of the old network, that were replaced.
        batches: Images; detectors' lists of them fit nothing, since their heads look at other places in each network.

    Returns:
        Names of the layers that changed.
    """
    found: list[str] = []
    halved = [half for batch in batches if isinstance(batch, Tensor) for half in batch.chunk(2)]
    if len(halved) < 2:
        return found
    for name in heads(old, norms, halved[0]):
        theirs, ours = old.get_submodule(name), new.get_submodule(name)
        halves = (_Equations(), _Equations())
        for i, batch in enumerate(halved):
            (u,), (x,) = taken_by(theirs, old, batch, 1), taken_by(ours, new, batch, 1)
            halves[i % 2].add(_rows(ours, x, ones=True), _rows(ours, theirs(u) - ours(x)))
        if _improve(ours, *halves):
            found.append(name)
    return found


def _rows(layer: nn.Module, maps: Tensor, *, ones: bool = False) -> Tensor:
    rows = wide(maps if isinstance(layer, nn.Linear) else maps.movedim(1, -1)).flatten(0, -2)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if ones else rows


def _improve(layer: Any, first: _Equations, second: _Equations) -> bool:
    """Change a layer by what serves the images that it was not fitted on best, fitted on all of them."""
    tried = {r: second.error(first.solved(r)) + first.error(second.solved(r)) for r in _RIDGES}
    best = min(tried, key=lambda ridge: tried[ridge])
    if not tried[best] < float(first.square + second.square):
        return False
    whole = _Equations()
    whole.left, whole.right = first.left + second.left, first.right + second.right
    change = whole.solved(best)
    layer.weight += change[:-1].T.reshape(layer.weight.shape).to(layer.weight)
    layer.bias += change[-1].to(layer.bias)
    return True
