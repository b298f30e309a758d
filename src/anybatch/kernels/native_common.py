"""Kernels in C for the CPU: compiled for the processor at hand when the first is called, and kept for the next time.

They take a few seconds to compile, once a machine and version, with the system's C compiler (``CC``, else ``cc``,
``gcc`` or ``clang``), and lie in ``$XDG_CACHE_HOME/anybatch`` (``~/.cache/anybatch``) under a name made of all that
they depend on.
``ANYBATCH_NATIVE=0`` switches them off; without a compiler other kernels run, as `anybatch.dispatch.explain` tells.
"""

from __future__ import annotations

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.layouts import layout_of, steps

_SOURCES = Path(__file__).with_name("c")
_FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
_log = logging.getLogger("anybatch")


class _AbsentError(Exception):
    """Why there is no library."""


def refused_native(x: Tensor) -> str | None:
    """Why kernels in C cannot take ``x``, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if (reason := refused_tracing()) is not None:
        return reason
    if x.dtype != torch.float32:
        return f"x is {x.dtype}"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}"
    if x.dim() < 2 or x.numel() == 0:
        return f"x of shape {tuple(x.shape)} is no map with values"
    return _found()[1]


@functools.cache
def _found() -> tuple[Any, str | None]:
    if os.environ.get("ANYBATCH_NATIVE") == "0":
        return None, "ANYBATCH_NATIVE=0 switches kernels in C off"
    try:
        return ctypes.CDLL(str(_built())), None
    except (_AbsentError, OSError) as error:
        return None, str(error)


def _built() -> Path:
    """The library's file, compiled if it is not there."""
    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        raise _AbsentError("there is no C compiler (CC, cc, gcc or clang)")
    sources = sorted(_SOURCES.glob("*.[ch]"))
    made_of = [compiler, _version(compiler), *_FLAGS, _processor(), *(file.read_text() for file in sources)]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anybatch"
    path = folder / f"kernels-{digest}.so"
    if not path.is_file():
        _log.info("compiling kernels for this processor, once: %s", path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / path.name
            _compile(compiler, [str(file) for file in sources if file.suffix == ".c"], made)
            made.replace(path)  # whole or not at all, whoever else does the same
    return path


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


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _processor() -> str:
    """What the processor can do, since folders of users may be shared among machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def passes(x: Tensor) -> bool:
    """Whether (N, C, *) lies in memory with either its channels or its positions one behind the other."""
    layout = steps(x.shape, x.stride())
    return layout is not None and (layout.channel == 1 or layout.position == 1)


_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


@functools.cache
def function(name: str, signature: str) -> Callable[..., None]:
    """A compiled kernel. Its arguments are, a letter each: p, an address or None; i, a whole number; d, a number."""
    found = getattr(_found()[0], name)
    found.argtypes, found.restype = [_KINDS[kind] for kind in signature], None
    return found


def address(t: Tensor | None) -> int | None:
    """Where a tensor's values are; None for None."""
    return None if t is None else t.data_ptr()


@functools.lru_cache(4096)
def numbers(*values: int) -> Any:
    """An array of int64 that a function in C reads."""
    return (ctypes.c_int64 * len(values))(*values)


@functools.lru_cache(4096)
def as_map(shape: torch.Size, strides: tuple[int, ...]) -> Any:
    """The struct ``Map`` of (N, C, *) that `anybatch.kernels.layouts.steps` takes."""
    layout = layout_of(shape, strides)
    return numbers(*shape[:2], math.prod(shape[2:]), layout.n, layout.channel, layout.position)
