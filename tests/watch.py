"""Watches what Triton kernels read and write in its interpreter, which runs programs one after the other.

On a GPU programs run side by side and memory behind a tensor belongs to others, so that there these are faults, each of
which the interpreter alone lets pass:

- a read or a write outside of the tensors that a launch was given, or between the values of one that has gaps;
- two programs that write to one place, or one that reads what another writes;
- a program that reads what it has written: its threads do not wait for one another;
- one store that writes to a place more than once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

Addresses = np.ndarray[Any, np.dtype[np.int64]]

BY_ADDRESS = frozenset({"standardize_all", "pull_all", "clip_units"})
"""Kernels that find tensors in tables, and may read and write any tensor that there is."""


class WatchedError(AssertionError):
    """What a kernel did that it must not do."""


class _Launch:
    def __init__(self, name: str, tensors: list[Tensor]) -> None:
        self.name, self.tensors = name, tensors
        self.spans = [_span(t) for t in tensors if _dense(t)]
        self.read: list[tuple[int, Addresses]] = []
        self.written: list[tuple[int, Addresses]] = []
        self.program = -1
        self.own: list[Addresses] = []
        """What the program at work has written."""
        self.faults: list[str] = []

    def starts(self, program: int) -> None:
        if program != self.program:
            self.program, self.own = program, []

    def reads(self, at: Addresses) -> None:
        if any(np.isin(at, own).any() for own in self.own):
            self.faults.append("a program reads what it has written")
        self.read.append((self.program, at))

    def writes(self, at: Addresses) -> None:
        if len(np.unique(at)) != len(at):
            self.faults.append("one store writes to a place more than once")
        self.own.append(at)
        self.written.append((self.program, at))

    def ends(self) -> None:
        for accesses, does in ((self.read, "reads"), (self.written, "writes")):
            if count := self._outside(accesses):
                self.faults.append(f"it {does} {count} places outside of its tensors")
        written, writer = _joined(self.written)
        order = np.argsort(written, kind="stable")
        written, writer = written[order], writer[order]
        if ((written[1:] == written[:-1]) & (writer[1:] != writer[:-1])).any():
            self.faults.append("two programs write to one place")
        for reader, at in self.read:
            first = np.searchsorted(written, at.min())
            if first == np.searchsorted(written, at.max(), "right"):
                continue  # as of nearly all, since what is written is seldom read
            found = np.minimum(np.searchsorted(written, at), len(written) - 1)
            if ((written[found] == at) & (writer[found] != reader)).any():
                self.faults.append("a program reads what another writes")
        if self.faults:
            raise WatchedError(f"{self.name}: {'; '.join(dict.fromkeys(self.faults))}")

    def _outside(self, accesses: list[tuple[int, Addresses]]) -> int:
        """How many places are not those of values of a tensor."""
        doubtful = [a for a in accesses if not any(low <= a[1].min() and a[1].max() < high for low, high in self.spans)]
        outside = np.unique(_joined(doubtful)[0])
        for tensor in self.tensors:
            outside = outside[~_within(outside, tensor)]
        if len(outside) and self.name in BY_ADDRESS:
            for storage in _storages():
                first = storage.data_ptr()
                outside = outside[(outside < first) | (outside >= first + storage.nbytes())]
        return len(outside)


def _dense(tensor: Tensor) -> bool:
    """Whether there are no gaps between its values."""
    low, high = _span(tensor)
    return high - low == tensor.numel() * tensor.element_size()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first address, and the one behind the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size() * bool(tensor.numel())


def _joined(accesses: list[tuple[int, Addresses]]) -> tuple[Addresses, Addresses]:
    """All addresses, and the program of each."""
    if not accesses:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    programs = np.repeat([program for program, _ in accesses], [len(at) for _, at in accesses])
    return np.concatenate([at for _, at in accesses]), programs


def _within(at: Addresses, tensor: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which addresses are those of values of the tensor."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.unique(offsets[:, None] + np.arange(size) * stride)
    return np.isin(at, tensor.data_ptr() + offsets * tensor.element_size())


def _storages() -> Iterator[torch.UntypedStorage]:
    for found in gc.get_objects():
        # Not `isinstance`, which some objects warn of.
        if issubclass(type(found), Tensor) and found.device.type == "cpu" and found.layout == torch.strided:
            yield found.untyped_storage()


@contextmanager
def watched() -> Iterator[None]:
    """Within this context a launch that does one of these raises `WatchedError`, at its end at the latest."""
    from triton.runtime import interpreter

    builder: Any = type(interpreter.interpreter_builder)
    launches: list[_Launch] = []
    run, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def launch(executor: Any, *args: Any, **options: Any) -> None:
        tensors = [t for t in (*args, *options.values()) if isinstance(t, Tensor)]
        launches.append(_Launch(executor.fn.__name__, tensors))
        try:
            run(executor, *args, **options)
            launches[-1].ends()
        finally:
            launches.pop()

    def at(builder: Any, pointers: Any, mask: Any) -> Addresses:
        (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
        launches[-1].starts((x * ny + y) * nz + z)
        return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel().astype(np.int64)

    def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if len(places := at(builder, pointers, mask)):
            launches[-1].reads(places)
        return load(builder, pointers, mask, *rest)

    def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if len(places := at(builder, pointers, mask)):
            launches[-1].writes(places)
        return store(builder, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        yield
