"""Which of a few ways to launch a Triton kernel is the fastest here: measured at its first launch, where asked for.

By default a rule tells how much each program reads at once, and with how many warps. Within
`anybatch.dispatch.autotuned`, or all over a process that starts with ``ANYBATCH_AUTOTUNE=1``, the ways of `SPACES` are
timed once for each kernel, kind of GPU, dtypes and shape of a sample, whose sizes are rounded up to powers of two, and
the fastest is taken from then on. All ways give the same but for rounding.

The batch size has no say, so that a sample is the same to the last bit alone and in a batch: whichever batch comes
first is timed. What was found is kept beside the code that Triton compiled (``~/.triton/cache`` by default), so that
other processes on such a GPU round alike, and do not wait again.

Nothing is timed while a CUDA graph is captured, where the rule serves for want of something better, nor in Triton's
interpreter. What a kernel overwrites is copied for that. The first step waits for it: most of that is Triton compiling,
about half a second for each way of each kernel, which is kept too.

What it gains was not measured on a GPU. `anybatch bench --device cuda --out plain.jsonl`, the same with ``--autotune
--out tuned.jsonl``, and ``benchmarks/compare.py plain.jsonl tuned.jsonl`` tell.

`triton.autotune` is not what does this, since it would know ways that hold for all shapes, tune anew for each exact
size, and pass through its search for compiled code at every launch, which a `Plan` spares.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch import __version__, dispatch
from anybatch.kernels.layouts import Layout
from anybatch.kernels.triton_common import INTERPRETED, Plan, power_of_two

_MOST_WARPS = 16
"""Of a program: with more a thread has 64 registers or less."""


class Way(NamedTuple):
    """How a launch compares with the rule's: so many times the values read at once, so many times the warps."""

    tile: float = 1
    warps: float = 1

    def of_values(self, rule: int) -> int:
        return max(1, int(rule * self.tile))

    def of_warps(self, rule: int) -> int:
        return max(1, min(_MOST_WARPS, int(rule * self.warps)))


RULE = Way()
_STREAMED = (RULE, Way(0.5, 1), Way(1, 2), Way(2, 1), Way(2, 2))
_ADDED_UP = (RULE, Way(0.5, 1), Way(0.5, 0.5), Way(1, 2))
_WARPS = (RULE, Way(1, 0.5), Way(1, 2))
_HELD = (RULE, Way(1, 0.5), Way(1, 2), Way(2, 2))

SPACES: dict[str, tuple[Way, ...]] = {
    # Tiles of positions by channels: 2048 values by 4 warps. How many positions make a chunk is the rule's in all ways,
    # since partial sums are counted by it.
    "triton_channel_kernels.moments": _STREAMED,
    "triton_channel_kernels.gradient_sums": _STREAMED,
    "triton_channel_kernels.applied": _STREAMED,
    "triton_channel_kernels.combined": _STREAMED,
    # The same: 4096 values by 4 warps.
    "triton_kn_kernels.pixel_moments": _STREAMED,
    "triton_kn_kernels.normalized": _STREAMED,
    "triton_kn_kernels.through_moments": _STREAMED,
    "triton_positional_kernels.normalized": _STREAMED,
    # Windows by groups by channels of each: 2048 values by 4 warps.
    "triton_kn_kernels.group_means": _STREAMED,
    # Positions by channels again, 2048 values of several tensors by 4 warps. The rows of which one program adds up the
    # parameters' gradients are the rule's, and no more of them are read at once.
    "triton_kn_kernels.pulled": _ADDED_UP,
    "triton_positional_kernels.pulled": _ADDED_UP,
    # Groups that a program holds whole: up to 8192 values, 512 for each warp; twice the values are twice the groups.
    "triton_group_kernels.whole_groups": _HELD,
    "triton_group_kernels.through_whole_groups": _HELD,
    # Tiles whose sums move along one dimension: 256 values for each warp.
    "triton_local_context_kernels.pixel_moments": _WARPS,
    "triton_local_context_kernels.normalized": _WARPS,
    "triton_local_context_kernels.pulled": _WARPS,
    "triton_local_context_kernels.combined": _WARPS,
    # Filters, one a program: 2048 values by 4 warps, or 512 by 1 where filters are small.
    "triton_parameter_kernels.standardize_filters": _STREAMED,
    "triton_parameter_kernels.pull_filters": _STREAMED,
    "triton_parameter_kernels.standardize_all": _STREAMED,
    "triton_parameter_kernels.pull_all": _STREAMED,
}
"""The ways that are timed, by the kernel; the rule's comes first."""

