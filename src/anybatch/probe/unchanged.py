"""A context in which anything may be done to a model, and after which it is what it was before."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.methods.parameters import shapeless
from anybatch.suggest import listed

_HOLDERS = (dict, OrderedDict, set, list)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within this context a model may be run, hooked and changed; on every exit it is what it was.

    Put back are each module's attributes, and so its mode and its hooks; values, gradients and ``requires_grad`` of
    parameters and buffers; and the random state of torch, Python and NumPy. Inside, parameters have no gradient, so
    that nothing is added to one. Lists, dictionaries and sets that modules hold are put back too, other objects that
    they hold are not looked into.

    Args:
        model: Any model but a scripted one, as large as fits into memory twice.

    Raises:
        ValueError: If the model is scripted, made in inference mode, or has parameters that no batch has shaped yet.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ValueError("a scripted model shows none of its layers; give the model that torch.jit.script was given")
    if lazy := shapeless(model):
        raise ValueError(f"{listed(lazy)} have no shape yet; run the model on one batch first")
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise ValueError("the model was made in torch.inference_mode, and may not be changed back; make it outside")
    restorers = [_attributes(model), _values(model), _random_state()]
    try:
        for p in model.parameters():
            p.grad = None
        yield
    finally:
        for restore in restorers:
            restore()


def _attributes(model: nn.Module) -> Callable[[], None]:
    before = []
    for module in model.modules():
        own = dict(module.__dict__)
        held = [(value, value.copy()) for value in own.values() if type(value) in _HOLDERS]
        before.append((module, own, held))

    def restore() -> None:
        for module, own, held in before:
            module.__dict__.clear()
            module.__dict__.update(own)
            for value, items in held:
                value.clear()
                value.extend(items) if isinstance(value, list) else value.update(items)

    return restore


def _values(model: nn.Module) -> Callable[[], None]:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    before = [(t, t.detach().clone(), t.grad, t.requires_grad) for t in tensors]

    @torch.no_grad()
    def restore() -> None:
        for t, value, grad, asks in before:
            if not torch.equal(t, value):
                t.copy_(value)
            if t.requires_grad != asks:
                t.requires_grad_(asks)
            t.grad = grad

    return restore


def _random_state() -> Callable[[], None]:
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy: Any = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    seed = torch.initial_seed()  # from which CUDA starts, whenever it does

    def restore() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(drawn)
        if cuda is None:
            torch.cuda.manual_seed_all(seed)
        else:
            torch.cuda.set_rng_state_all(cuda)

    return restore
