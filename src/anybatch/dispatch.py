"""A reference function to which faster kernels attach, and the choice between them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# A plain module global, because a context variable breaks full-graph compilation.
_backend = "auto"
_compiles_helpers = False
_autotunes = os.environ.get("ANYBATCH_AUTOTUNE") == "1"

Refusal = Callable[..., str | None]


@dataclass(frozen=True)
class Kernel:
    """A second opinion on a reference: same signature, same shape, same dtype."""

    backend: str
    run: Callable[..., Any]
    refusal: Refusal


class Op:
    """A reference function and the kernels attached to it; calling it picks one of them.

    With the backend ``"auto"`` the first kernel that does not refuse runs, else the reference. With
    ``"reference"`` the reference runs. Any other backend runs that kernel, and an error quotes its reason
    if it refuses; ops that have no kernel of that backend run their reference.
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.__name__: str = reference.__name__
        self.reference = reference
        self.kernels: list[Kernel] = []
        functools.update_wrapper(self, reference)

    def kernel(
        self, backend: str, *, refusal: Refusal, first: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Attach a kernel, to be asked behind those that are attached already, or ``first``.

        ``refusal`` takes the same arguments and returns why the kernel cannot serve them, or None.
        """

        def attach(run: Callable[..., Any]) -> Callable[..., Any]:
            if any(kernel.backend == backend for kernel in self.kernels):
                raise ValueError(f"{self.__name__} has a {backend!r} kernel already")
            self.kernels.insert(0 if first else len(self.kernels), Kernel(backend, run, refusal))
            return run

        return attach

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _backend != "reference":
            for kernel in self.kernels:
                if _backend not in ("auto", kernel.backend):
                    continue
                reason = kernel.refusal(*args, **kwargs)
                if reason is None:
                    return kernel.run(*args, **kwargs)
                if _backend == kernel.backend:
                    raise ValueError(f"the {kernel.backend!r} kernel of {self.__name__} refuses: {reason}")
        return self.reference(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {self.__name__}, kernels: {', '.join(k.backend for k in self.kernels) or 'none'}>"


def op(reference: Callable[..., Any]) -> Op:
    """Make a reference function an `Op`; the reference stays at ``.reference``."""
    made = Op(reference)
    _OPS.append(made)
    return made


_OPS: list[Op] = []


def explain(called: Op, *args: Any, **kwargs: Any) -> dict[str, str]:
    """What each backend of an op says to a call, which is not made: those that refuse say why.

    Args:
        called: An op, as they stand in `anybatch.functional`.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        By backend, in the order in which they are asked: ``"runs"`` for the one that the backend in force would run,
        ``"could run"``, or the reason of its refusal.

    Raises:
        TypeError: If it is no op.

    >>> explain(op(lambda x: x), 1)
    {'reference': 'runs'}
    """
    if not isinstance(called, Op):
        raise TypeError(f"explain takes an op of anybatch.functional and its arguments, got {type(called).__name__}")
    answers = {kernel.backend: kernel.refusal(*args, **kwargs) for kernel in called.kernels}
    told = {name: "could run" if reason is None else reason for name, reason in answers.items()}
    able = [name for name, reason in answers.items() if reason is None and _backend in ("auto", name)]
    told["reference"] = "could run"
    # A backend that was asked for by name and refuses is an error, so that nothing runs.
    if not (_backend in answers and not able):
        told[able[0] if able else "reference"] = "runs"
    return told


def backends() -> list[str]:
    """Names that `backend` takes: ``auto``, ``reference`` and every attached kernel's."""
    return ["auto", "reference", *sorted({kernel.backend for made in _OPS for kernel in made.kernels})]


def current() -> str:
    """The backend in force."""
    return _backend


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every op runs the named backend."""
    global _backend
    if name not in backends():
        raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(backends())}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def compiles_helpers() -> bool:
    """Whether kernels compile the passes they are made of."""
    return _compiles_helpers


@contextmanager
def compiled_helpers(switched_on: bool = True) -> Iterator[None]:
    """Within this context the passes that kernels are made of are compiled by torch.compile.

    Off elsewhere: compiling takes seconds for each kind of input, and a C++ compiler on the CPU.
    """
    global _compiles_helpers
    before, _compiles_helpers = _compiles_helpers, switched_on
    try:
        yield
    finally:
        _compiles_helpers = before


def autotunes() -> bool:
    """Whether Triton kernels are launched in the fastest of a few ways, each timed at a kernel's first launch."""
    return _autotunes


@contextmanager
def autotuned(switched_on: bool = True) -> Iterator[None]:
    """Within this context Triton kernels are tuned, as `anybatch.kernels.triton_tuning` tells.

    Off elsewhere, unless the environment has ``ANYBATCH_AUTOTUNE=1``: the first step on a GPU compiles up to five ways
    of each kernel and times them, and results differ by rounding from those of a process that found another way.
    """
    global _autotunes
    before, _autotunes = _autotunes, switched_on
    try:
        yield
    finally:
        _autotunes = before
