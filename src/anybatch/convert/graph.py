"""Which module feeds which, read off torch.fx's traces of a network."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from anybatch.suggest import one_line

Name = str  # of a module, with dots
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Graphs:
    """Traces of a network: of the whole where that can be traced, else of the largest parts that can.

    A layer in a part that was traced is fed as the part's ``forward`` says, whoever calls that.
    """

    model: nn.Module
    parts: dict[Name, fx.Graph] = field(default_factory=dict)
    """By the name of the module whose ``forward`` it is; the model itself is ``""``."""
    untraced: dict[Name, str] = field(default_factory=dict)
    """Modules whose ``forward`` cannot be traced, and why."""

    def module(self, node: Any) -> nn.Module | None:
        """The module that a node calls; None for everything else."""
        return self._called.get(node) if isinstance(node, fx.Node) else None

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """Every call of a module."""
        return self._calls.get(id(module), [])

    def call(self, module: nn.Module) -> fx.Node:
        """The first call of a module that is called."""
        return self._calls[id(module)][0]

    def __post_init__(self) -> None:
        with _attributes_kept(self.model):
            _trace(self.model, "", self)
        nodes = [(name, node) for name, graph in self.parts.items() for node in graph.nodes]
        self._called = {
            node: self.model.get_submodule(_joined(name, node.target))
            for name, node in nodes
            if node.op == "call_module"
        }
        self._calls: dict[int, list[fx.Node]] = {}
        for node, module in self._called.items():
            self._calls.setdefault(id(module), []).append(node)
        held = Counter(id(module) for _, module in self.model.named_modules(remove_duplicate=False))
        # What is not traced may call a module that a part which is traced calls too.
        self._shared = {key for key, times in held.items() if times > 1} if self.untraced else set()
        self._read = {
            id(self.model.get_submodule(_joined(name, node.target.rpartition(".")[0])))
            for name, node in nodes
            if node.op == "get_attr"
        }

    def obstacle(self, module: nn.Module) -> str | None:
        """Why nothing certain is known of how a module is called, or None where it is called once and as a whole."""
        if id(module) in self._shared:
            return "it stands in several places"
        times = len(self._calls.get(id(module), ()))
        if times > 1:
            return f"it is called {times} times"
        if not times:
            return "no trace of the network reaches it"
        return "its tensors are read from outside" if id(module) in self._read else None


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """A forward that is traced may set attributes, as torchvision's detectors do, to what only traces know."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _joined(name: Name, inner: Name) -> Name:
    return f"{name}.{inner}" if name and inner else name or inner


def _trace(module: nn.Module, name: Name, into: Graphs) -> None:
    """The module's own trace, without the parts that do not go; these on their own."""
    opaque: dict[Name, str] = {}
    if isinstance(module, _CONTAINERS):
        opaque[""] = ""
    else:
        tracer = _Tracer(opaque)
        # Arguments that may be left out are left out, as in inference.
        try:
            graph = tracer.trace(module, concrete_args=_defaults(module))
        except Exception as error:  # tracing runs the network's own code, which raises anything on what is no tensor
            opaque[""] = _said(error)
        else:
            into.parts[name] = graph
    for inner, why in opaque.items():
        full = _joined(name, inner)
        if why:
            into.untraced[full] = why
        part = module.get_submodule(inner)
        for child, _ in part.named_children():
            if not _is_leaf(part.get_submodule(child)):
                _trace(part.get_submodule(child), _joined(full, child), into)


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 120)}"


def _is_leaf(module: nn.Module) -> bool:
    """Layers, whose inside is their own business."""
    home = type(module).__module__
    if home.startswith("torch.nn") and not isinstance(module, nn.Sequential):
        return not isinstance(module, _CONTAINERS)
    layer = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)
    return (
        isinstance(module, layer) or home.startswith("anybatch.methods.") or "FrozenBatchNorm" in type(module).__name__
    )


class _Tracer(fx.Tracer):
    """Modules that cannot be traced become leaves."""

    def __init__(self, opaque: dict[Name, str]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        before = len(self.graph.nodes)
        opaque, stack = set(self.opaque), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # as in _trace
            for node in list(self.graph.nodes)[before:][::-1]:
                self.graph.erase_node(node)
            self.module_stack = stack  # from which torch takes nothing back on an error
            # What lies inside is traced on its own, from there.
            for inner in self.opaque.keys() - opaque:
                del self.opaque[inner]
            self.opaque[name] = _said(error)
            return self.create_proxy("call_module", name, args, kwargs)
