"""Passes over activations that torch.compile turns into one loop each, where a `dispatch` switch asks for it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from anybatch import dispatch

Result = TypeVar("Result")


def helper(fn: Callable[..., Result]) -> Callable[..., Result]:
    """Run ``fn`` as it stands, or compiled for any shape within `anybatch.dispatch.compiled_helpers`.

    It always runs as it stands while another compiler traces it, where a gradient is to flow through it, and under
    `torch.func`'s transforms: there it is a formula like any other. Where compiling fails, as without a C++ compiler,
    it does so with one warning. Masks are to be written as products with 0 or 1: generated CPU code reads and writes
    booleans a hundred times slower (torch 2.15).

    Args:
        fn: Takes tensors, numbers and texts by position; changes nothing outside itself.
    """
    compiled: Callable[..., Result] | None = None
    failed = False

    @functools.wraps(fn)
    def run(*args: Any) -> Result:
        nonlocal compiled, failed
        if failed or not dispatch.compiles_helpers() or not _plain(args):
            return fn(*args)
        if compiled is None:
            compiled = torch.compile(fn, dynamic=True)
        from torch._dynamo.exc import TorchDynamoException  # here, since it takes a second and compiling has loaded it

        try:
            return compiled(*args)
        except TorchDynamoException as error:
            failed = True
            warnings.warn(
                f"{fn.__module__}.{fn.__name__} runs without torch.compile, which failed: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                stacklevel=2,
            )
            return fn(*args)

    return run


def _plain(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args))
