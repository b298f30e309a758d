"""Which layer of a network becomes which, decided before anything is changed."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from anybatch.convert.fold import feeding_layer, takes_filters
from anybatch.convert.graph import Graphs
from anybatch.convert.kinds import changed, is_batchnorm, own_forward
from anybatch.convert.normalizer_free import scale_branches
from anybatch.convert.places import Place
from anybatch.convert.target import CannotTakeError, Target, absorb_norm, with_activation
from anybatch.methods.batch_norm import FrozenBatchNorm
from anybatch.methods.common import Taken
from anybatch.methods.filters import StandardizedFilter
from anybatch.suggest import listed, unknown

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


@dataclass
class Fitted:
    """A new layer whose scale and shift can be fitted to what a BatchNorm gave."""

    old: nn.Module
    layer: nn.Module
    activated: bool = False
    """Whether its scale and shift act on what is activated already."""
    feeder: nn.Module | None = None
    """The new network's convolution whose output it alone takes, if constants may be added there."""
    offset: float = 0.0
    """Size of the constants that calibration added, in standard deviations."""


@dataclass
class Plan:
    """New layers by the ids of the old ones, and what is told of them."""

    swaps: dict[int, nn.Module] = field(default_factory=dict)
    fitted: dict[str, Fitted] = field(default_factory=dict)
    """By the name of the BatchNorm."""
    new: dict[str, nn.Module] = field(default_factory=dict)
    """What does a BatchNorm's work now, by its name."""
    inside: set[str] = field(default_factory=set)
    """Names of those whose work a convolution does."""
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    convolutions: dict[str, str] = field(default_factory=dict)
    convolutions_left: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    """How each residual branch is scaled, by the layer that does it; by the sum where none does, and why."""
    unmeasured: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)
    """The last convolution and the scale of branches whose variance images are to tell."""

    @property
    def exact(self) -> bool:
        """Whether the network stays the same function."""
        return all(isinstance(layer, FrozenBatchNorm | StandardizedFilter) for layer in self.new.values())


def excluded(places: list[Place], exclude: tuple[str, ...]) -> set[int]:
    """The ids of modules that are named, or lie inside a module that is.

    Raises:
        ValueError: If a name is no module's; the nearest are named.
    """
    names = {place.name for place in places}
    for name in exclude:
        if name not in names:
            raise unknown("module to exclude", name, names)
    return {
        id(place.module) for place in places if any(place.name == n or place.name.startswith(f"{n}.") for n in exclude)
    }


