"""Rows of measurements: each variant of each cell checked, timed beside its baseline, and written down."""

from __future__ import annotations

import gc
import math
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

import anybatch
from anybatch import dispatch, rows
from anybatch.bench import cases, timing
from anybatch.bench.cell import Cell, Variant
from anybatch.bench.choice import Settings
from anybatch.measure import device_name

FORMAT = 1
KEYS = frozenset({"format", "id", "status", "case", "variant", "facts", "quick"})


class Row(TypedDict):
    """One variant in one cell; `None` stands where there is no number."""

    format: int
    id: str
    """The same for what can be compared between two files."""
    status: str
    """``"ok"``, ``"refused"`` where the check failed, or ``"failed"``."""
    message: str | None
    case: str
    facts: dict[str, Any]
    """Sizes, memory format, and, for whole networks, the model."""
    variant: str
    mode: str
    """``"eager"``; ``"helpers"``: kernels with compiled passes; ``"compiled"``: all by torch.compile; ``"graph"``."""
    precision: str
    baseline: str
    """The variant that ratios are to, in the same mode where it has that, else in eager mode."""
    ratio: float | None
    """The median of the rounds' ratios of time."""
    quartiles: tuple[float, float] | None
    ratio_to_eager: float | None
    """The same to the baseline in eager mode."""
    seconds: float | None
    """The median of one run."""
    rounds: int
    clock: str
    """``"cpu"``: processor time of one thread; ``"wall"``; ``"device"``."""
    images_per_second: float | None
    saved_bytes: int | None
    """Kept for backward, parameters left out."""
    saved_ratio: float | None
    peak_bytes: int | None
    """The most that one run has allocated at a time."""
    peak_ratio: float | None
    value: float | None
    """A number that is no time, such as an error."""
    error: float | None
    """Relative to float64, of the tensor for which it was nearest to what is allowed."""
    allowed: float | None
    machine: str
    """The kind of processor or GPU; rows of one kind are kept in one file."""
    device: str
    threads: int
    versions: dict[str, str]
    quick: bool
    """Whether shapes were tiny, so that times mean nothing; no target counts these."""
    autotuned: bool
    """Whether Triton kernels were tuned; files from before that was told lack it."""
    settled: bool
    """Whether the allocator was kept from returning memory to the system."""
    started: str
    """Time in UTC, ISO 8601."""


def machine_of(device: torch.device) -> str:
    """The kind of machine, as part of a file name: ``"cpu-"`` and the processor with its cores, or the GPU."""
    name = device_name(device).lower().replace("(r)", " ").replace("(tm)", " ")
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def file_in(out: Path, device: torch.device) -> Path:
    """``out`` if that is a ``.jsonl`` file, else the file for this kind of machine in that folder."""
    return out if out.suffix == ".jsonl" else out / f"{machine_of(device)}.jsonl"


def read(path: Path) -> list[Row]:
    """The rows of a file, of each `Row.id` the last, and none where there is no file."""
    found = {row["id"]: row for row in rows.read_kind(path, KEYS, FORMAT)}
    return list(found.values())  # pyright: ignore[reportReturnType] (mappings with the keys of a row)


