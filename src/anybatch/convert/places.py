"""Where a network holds its modules: registered ones, and those in attributes, lists and other containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))  # of torch, such as hooks


@dataclass(frozen=True)
class Place:
    """One place that holds a module; a module that is shared has several."""

    name: str
    module: nn.Module
    put: Callable[[nn.Module], None]
    """Set another module into the place."""


def held(model: nn.Module) -> list[Place]:
    """Every place inside a network that holds a module, in the order of `nn.Module.named_modules`.

    Lists, tuples and dictionaries of Python's hide modules from torch, but a network may call what they hold.
    """
    return list(_inside(model, "", {id(model)}))


def _inside(owner: nn.Module, prefix: str, seen: set[int]) -> Iterator[Place]:
    for key, child in owner._modules.items():
        if child is not None:
            yield from _at(f"{prefix}{key}", child, _setter(owner._modules, key), seen)
    for key, value in vars(owner).items():
        if key not in _OWN:
            yield from _at(f"{prefix}{key}", value, _setter(vars(owner), key), seen)


def _setter(container: Any, key: Any) -> Callable[[Any], None]:
    return lambda value: container.__setitem__(key, value)


def _at(name: str, value: Any, put: Callable[[Any], None], seen: set[int]) -> Iterator[Place]:
    if isinstance(value, nn.Module):
        yield Place(name, value, put)
    if not isinstance(value, nn.Module | list | tuple | dict) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from _inside(value, f"{name}.", seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _at(f"{name}.{key}", item, _setter(value, key), seen)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _at(f"{name}.{i}", item, _setter(value, i), seen)
    elif type(value) is tuple:  # cannot be changed: a new one takes its place
        items = list(value)

        def put_item(i: int, item: Any) -> None:
            items[i] = item
            put(tuple(items))

        for i, item in enumerate(value):
            yield from _at(f"{name}.{i}", item, lambda new, i=i: put_item(i, new), seen)