class Planner:
    """Plans the conversion of a network, which it does not change: but parameters become the new layers' too."""

    def __init__(
        self, model: nn.Module, places: list[Place], target: Target, exclude: tuple[str, ...], *, feeders: bool
    ) -> None:
        self.model, self.target, self.feeders = model, target, feeders
        self.names: dict[int, str] = {id(model): ""}
        modules = {id(model): model}
        for place in places:
            self.names.setdefault(id(place.module), place.name)
            modules.setdefault(id(place.module), place.module)
        out = excluded(places, exclude)
        self.excluded = out
        self.norms = [module for module in modules.values() if is_batchnorm(module)]
        self.convs = [module for module in modules.values() if isinstance(module, _CONVS)]
        self.tied = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
        self.plan = Plan()
        self.like: Tensor = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))

    def name(self, module: nn.Module) -> str:
        return self.names[id(module)]

    def made(self) -> Plan:
        """The plan."""
        plain = all(isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) for norm in self.norms)
        by_dims = self.target.by_dims and not plain  # what feeds the others tells their dimensions
        self.graphs = self._traced() if self.target.reads_graph or by_dims or self.feeders else []
        going: list[nn.Module] = []
        for norm in self.norms:
            reason = "excluded" if id(norm) in self.excluded else changed(norm) or own_forward(norm)
            if reason is None:
                going.append(norm)
            else:
                self.plan.left[self.name(norm)] = reason
        if self.target.inside:
            for norm in going:
                self._try(norm, self._move_inside_or_keep if self.target.normalizer_free else self._move_inside)
            if self.target.normalizer_free:
                self._standardize([norm for norm in going if id(norm) in self.plan.swaps])
                scale_branches(self)
            return self.plan
        for norm in going:
            self._try(norm, self._exchange)
        if self.target.scheme.conv is not None:
            self._standardize([norm for norm in going if id(norm) in self.plan.swaps])
        if self.feeders:
            for what in self.plan.fitted.values():
                what.feeder = self._feeding_alone(what.old)
        return self.plan

    def _feeding_alone(self, norm: nn.Module) -> nn.Module | None:
        graphs = self.reached(norm, self.graphs)
        conv = "" if graphs is None else feeding_layer(graphs, norm)
        if not isinstance(conv, _CONVS) or self._kept_plain(conv, depthwise=True):
            return None
        if any(self.tied[id(p)] > 1 for p in conv.parameters()):
            return None
        return self.plan.swaps.get(id(conv), conv)

    def _traced(self) -> list[Graphs]:
        """Traces in evaluation and, where these leave out a norm, in training too, where heads may be added."""
        found = []
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            for mode in (False, True):
                for module, _ in modes:
                    module.training = mode
                found.append(Graphs(self.model))
                if all(self.reached(norm, found) for norm in self.norms):
                    break
        finally:
            for module, mode in modes:
                module.training = mode
        return found

    def reached(self, module: nn.Module, graphs: list[Graphs]) -> Graphs | None:
        return next((graph for graph in graphs if graph.calls(module)), None)

    def _try(self, norm: nn.Module, change: Any) -> None:
        try:
            change(norm)
        except CannotTakeError as error:
            self.plan.left[self.name(norm)] = str(error)

    def _dims(self, norm: nn.Module) -> int:
        known = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
        feeder = self._feeder(norm)
        conv = len(feeder.kernel_size) if isinstance(feeder, _CONVS) else 2
        return next((dims for kind, dims in known.items() if isinstance(norm, kind)), conv)

    def _feeder(self, norm: nn.Module) -> nn.Module | None:
        """What a norm's input comes from, whatever else takes it, where the trace shows a layer."""
        graphs = self.reached(norm, self.graphs)
        source = None if graphs is None else (graphs.call(norm).args or (None,))[0]
        return None if graphs is None else graphs.module(source)

    def _exchange(self, norm: nn.Module) -> None:
        """A norm becomes the scheme's."""
        held, behind = self._activation(norm)
        new = self.target.norm(self.name(norm), norm, self._dims(norm), act=held or behind is not None, like=self.like)
        if getattr(new, "dims", None) == 1 and isinstance(self._feeder(norm), nn.Linear):
            raise CannotTakeError(f"{type(new).__name__} takes maps, and a linear layer feeds it")
        self.plan.swaps[id(norm)] = with_activation(new, norm, taken=held)
        if isinstance(behind, nn.Module):
            self.plan.swaps[id(behind)] = Taken().train(behind.training)
        self.plan.replaced[self.name(norm)] = repr(new)
        self.plan.new[self.name(norm)] = new
        if isinstance(getattr(new, "weight", None), nn.Parameter):
            late = bool(getattr(new, "scales_activation", False)) and bool(getattr(new, "apply_act", False))
            self.plan.fitted[self.name(norm)] = Fitted(norm, new, late)

    def _activation(self, norm: nn.Module) -> tuple[bool, Any]:
        """Whether a norm holds a ReLU, and the one behind it: a layer that serves nothing else, or True for others."""
        if self.target.scheme.norm_act is None:
            return False, None
        act = getattr(norm, "act", None)
        if act is not None and not isinstance(act, nn.Identity):
            return isinstance(act, nn.ReLU), None
        graphs = self.reached(norm, self.graphs)
        users = [] if graphs is None or graphs.obstacle(norm) else list(graphs.call(norm).users)
        if graphs is None or len(users) != 1:
            return False, None
        module = graphs.module(users[0])
        if isinstance(module, nn.ReLU):
            return False, module if graphs.obstacle(module) is None else True
        return False, True if module is None and users[0].target in _RELU else None

    def _move_inside(self, norm: nn.Module) -> None:
        """A norm goes, and the convolution in front of it normalizes."""
        graphs = self.reached(norm, self.graphs)
        if graphs is None:
            raise CannotTakeError("no trace tells which convolution feeds it")
        conv = feeding_layer(graphs, norm)
        if isinstance(conv, str):
            raise CannotTakeError(f"no convolution in front can take it in: {conv}")
        if not isinstance(conv, _CONVS):
            raise CannotTakeError(f"{self.name(conv)} feeds it, which is a {type(conv).__name__} and no convolution")
        if reason := self._kept_plain(conv, depthwise=not self.target.normalizer_free):
            raise CannotTakeError(f"{self.name(conv)} feeds it: {reason}")
        if self.tied[id(conv.weight)] > 1:
            raise CannotTakeError(f"{self.name(conv)} feeds it, whose weight is another layer's too")
        new = self.target.conv(conv)
        absorb_norm(new, norm)
        self.plan.swaps[id(conv)] = new
        self.plan.swaps[id(norm)] = with_activation(None, norm, taken=False)
        self.plan.replaced[self.name(norm)] = f"inside of {self.name(conv)}"
        self.plan.new[self.name(norm)] = new
        self.plan.inside.add(self.name(norm))
        self.plan.convolutions[self.name(conv)] = repr(new)
        if not isinstance(new, StandardizedFilter):  # which computes what both did, and is not to be fitted
            self.plan.fitted[self.name(norm)] = Fitted(norm, new)

    def _move_inside_or_keep(self, norm: nn.Module) -> None:
        """A norm goes into the convolution in front, and becomes constants where that cannot be."""
        try:
            self._move_inside(norm)
        except CannotTakeError as error:
            new = Target.named("frozen").norm(self.name(norm), norm, self._dims(norm), act=False, like=self.like)
            self.plan.swaps[id(norm)] = with_activation(new, norm, taken=False)
            self.plan.replaced[self.name(norm)] = f"{new!r}: {error}"
            self.plan.new[self.name(norm)] = new

    def _kept_plain(self, conv: Any, *, depthwise: bool = False) -> str | None:
        """Why a convolution does not become the scheme's, or None."""
        if id(conv) in self.excluded:
            return "excluded"
        if not depthwise and conv.groups > 1 and conv.weight.shape[1] == 1:
            return "depthwise: few values in a filter"
        return changed(conv) or (None if takes_filters(conv) else f"{type(conv).__name__} has a forward of its own")

    def _standardize(self, norms: list[nn.Module]) -> None:
        """Convolutions whose output comes to a new norm before it comes to another layer become the scheme's."""
        unseen = [norm for norm in norms if self.reached(norm, self.graphs) is None]
        if unseen:
            why = next(
                iter({text: "" for graph in self.graphs for text in graph.untraced.values()}), "nothing calls it"
            )
            warnings.warn(
                f"no trace reaches {listed([self.name(norm) for norm in unseen])} ({why}), so that convolutions in "
                f"front of it stay as they are",
                stacklevel=4,
            )
        wanted = {id(norm) for norm in norms}
        for conv in self.convs:
            if id(conv) in self.plan.swaps:
                continue
            name = self.name(conv)
            reason = self._kept_plain(conv)
            if reason is None and not any(_comes_to(graph, conv, wanted) for graph in self.graphs):
                reason = "no new norm behind it"
            if reason is None:
                try:
                    new = self.target.conv(conv)
                except CannotTakeError as error:
                    reason = str(error)
                else:
                    self.plan.swaps[id(conv)] = new
                    self.plan.convolutions[name] = repr(new)
                    continue
            self.plan.convolutions_left[name] = reason


def _comes_to(graphs: Graphs, conv: nn.Module, wanted: set[int]) -> bool:
    """Whether a convolution's output reaches one of some norms without passing another layer's filters."""
    waiting: list[fx.Node] = [user for node in graphs.calls(conv) for user in node.users]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = graphs.module(node)
        if module is not None and id(module) in wanted:
            return True
        if module is None or not any(p.dim() > 1 for p in module.parameters()):
            waiting += node.users
    return False
