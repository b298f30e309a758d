"""Watches what Triton kernels read and write in its interpreter, which runs programs one after the other.

On a GPU programs run side by side and memory behind a tensor belongs to others, so that there these are faults, which
the interpreter by itself lets pass:

- an access outside of the tensors that a launch was given, between the values of one that has gaps, or of some values'
  halves;
- two programs that write to one place, or one that reads what another writes;
- a program that reads what it has written, with a barrier in between or without;
- one store that writes to a place more than once.

It does not see a program's threads overwrite what others of them have yet to read, nor what atomic operations do, of
which we have none.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

Addresses = np.ndarray[Any, np.dtype[np.int64]]

BY_ADDRESS = frozenset({"standardize_all", "pull_all", "clip_units"})
"""Kernels that find tensors in tables, and may read and write any tensor that there is."""


class WatchedError(AssertionError):
    """What a kernel did that it must not do."""


class _Launch:
    def __init__(self, name: str, tensors: list[Tensor]) -> None:
        self.name, self.tensors = name, tensors
        self.dense = [_span(t) for t in tensors if _dense(t)]
        self.unit = min((t.element_size() for t in tensors), default=1)
        """Bytes that are told apart."""
        self.read: list[tuple[int, Addresses]] = []
        self.written: list[tuple[int, Addresses]] = []
        self.program = -1
        self.own: list[Addresses] = []
        """What the program at work has written."""
        self.fault = ""

    @cached_property
    def places(self) -> dict[int, list[Addresses]]:
        """Of the values of each tensor, by their size."""
        found: dict[int, list[Addresses]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.element_size(), []).append(_places(tensor))
        return found

    @cached_property
    def memory(self) -> list[tuple[int, int]]:
        """Of all tensors, which a launch makes none of."""
        return list(_memory())

    def starts(self, program: int) -> None:
        if program != self.program:
            self.program, self.own = program, []

    def reads(self, at: Addresses, size: int) -> None:
        """Some values of so many bytes."""
        at = self._inside(at, size, "reads")
        if any(np.isin(at, own).any() for own in self.own):
            self._tell("a program reads what it has written")
        self.read.append((self.program, at))

    def writes(self, at: Addresses, size: int) -> None:
        at = self._inside(at, size, "writes")
        if len(np.unique(at)) != len(at):
            self._tell("one store writes to a place more than once")
        self.own.append(at)
        self.written.append((self.program, at))

    def ends(self) -> None:
        if not self.written:
            return
        written = np.concatenate([at for _, at in self.written])
        writer = np.repeat([program for program, _ in self.written], [len(at) for _, at in self.written])
        order = np.argsort(written, kind="stable")
        written, writer = written[order], writer[order]
        if ((written[1:] == written[:-1]) & (writer[1:] != writer[:-1])).any():
            self._tell("two programs write to one place")
        for reader, at in self.read:
            first = np.searchsorted(written, at.min())
            if first == np.searchsorted(written, at.max(), "right"):
                continue  # as of nearly all, since what is written is seldom read
            found = np.minimum(np.searchsorted(written, at), len(written) - 1)
            if ((written[found] == at) & (writer[found] != reader)).any():
                self._tell("a program reads what another writes")

    def _inside(self, at: Addresses, size: int, does: str) -> Addresses:
        """In units, what lies in tensors; it is judged before it is touched."""
        first, behind = int(at.min()), int(at.max()) + size
        if (at % size).any():
            self._tell(f"it {does} values of {size} bytes that do not lie at a multiple of these")
        if not any(low <= first and behind <= high for low, high in self.dense):
            outside = np.unique(at)
            for places in self.places.get(size, []):
                outside = outside[~np.isin(outside, places)]
            if len(outside) and self.name in BY_ADDRESS:
                for low, high in self.memory:
                    outside = outside[(outside < low) | (outside + size > high)]
                    if not len(outside):
                        break
            if len(outside):
                self._tell(f"it {does} {len(outside)} places outside of its tensors")
        unit = min(self.unit, size)
        return at if unit == size else (at[:, None] + np.arange(0, size, unit)).ravel()

    def _tell(self, fault: str) -> None:
        self.fault = f"{self.name}: {fault}"
        raise WatchedError(self.fault)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first address, and the one behind the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size() * bool(tensor.numel())


def _dense(tensor: Tensor) -> bool:
    """Whether its values lie one behind the other, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _places(tensor: Tensor) -> Addresses:
    """The addresses of its values."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.unique(offsets[:, None] + np.arange(size) * stride)
    return tensor.data_ptr() + offsets * tensor.element_size()


def _memory() -> Iterator[tuple[int, int]]:
    """Of all tensors on the CPU."""
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter) and found.device.type == "cpu" and found.layout == torch.strided:
            storage = found.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for one in given:
            yield from _tensors(one)


@contextmanager
def watched() -> Iterator[None]:
    """Within this context a launch that does one of these raises `WatchedError`; an access outside is not made."""
    from triton.runtime import interpreter

    builder: Any = type(interpreter.interpreter_builder)
    launches: list[_Launch] = []
    run, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def launch(executor: Any, *args: Any, **options: Any) -> None:
        launches.append(_Launch(executor.fn.__name__, list(_tensors((*args, *options.values())))))
        try:
            run(executor, *args, **options)
            launches[-1].ends()
        except Exception as error:
            if launches[-1].fault:  # which the interpreter has wrapped
                raise WatchedError(launches[-1].fault) from error
            raise
        finally:
            launches.pop()

    def asked(builder: Any, pointers: Any, mask: Any) -> tuple[Addresses, int]:
        """Where, and of how many bytes."""
        (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
        launches[-1].starts((x * ny + y) * nz + z)
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel().astype(np.int64)
        return at, max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        at, size = asked(builder, pointers, mask)
        if len(at):
            launches[-1].reads(at, size)
        return load(builder, pointers, mask, *rest, **options)

    def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        at, size = asked(builder, pointers, mask)
        if len(at):
            launches[-1].writes(at, size)
        return store(builder, pointers, value, mask, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        yield
