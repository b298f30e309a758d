"""What Triton kernels share. Triton itself is imported when a kernel is launched, since that takes a while."""

from __future__ import annotations

import functools
import importlib.util
import os

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