FIXED: dict[str, str] = {
    "triton_group_kernels.group_numbers": "a few numbers of each group",
    "triton_group_kernels.group_coefficients": "a few numbers of each group",
    "triton_channel_kernels.response_numbers": "a few numbers of each channel",
    "triton_channel_kernels.response_coefficients": "a few numbers of each channel",
    "triton_channel_kernels.joined_samples": "a few numbers of each channel",
    "triton_channel_kernels.let_in": "a few numbers of each channel, and changes the estimates that it reads",
    "triton_local_context_kernels.boxed": "maps of two numbers a group, whose sums wait for one another",
    "triton_pieces.added_up": "partial sums, few beside what the launch before it reads",
    "triton_kn_kernels.center_filters": "one layer's filters, few beside its activations",
    "triton_kn_kernels.through_filters": "one layer's filters, few beside its activations",
    "triton_parameter_kernels.clip_units": "clips what it finds by address, which a second run would find clipped",
}
"""Kernels that the rule alone launches, and why."""


def class_of(shape: Sequence[int], *layouts: Layout) -> tuple[Any, ...]:
    """What samples of (N, C, *) have in common that are launched alike: their sizes, about, and their formats."""
    sizes = (power_of_two(shape[1]), power_of_two(math.prod(shape[2:])))
    return (*sizes, *(layout.channel == 1 for layout in layouts))


def name_of(kernel: Any) -> str:
    """Of a kernel in `SPACES` or `FIXED`: the file that it is in, and its own."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"


class Tuned:
    """A launch that is made as the rule says, or in the fastest of the ways of `SPACES`; call it as a `Plan`.

    Args:
        make: The plan of a way. Plans of all ways take the same tensors.
        about: What decides which way is the fastest, besides the kernel and the GPU; no batch size among it.
        overwritten: Which of the tensors the kernel both reads and writes.
    """

    def __init__(self, make: Callable[[Way], Plan], about: Sequence[Any], overwritten: Sequence[int] = ()) -> None:
        self.make = functools.cache(make)
        self.rule = self.make(RULE)
        self.name = name_of(self.rule.kernel)
        self.about, self.overwritten = tuple(about), overwritten

    def __call__(self, *tensors: Tensor | None) -> None:
        plan = self.rule
        if dispatch.autotunes() and not INTERPRETED:
            plan = self.make(self._way(tensors))
        plan(*tensors)

    def _way(self, tensors: Sequence[Tensor | None]) -> Way:
        key = (self.name, _device(), self.about)
        if (way := _found.get(key)) is not None:
            return way
        ways = SPACES[self.name]
        file = _file(key, ways)
        if (way := file.read()) is None:
            if torch.cuda.is_current_stream_capturing():
                return RULE
            if (way := self._fastest(ways, tensors)) is None:
                return RULE
            file.write(way)
        _found[key] = way
        return way

    def _fastest(self, ways: Sequence[Way], tensors: Sequence[Tensor | None]) -> Way | None:
        """None where none could be run, for want of memory."""
        different: dict[Any, Way] = {}  # some are the same where samples are small
        for way in ways:
            plan = self.make(way)
            different.setdefault((plan.grid, plan.numbers, plan.warps), way)
        if len(different) == 1:
            return RULE
        times = dict.fromkeys(different.values(), math.inf)
        for _ in range(2):  # in the first the GPU may still be speeding up
            for way in times:
                with contextlib.suppress(*_failures()):
                    run = functools.partial(self.make(way), *_copied(tensors, self.overwritten))
                    times[way] = min(times[way], _milliseconds(run))
        best = min(times, key=times.__getitem__)
        return best if times[best] < math.inf else None


Launch = Plan | Tuned

_found: dict[tuple[Any, ...], Way] = {}


def _copied(tensors: Sequence[Tensor | None], which: Sequence[int]) -> list[Tensor | None]:
    """The tensors, with copies that lie in memory likewise in place of some; one given twice stays one."""
    copies = {
        id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        for i in which
        if (t := tensors[i]) is not None
    }
    return [copies.get(id(t), t) for t in tensors]


def _milliseconds(run: Callable[[], object]) -> float:
    """The median of runs that find nothing in the cache, after a few that warm up."""
    import triton.testing  # here, since Triton takes a while to import

    median: Any = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    return median


def _failures() -> tuple[type[Exception], ...]:
    """What is raised by a way that this GPU has too few registers or shared memory for, or has no room left to time."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, torch.OutOfMemoryError


def _device() -> str:
    return _name(torch.cuda.current_device())


@functools.cache
def _name(device: int) -> str:
    return torch.cuda.get_device_name(device)


class _File:
    """The way that was found, in Triton's cache."""

    def __init__(self, told: str) -> None:
        from triton.runtime.cache import get_cache_manager

        self.told = told
        self.folder = get_cache_manager(hashlib.sha256(told.encode()).hexdigest())

    def read(self) -> Way | None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a file that is not whole is made anew
            if path := self.folder.get_file("way.json"):
                return Way(**json.loads(Path(path).read_text(encoding="utf-8"))["way"])
        return None

    def write(self, way: Way) -> None:
        self.folder.put(json.dumps({"way": way._asdict(), "of": self.told}), "way.json", binary=False)


def _file(key: tuple[Any, ...], ways: Sequence[Way]) -> _File:
    import triton

    return _File(repr((__version__, triton.__version__, torch.__version__, key, [tuple(way) for way in ways])))
