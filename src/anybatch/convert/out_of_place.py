"""Networks in which nothing is overwritten: activations, and what a block's own forward does in place."""

from __future__ import annotations

import dis
import types
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from anybatch.convert.places import held

_OUT_OF_PLACE: dict[Any, Any] = {F.relu_: F.relu}


class _Shallow(fx.Tracer):
    """Traces a module's own forward, and none of its children's. Of what ``+=`` does a trace makes ``+``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def make_out_of_place(model: nn.Module) -> nn.Module:
    """Make a network overwrite nothing, in place: activations give new tensors, and so do sums in a block's forward.

    A block whose own ``forward`` does such a thing becomes a `torch.fx.GraphModule` with the same children and names;
    one that cannot be traced stays.

    Returns:
        The model, or a graph of it.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # pyright: ignore[reportArgumentType]
    for place in reversed(held(model)):  # what lies inside first
        if (graph := _as_graph(place.module)) is not None:
            place.put(graph)
    graph = _as_graph(model)
    return model if graph is None else graph


def overwrites(module: nn.Module) -> bool:
    """Whether a module's own code has an operator such as ``+=`` or calls a method such as ``add_``."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith(("torch.nn.", "torch.fx.", "anybatch.")) or kind is object:
            return False
        functions = (f for f in vars(kind).values() if isinstance(f, types.FunctionType) and f.__name__ != "__init__")
        if any(_in_place(step) for f in functions for step in dis.get_instructions(f)):
            return True
    return False


def _in_place(step: dis.Instruction) -> bool:
    if step.opname == "BINARY_OP":
        return step.argrepr.endswith("=")
    name = step.argval if step.opname in ("LOAD_METHOD", "LOAD_ATTR", "LOAD_GLOBAL") else None
    return isinstance(name, str) and (name == "inplace" or (name.endswith("_") and not name.startswith("_")))


def _as_graph(module: nn.Module) -> nn.Module | None:
    """The module as a graph in which nothing is in place, or None where that is not needed, or cannot be."""
    if not overwrites(module):
        return None
    try:
        graph = _Shallow().trace(module)
    except Exception:  # tracing runs the module's own code, which raises anything on what is no tensor
        return None
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            node.target = node.target.rstrip("_")
        if node.op in ("call_function", "call_method") and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    return fx.GraphModule(module, graph, type(module).__name__).train(module.training)
