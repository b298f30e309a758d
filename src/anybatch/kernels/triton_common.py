"""What Triton kernels share. Triton itself is imported when a kernel is launched, since that takes a while."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from anybatch.kernels.activations import refused_tracing
from anybatch.kernels.layouts import apart, laid_out, steps

Result = TypeVar("Result")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs kernels, on the CPU, as in tests."""


def refused_device(x: Tensor) -> str | None:
    """Why kernels cannot run where ``x`` is, or under what calls them, or None."""
    if reason := refused_tracing():  # first, since what follows is not to be traced
        return reason
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"x is on {x.device.type}"
    if x.is_neg():
        return "x is a view of its opposites"
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
        self.ready: dict[int, Callable[..., Any]] = {}
        """By device, what launches."""

    def __call__(self, *given: Tensor | None) -> None:
        tensors = [t if t is None else t.resolve_neg() for t in given]  # parameters may be views of their opposites
        if INTERPRETED:
            self.kernel[self.grid](*tensors, *self.numbers, num_warps=self.warps)
        else:
            self.launch(*tensors)

    def launch(self, *tensors: Tensor | None) -> None:
        device, pointers, bits = torch.cuda.current_device(), [], 0
        for t in tensors:
            pointer = None if t is None else t.data_ptr()
            pointers.append(pointer)
            bits |= pointer or 0
        aligned = not bits & 15
        if aligned and (run := self.ready.get(device)) is not None:
            run(*pointers, *self.numbers)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, num_warps=self.warps)
        if aligned:  # others take other code
            self.ready[device] = compiled[self.grid]


def power_of_two(n: int) -> int:
    """The first from ``n`` on."""
    return 1 << max(n - 1, 0).bit_length()


planned = functools.lru_cache(4096)
"""Of what makes a plan, by all that it and the dtypes of its tensors follow from."""
Dtypes = tuple[torch.dtype | None, ...]


def dtypes_of(*tensors: Tensor | None) -> Dtypes:
    """None for those left out."""
    return tuple(None if t is None else t.dtype for t in tensors)


def readable(g: Tensor, like: Tensor) -> Tensor:
    """``g`` where it is expanded or lies in memory as ``like`` does, else a copy that does."""
    g = g.resolve_neg()
    if g.stride() == like.stride():
        return g
    of_g, of_like = steps(g.shape, g.stride()), steps(like.shape, like.stride())
    if of_g is not None and of_like is not None and (of_g.position == 0 or of_g[1:] == of_like[1:]):
        return g
    return laid_out(g, like)


def refused_layout(x: Tensor) -> str | None:
    """Why kernels cannot find the values of (N, C, *), or None."""
    return _refused_layout(x.shape, x.stride())


@functools.lru_cache(4096)
def _refused_layout(shape: torch.Size, strides: tuple[int, ...]) -> str | None:
    if steps(shape, strides) is None or not apart(shape, strides):
        return "x is neither contiguous nor channels last"
    span = sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
    return f"a sample of x spans {span} values, 2^31 or more" if span >= 2**31 else None


def refused_activations(x: Tensor) -> str | None:
    """Why kernels of norms do not take (N, C, *), or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}, which statistics are not taken in"
    return "x has no values" if x.numel() == 0 else refused_layout(x)


def refused_parameters(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why kernels of norms do not take these beside ``x``, or None."""
    for p in parameters:
        if p is not None and (p.device != x.device or not p.is_floating_point() or p.dtype.itemsize > 4):
            return f"a parameter is {p.dtype} on {p.device}, x on {x.device}"
        if p is not None and not p.is_contiguous():
            return "a parameter is not contiguous"
    return None


def pieces() -> Any:
    """Kernels that several ops have."""
    from anybatch.kernels import triton_pieces  # here, since Triton takes a while to import

    return triton_pieces


def on_its_device(run: Callable[..., Result]) -> Callable[..., Result]:
    """``run`` with the device of its first tensor as the current one, on which kernels are launched."""

    @functools.wraps(run)
    def there(x: Tensor, *args: Any, **options: Any) -> Result:
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return run(x, *args, **options)
        return run(x, *args, **options)

    return there
