"""Tables that tell kernels over all parameters where each tensor lies, copied to a device when they change."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from anybatch.kernels.layouts import are_rows

LARGE = 512
"""Values of a row from which on several warps read it."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.lru_cache(64)
def owners(device: torch.device, counts: tuple[int, ...]) -> Tensor:
    """(U,) int32: for each row the tensor that has it, by how many each has."""
    found = torch.arange(len(counts), dtype=torch.int32)
    return found.repeat_interleave(torch.tensor(counts)).to(device)


@functools.lru_cache(64)
def table(device: torch.device, rows: tuple[tuple[int | float, ...], ...]) -> Tensor:
    """(T, columns) of whole numbers, int64, or float32; made once for the same values."""
    dtype = torch.int64 if all(isinstance(value, int) for row in rows for value in row) else torch.float32
    made = torch.tensor(rows, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def dense_rows(t: Tensor, rows: int) -> bool:
    """Whether a tensor's values lie in memory row after row of dimension 0, in whatever order within each."""
    return t.is_contiguous() or (rows == len(t) and are_rows(t.shape, t.stride()))


def aligned(size: int, *addresses: int) -> bool:
    """Whether all rows of so many values begin at 16 bytes, whatever the dtype."""
    return size % 16 == 0 and not any(address & 15 for address in addresses)


def block(size: int) -> tuple[int, int]:
    """Values that a program reads at once, and its warps, for rows of up to so many values."""
    return (2048, 4) if size > LARGE else (LARGE, 1)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """With this device as the current one, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def triton_type(dtype: torch.dtype | None) -> Any:
    """None for None."""
    import triton.language as tl  # here, since Triton takes a while to import

    return {None: None, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