def run(
    chosen: Settings,
    path: Path | None = None,
    *,
    tell: Callable[[int, int, str], object] = lambda done, total, text: None,
    got: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """Measure; rows are appended to the file as they come.

    Args:
        chosen: What to measure.
        path: A ``.jsonl`` file, or None for none. What it holds already must be rows.
        tell: Called with cells done, cells in all, and what comes next.
        got: Called with each row.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        read(path)  # now, so that one that holds something else is told before anything is measured
        rows.repair(path, KEYS, FORMAT)
    settled = timing.settle_allocator()
    found: list[Row] = []
    todo = list(cases.cells(chosen))
    with _surroundings(chosen):
        for done, cell in enumerate(todo):
            text = " ".join([cell.case, *(str(value) for value in cell.facts.values())])
            tell(done, len(todo), text)
            for row in _rows(cell, chosen, partial(tell, done, len(todo), text)):
                row["settled"] = settled
                found.append(row)
                if path is not None:
                    rows.append(path, row)
                got(row)
            _tidy(chosen)
        tell(len(todo), len(todo), "")
    return found


@contextmanager
def _surroundings(chosen: Settings) -> Iterator[None]:
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(chosen.threads)
        if chosen.autotune:
            stack.enter_context(dispatch.autotuned())
        stack.enter_context(torch.random.fork_rng(devices=[chosen.device] if chosen.gpu else []))
        if chosen.helpers or "compiled" in chosen.modes:
            import torch._dynamo.config as dynamo  # here, since it takes a second

            # More shapes than this share a function; past its limit torch would silently run what is not compiled.
            patch: Any = dynamo.patch  # pyright: ignore[reportAttributeAccessIssue] (made when imported)
            stack.enter_context(patch(recompile_limit=256, accumulated_recompile_limit=4096))
        yield


def _tidy(chosen: Settings) -> None:
    if "compiled" in chosen.modes:
        torch.compiler.reset()
    gc.collect()
    if chosen.gpu:
        torch.cuda.empty_cache()


def _rows(cell: Cell, chosen: Settings, tick: Callable[[], object]) -> Iterator[Row]:
    for name, value in cell.values.items():
        row = _blank(cell, chosen, (name, "eager"))
        try:
            number = value()
            row["value"] = number if math.isfinite(number) else None
            if row["value"] is None:
                _end(row, "refused", "no finite number")
        except Exception as error:  # one that cannot run is told, and the others go on
            _end(row, "failed", _line(error))
        yield row
    with ExitStack() as stack:
        ready: dict[tuple[str, str], Variant] = {}
        told: dict[tuple[str, str], Row] = {}
        for key, build in cell.build.items():
            tick()
            row = told[key] = _blank(cell, chosen, key)
            try:
                variant = build()
                stack.enter_context(variant.resources)
                checked = None if variant.check is None else variant.check()
                if checked is not None:
                    row["error"], row["allowed"] = _finite(checked.error), checked.allowed
                if checked is not None and checked.refusal is not None:
                    _end(row, "refused", checked.refusal)
                    continue
                if variant.saved is not None:
                    row["saved_bytes"] = variant.saved()
                if row["autotuned"]:  # so that no peak holds what tuning takes
                    timing.interleaved({"": variant.work}, clock="wall", repeats=0, least=0)
                if cell.peaks and key[1] != "graph":
                    row["peak_bytes"] = timing.peak_bytes(variant.work.run, chosen.device)
                timing.interleaved({"": variant.work}, clock="wall", repeats=0, least=0)
                ready[key] = variant
            except Exception as error:  # one that cannot run is told, and the others go on
                _end(row, "failed", _line(error))
        _time(cell, chosen, ready, told, tick)
        yield from told.values()


def _time(
    cell: Cell,
    chosen: Settings,
    ready: dict[tuple[str, str], Variant],
    told: dict[tuple[str, str], Row],
    tick: Callable[[], object],
) -> None:
    """Fill in times, ratios and memory."""
    if not ready:
        return
    clock = timing.clock_of(chosen.device, chosen.threads)
    works = {f"{name} {mode}": ready[name, mode].work for name, mode in ready}
    times = timing.interleaved(works, clock=clock, repeats=chosen.repeats, least=chosen.least, tick=tick)
    first = next(iter(cell.build))
    for key, variant in ready.items():
        row = told[key]
        own = times[" ".join(key)]
        row["seconds"], row["clock"], row["rounds"] = statistics.median(own), clock, chosen.repeats
        if variant.images is not None:
            row["images_per_second"] = variant.images / max(statistics.median(own), 1e-9)
        base = (first[0], key[1])
        base = base if base in cell.build else first
        row["baseline"] = " ".join(base) if base[1] != key[1] else base[0]
        if base in ready:
            row["ratio"], row["quartiles"] = timing.ratio(own, times[" ".join(base)])
            row["saved_ratio"] = _over(row["saved_bytes"], told[base]["saved_bytes"])
            row["peak_ratio"] = _over(row["peak_bytes"], told[base]["peak_bytes"])
        else:
            _end(row, "failed", f"its baseline, {' '.join(base)}, gave no time")
        if first in ready:
            row["ratio_to_eager"] = timing.ratio(own, times[" ".join(first)])[0]


def _end(row: Row, status: str, message: str) -> None:
    row["status"], row["message"] = status, message


def _over(a: int | None, b: int | None) -> float | None:
    return a / b if a is not None and b else None


def _blank(cell: Cell, chosen: Settings, key: tuple[str, str]) -> Row:
    name, mode = key
    machine = machine_of(chosen.device)
    threads = torch.get_num_threads()
    sizes = [f"{what}={value}" for what, value in cell.facts.items()]
    identity = [cell.case, name, mode, *sizes, chosen.precision, machine, f"threads={threads}"]
    identity += ["quick"] * chosen.quick
    return {
        "format": FORMAT,
        "id": " ".join(identity),
        "status": "ok",
        "message": None,
        "case": cell.case,
        "facts": cell.facts,
        "variant": name,
        "mode": mode,
        "precision": chosen.precision,
        "baseline": "",
        "ratio": None,
        "quartiles": None,
        "ratio_to_eager": None,
        "seconds": None,
        "rounds": 0,
        "clock": "",
        "images_per_second": None,
        "saved_bytes": None,
        "saved_ratio": None,
        "peak_bytes": None,
        "peak_ratio": None,
        "value": None,
        "error": None,
        "allowed": None,
        "machine": machine,
        "device": device_name(chosen.device),
        "threads": threads,
        "versions": {
            "anybatch": anybatch.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"cuda": torch.version.cuda} if torch.version.cuda and chosen.gpu else {}),
        },
        "quick": chosen.quick,
        "autotuned": chosen.gpu and dispatch.autotunes(),
        "settled": False,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
