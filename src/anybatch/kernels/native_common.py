"""Kernels in C for the CPU: compiled for the processor at hand when the first is called, and kept for the next time.

They take a few seconds to compile, once a machine and version, with the system's C compiler (``CC``, else ``cc``,
``gcc`` or ``clang``), and lie in ``$XDG_CACHE_HOME/anybatch`` (``~/.cache/anybatch``) under a name made of all that
they depend on.
``ANYBATCH_NATIVE=0`` switches them off; without a compiler other kernels run, as `anybatch.dispatch.explain` tells.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.layouts import apart, layout_of, steps

_SOURCES = Path(__file__).with_name("c")
_FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
_log = logging.getLogger("anybatch")


class _AbsentError(Exception):
    """Why there is no library."""


def refused_native(x: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> str | None:
    """Why kernels in C cannot take ``x``, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if (reason := refused_tracing()) is not None:
        return reason
    if x.dtype not in dtypes:
        return f"x is {x.dtype}"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}"
    if x.is_neg():
        return "x is a view of its opposites"
    if x.dim() < 2 or x.numel() == 0:
        return f"x of shape {tuple(x.shape)} is no map with values"
    return refused_c()


def refused_c() -> str | None:
    """Why there are no kernels in C at all, or None."""
    return _found()[1]


# What `torch.compiler.assume_constant_result` sets, which loads the compiler, seconds' worth, for all who import this.
refused_c.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def _found() -> tuple[Any, str | None]:
    """The library, or why there is none."""
    if os.environ.get("ANYBATCH_NATIVE") == "0":
        return None, "ANYBATCH_NATIVE=0 switches kernels in C off"
    try:
        path = _path()
        if path.is_file():
            with contextlib.suppress(OSError):  # a file that something has cut short is made anew
                return ctypes.CDLL(str(path)), None
        _build(path)
        return ctypes.CDLL(str(path)), None
    except (_AbsentError, OSError) as error:
        return None, f"no kernels in C: {error}"


def _compiler() -> str:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise _AbsentError("there is no C compiler (CC, cc, gcc or clang)")
    return compiler


def _sources() -> list[Path]:
    return sorted(_SOURCES.glob("*.[ch]"))


def _path() -> Path:
    """Where the library is, or is to be."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    made_of = [compiler, version, *_FLAGS, _processor(), *(file.read_text() for file in _sources())]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anybatch" / f"kernels-{digest}.so"


def _build(path: Path) -> None:
    _log.info("compiling kernels for this processor, once: %s", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as own:
        made = Path(own) / path.name
        _compile(_compiler(), [str(file) for file in _sources() if file.suffix == ".c"], made)
        made.replace(path)  # whole or not at all, whoever else does the same


def _compile(compiler: str, sources: list[str], out: Path) -> None:
    """With threads where the compiler has OpenMP."""
    told = ""
    for threads in (("-fopenmp",), ()):
        done = subprocess.run(
            [compiler, *_FLAGS, *threads, *sources, "-o", str(out), "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        told = done.stderr
    raise _AbsentError(f"{compiler} failed: {' '.join(told.split())[:300]}")


def _processor() -> str:
    """What the processor can do, since folders of users may be shared among machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def passes(x: Tensor) -> bool:
    """Whether (N, C, *) lies in memory with either its channels or its positions one behind the other, all apart."""
    return _passes(x.shape, x.stride())


@functools.lru_cache(4096)
def _passes(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    layout = steps(shape, strides)
    return layout is not None and 1 in (layout.channel, layout.position) and apart(shape, strides)


_KINDS: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


@functools.cache
def function(name: str, signature: str) -> Callable[..., None]:
    """A compiled kernel; its arguments, a letter each: p, tensor, array or None; i, whole number; d, number."""
    found = getattr(_found()[0], name)
    found.argtypes, found.restype = [_KINDS[kind] for kind in signature], None
    expected, pointers = len(signature), [i for i, kind in enumerate(signature) if kind == "p"]

    def call(*given: Any) -> None:  # which holds the tensors until it returns
        assert len(given) == expected, name  # ctypes lets more pass
        held, words = list(given), list(given)
        for i in pointers:
            if isinstance(given[i], Tensor):
                held[i] = given[i].resolve_neg()  # parameters may be views of their opposites
                words[i] = held[i].data_ptr()
        found(*words)

    return call


@functools.lru_cache(4096)
def numbers(*values: int) -> Any:
    """An array of int64 that a function in C reads."""
    return (ctypes.c_int64 * len(values))(*values)


@functools.lru_cache(4096)
def as_map(shape: torch.Size, strides: tuple[int, ...]) -> Any:
    """The struct ``Map`` of (N, C, *) that `anybatch.kernels.layouts.steps` takes."""
    layout = layout_of(shape, strides)
    return numbers(*shape[:2], math.prod(shape[2:]), layout.n, layout.channel, layout.position)
