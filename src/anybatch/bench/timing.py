"""Times of several variants of the same work, taken side by side, and the memory that one run takes."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Clock = Literal["cpu", "wall", "device"]
"""Time that this process spent computing, which other load on the machine disturbs little; time on the wall; time
between two events on a GPU."""

MOST_RUNS = 2000
"""In one measurement."""


@dataclass(frozen=True)
class Work:
    """One variant.

    Args:
        run: What is timed.
        before: What is done before each run and not timed; then a measurement is of one run.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None


def clock_of(device: torch.device, threads: int) -> Clock:
    """The steadiest clock that is right: with several threads processor time adds them up."""
    if device.type == "cuda":
        return "device"
    return "cpu" if threads == 1 else "wall"


def interleaved(
    works: Mapping[str, Work],
    *,
    clock: Clock,
    repeats: int,
    least: float,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of one run of each variant, round after round; the order within a round is drawn anew.

    Args:
        works: By name. Each is run once or more before it is timed.
        clock: How time is taken.
        repeats: Rounds.
        least: Seconds that a measurement fills with runs.
        seed: Of the order.
        tick: Called after each measurement.
    """
    counts: dict[str, int] = {}
    for name, work in works.items():
        _seconds(work, 1, clock)
        once = _seconds(work, 1, clock)
        counts[name] = 1 if work.before else min(max(1, math.ceil(least / max(once, 1e-7))), MOST_RUNS)
    order, draw = list(works), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        draw.shuffle(order)
        for name in order:
            times[name].append(_seconds(works[name], counts[name], clock))
            tick()
    return times


def _seconds(work: Work, runs: int, clock: Clock) -> float:
    if work.before is not None:
        work.before()
    if clock == "device":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        for _ in range(runs):
            work.run()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1000 / runs
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    for _ in range(runs):
        work.run()
    return (now() - start) / runs


def ratio(times: Sequence[float], baseline: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median of the rounds' ratios, and their quartiles.

    >>> ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    (2.0, (1.75, 3.0))
    """
    found = [a / max(b, 1e-9) for a, b in zip(times, baseline, strict=True)]
    if len(found) == 1:
        return found[0], (found[0], found[0])
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return middle, (low, high)


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """What runs the same kernels as one CUDA graph; what cannot be captured raises a `RuntimeError`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_: object = run) -> None:  # which holds the tensors that the graph reads
        graph.replay()

    return replay


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that one run has allocated at a time, without those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to standard error
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results: Any = profiled.profiler.kineto_results if profiled.profiler is not None else None
    events = [] if results is None else [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def settle_allocator() -> bool:
    """Keep glibc from handing freed memory back to the system, for good; True where there is glibc to be told so.

    Training steps of larger networks fetch it again each time, which costs 5 to 15 % of them; how much falls on whom is
    chance. For measurements alone: steps of small networks may take longer so (docs/log.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        tell = ctypes.CDLL("libc.so.6").mallopt
        no_trimming, no_mapping = tell(-1, -1), tell(-4, 0)
        return bool(no_trimming and no_mapping)
    return False
