"""What Opacus needs beyond norms: nothing in place, no buffers beside parameters that are trained."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from anybatch.convert.places import held
from anybatch.per_sample import prepare_for_opacus

_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
}
_FILTERS = ("weight_gamma", "weight_beta")


class _Shallow(fx.Tracer):
    """Traces a module's own forward, and none of its children's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def make_private(model: nn.Module) -> nn.Module:
    """Make a converted network one that Opacus accepts and trains, in place.

    Activations and sums give new tensors; a block whose own ``forward`` adds in place becomes a graph of it with the
    same children. The scale and shift that keep standardized filters are no buffers any more, but parameters that ask
    for no gradients.

    Returns:
        The model, or a graph of it where its own ``forward`` adds in place.

    Raises:
        ImportError: If Opacus is not installed.
        ValueError: If a layer stays that depends on other samples.
    """
    check_private(model)
    for module in list(model.modules()):
        if isinstance(getattr(module, "weight_gamma", None), Tensor):
            for name in _FILTERS:
                value = module._buffers.pop(name)
                if value is not None:
                    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    prepare_for_opacus(model)
    for place in reversed(held(model)):  # what lies inside first
        if (graph := _out_of_place(place.module)) is not None:
            place.put(graph)
    graph = _out_of_place(model)
    return model if graph is None else graph


def check_private(model: nn.Module) -> None:
    """Raise a `ValueError` where a layer's output depends on other samples, by what it keeps of them."""
    for name, module in model.named_modules():
        own = [key for key, _ in module.named_buffers(recurse=False) if key not in _FILTERS]
        if own and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(
                f"dp=True: {name} ({type(module).__name__}) keeps {own[0]} of other samples, which Opacus refuses; "
                f"convert it too, or take another scheme such as 'gn'"
            )


def _out_of_place(module: nn.Module) -> nn.Module | None:
    """The module as a graph in which nothing is in place, or None where its forward has nothing in place."""
    if type(module).__module__.startswith(("torch.nn.", "anybatch.")) or isinstance(module, fx.GraphModule):
        return None
    try:
        graph = _Shallow().trace(module)
    except Exception:  # tracing runs the module's own code, which raises anything on what is no tensor
        return None
    found = False
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target, found = _OUT_OF_PLACE[node.target], True
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            node.target, found = node.target.rstrip("_"), True
        elif node.op in ("call_function", "call_method") and node.kwargs.get("inplace"):
            node.kwargs, found = {**node.kwargs, "inplace": False}, True
    return fx.GraphModule(module, graph, type(module).__name__).train(module.training) if found else None
