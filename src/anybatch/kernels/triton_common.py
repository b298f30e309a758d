"""What Triton kernels share. Triton itself is imported when a kernel is launched, since that takes a while."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs kernels, on the CPU, as in tests."""


def refused_device(x: Tensor) -> str | None:
    """Why kernels cannot run where ``x`` is, or None."""
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"x is on {x.device.type}"
    return None if _installed() else "Triton is not installed"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class Plan:
    """A launch of a kernel, all of it fixed but where its tensors lie; call it with them, None for those left out.

    Triton looks up anew at each launch what it has compiled for such arguments, which costs more than many a kernel. A
    plan asks it once for each device and then launches what it got. Whoever keeps a plan keeps it by what the dtypes
    of its tensors follow from, and by which of them are None.

    Args:
        kernel: Made by ``triton.jit``; its pointers are its first parameters.
        grid: Programs in each dimension.
        numbers: The parameters behind the pointers, in order.
        warps: Of a program.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], numbers: Sequence[Any], warps: int = 4) -> None:
        self.kernel, self.numbers, self.warps = kernel, tuple(numbers), warps
        self.grid = (*grid, 1, 1)[:3]
        self._ready: dict[int, Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        if not INTERPRETED:
            device = torch.cuda.current_device()
            pointers = [None if t is None else t.data_ptr() for t in tensors]
            aligned = not any(pointer & 15 for pointer in pointers if pointer)
            if aligned and (run := self._ready.get(device)) is not None:
                run(*pointers, *self.numbers)
                return
            compiled = self.kernel[self.grid](*tensors, *self.numbers, num_warps=self.warps)
            if aligned:  # others take other code
                self._ready[device] = compiled[self.grid]
            return
        self.kernel[self.grid](*tensors, *self.numbers, num_warps=self.warps)


def power_of_two(n: int) -> int:
    """The first from ``n`` on."""
    return 1 << max(n - 1, 0).bit_length()
