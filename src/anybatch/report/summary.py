"""Rows reduced to the numbers of a study: what ``summary.json`` holds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean, median, stdev
from typing import Any, TypedDict

from anybatch.report import verdict
from anybatch.report.statistics import LEVEL, Estimate, difference, estimate
from anybatch.rows import DataFacts, Row, flatten

CELL_KEYS = ("model.scheme", "data.batch_size", "train.seed")
"""What a study varies: the cell, and the seed within it."""


class Failure(TypedDict):
    seed: int
    message: str


class Cell(TypedDict):
    """One scheme at one batch size. Numbers of finished runs; None or empty where none finished."""

    scheme: str
    batch_size: int
    n: int
    """Runs that finished, one a seed."""
    seeds: list[int]
    errors: list[float]
    """In percent, in the order of ``seeds``."""
    mean: float | None
    """Of ``errors``."""
    sd: float | None
    """Of ``errors``, in points; None with one seed."""
    interval: float | None
    """Half-width of the 95 % interval around the mean, in points (`anybatch.report.statistics`); None with one seed."""
    best: bool
    """Not told apart from the lowest mean at its batch size; False where fewer than two cells can be compared."""
    failed: list[Failure]
    images_per_second: float | None
    """In training; the median over seeds."""
    peak_memory: int | None
    """Bytes; the median over seeds."""
    seconds: float | None
    """Wall time of a run; the median over seeds."""
    peak_lr: list[float]
    """Every peak learning rate that was used."""
    parameters: int | None
    multiply_adds: int | None
    """Of one image's forward pass."""


class Difference(TypedDict):
    """Of two mean errors, with the half-width of its simultaneous 95 % interval, both in points."""

    scheme: str
    batch_size: int
    other_scheme: str
    other_batch_size: int
    difference: float
    """The first mean minus the other."""
    interval: float
    comparisons: int
    """How many differences the interval holds for at once (Bonferroni)."""
    distinct: bool
    """The interval excludes 0."""


class Trial(TypedDict):
    """One learning rate that was tried in tuning."""

    scheme: str
    batch_size: int
    peak_lr: float
    error: float | None
    """In percent, on images set aside from the training images; the mean over its runs, None where all failed."""
    runs: int
    failed: int
    chosen: bool
    """The cell's runs used it."""


class Settings(TypedDict):
    recipe: dict[str, Any]
    """Dotted path to the value that all runs share."""
    varied: dict[str, list[Any]]
    """Dotted path to the values, where they differ between runs; scheme, batch size and seed left out."""
    versions: dict[str, list[str]]
    devices: list[str]
    threads: list[int]


class Runs(TypedDict):
    finished: int
    failed: int
    tuning: int
    seconds: float
    """Wall time of all runs added up; with runs side by side the study took less."""


class Summary(TypedDict):
    """What ``summary.json`` holds and ``anybatch compare --json`` prints."""

    format: int
    verdict: list[str]
    """Plain sentences; a difference is claimed only where its simultaneous interval excludes 0."""
    level: float
    """Of all intervals."""
    schemes: list[str]
    """In order of first appearance."""
    batch_sizes: list[int]
    """Ascending."""
    cells: list[Cell]
    """By scheme, then batch size; only those with a run."""
    between_schemes: list[Difference]
    """At each batch size, all pairs of cells with two seeds or more, the higher mean first."""
    against_largest: list[Difference]
    """Each scheme's smaller batch sizes against the largest that it has two seeds at."""
    chance: float | None
    """Error of guessing in percent, classes being equally frequent."""
    data: DataFacts | None
    memory_measure: list[str]
    """What ``peak_memory`` measures, in words."""
    tuning: list[Trial]
    settings: Settings
    runs: Runs


def summarize(rows: Sequence[Row]) -> Summary:
    """The numbers and the verdict of the rows; `Summary`, `Cell` and `Difference` say what each key holds.

    A row that repeats an earlier run (the same id and purpose) replaces it.
    """
    rows = latest(rows)
    runs = [row for row in rows if row["purpose"] == "run"]
    schemes = list(dict.fromkeys(scheme_of(row) for row in runs))
    batch_sizes = sorted({batch_size_of(row) for row in runs})
    by_cell: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in runs:
        by_cell[scheme_of(row), batch_size_of(row)].append(row)
    estimates = {key: found for key, members in by_cell.items() if (found := _estimate(members)) is not None}
    between = [pair for b in batch_sizes for pair in _between_schemes(b, schemes, estimates)]
    against = [pair for s in schemes for pair in _against_largest(s, batch_sizes, estimates)]
    cells = [
        _cell(s, b, by_cell[s, b], estimates.get((s, b)), between)
        for s in schemes
        for b in batch_sizes
        if (s, b) in by_cell
    ]
    data = next((row["data"] for row in [*filter(finished, runs), *rows] if row["data"] is not None), None)
    summary = Summary(
        format=1,
        verdict=[],
        level=LEVEL,
        schemes=schemes,
        batch_sizes=batch_sizes,
        cells=cells,
        between_schemes=between,
        against_largest=against,
        chance=100 * (1 - 1 / len(data["classes"])) if data and data["classes"] else None,
        data=data,
        memory_measure=sorted({row["memory_measure"] for row in runs if row["peak_memory"] is not None}),
        tuning=_tuning(rows, cells),
        settings=_settings(runs or rows),
        runs=Runs(
            finished=sum(map(finished, runs)),
            failed=sum(not finished(row) for row in runs),
            tuning=len(rows) - len(runs),
            seconds=sum(row["seconds"] for row in rows),
        ),
    )
    summary["verdict"] = verdict.sentences(summary)
    return summary


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each run, at the place of its first."""
    return list({(row["purpose"], row["id"]): row for row in rows}.values())


def scheme_of(row: Row) -> str:
    return str(row["recipe"]["model"]["scheme"])


def batch_size_of(row: Row) -> int:
    return row["recipe"]["data"]["batch_size"]


def finished(row: Row) -> bool:
    return row["status"] == "ok" and row["error"] is not None and math.isfinite(row["error"])


def _errors(rows: Sequence[Row]) -> list[float]:
    return [100 * row["error"] for row in rows if row["error"] is not None and finished(row)]


def _estimate(rows: Sequence[Row]) -> Estimate | None:
    errors = _errors(rows)
    images = min((row["data"]["val_images"] for row in rows if row["data"] and finished(row)), default=1)
    return estimate(errors, max(images, 1)) if errors else None


def _between_schemes(
    batch: int, schemes: Sequence[str], estimates: Mapping[tuple[str, int], Estimate]
) -> Iterator[Difference]:
    """All pairs, and the interval is for all of them: which pairs are looked at depends on which mean is lowest."""
    known = [s for s in schemes if (s, batch) in estimates and estimates[s, batch].n > 1]
    known.sort(key=lambda s: estimates[s, batch].mean)
    pairs = list(combinations(known, 2))
    for low, high in pairs:
        yield _difference((high, batch), (low, batch), estimates, len(pairs))


def _against_largest(
    scheme: str, batch_sizes: Sequence[int], estimates: Mapping[tuple[str, int], Estimate]
) -> Iterator[Difference]:
    known = [b for b in batch_sizes if (scheme, b) in estimates and estimates[scheme, b].n > 1]
    for b in known[:-1]:
        yield _difference((scheme, b), (scheme, known[-1]), estimates, len(known) - 1)


def _difference(
    one: tuple[str, int], other: tuple[str, int], estimates: Mapping[tuple[str, int], Estimate], comparisons: int
) -> Difference:
    found, interval = difference(estimates[one], estimates[other], comparisons=comparisons)
    if interval is None:
        raise ValueError(f"one run has no interval: {one} and {other} need two seeds each")
    return Difference(
        scheme=one[0],
        batch_size=one[1],
        other_scheme=other[0],
        other_batch_size=other[1],
        difference=found,
        interval=interval,
        comparisons=comparisons,
        distinct=abs(found) > interval,
    )


def _cell(scheme: str, batch: int, rows: Sequence[Row], found: Estimate | None, between: Sequence[Difference]) -> Cell:
    rows = sorted(rows, key=lambda row: row["seed"])
    done = [row for row in rows if finished(row)]
    errors = _errors(done)
    speeds = [row["images_per_second"] for row in done if row["images_per_second"] is not None]
    memory = [row["peak_memory"] for row in done if row["peak_memory"] is not None]
    here = [d for d in between if d["batch_size"] == batch]
    lowest = here[0]["other_scheme"] if here else None
    worse = {d["scheme"] for d in here if d["other_scheme"] == lowest and d["distinct"]}
    return Cell(
        scheme=scheme,
        batch_size=batch,
        n=len(done),
        seeds=[row["seed"] for row in done],
        errors=errors,
        mean=found.mean if found else None,
        sd=stdev(errors) if len(errors) > 1 else None,
        interval=found.half_width() if found else None,
        best=lowest is not None and len(errors) > 1 and scheme not in worse,
        failed=[
            Failure(seed=row["seed"], message=row["message"] or "no reason given") for row in rows if not finished(row)
        ],
        images_per_second=median(speeds) if speeds else None,
        peak_memory=int(median(memory)) if memory else None,
        seconds=median(row["seconds"] for row in done) if done else None,
        peak_lr=sorted({row["peak_lr"] for row in rows}),
        parameters=next((row["parameters"] for row in rows if row["parameters"] is not None), None),
        multiply_adds=next((row["multiply_adds"] for row in rows if row["multiply_adds"] is not None), None),
    )


def _tuning(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Trial]:
    used = {(cell["scheme"], cell["batch_size"]): cell["peak_lr"] for cell in cells}
    tried: dict[tuple[str, int, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row["purpose"] == "tune":
            tried[scheme_of(row), batch_size_of(row), row["peak_lr"]].append(row)
    order = list(dict.fromkeys(s for s, _, _ in tried))
    trials = []
    for (s, b, lr), members in sorted(tried.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])):
        errors = _errors(members)
        trials.append(
            Trial(
                scheme=s,
                batch_size=b,
                peak_lr=lr,
                error=fmean(errors) if errors else None,
                runs=len(members),
                failed=len(members) - len(errors),
                chosen=any(math.isclose(lr, rate, rel_tol=1e-9) for rate in used.get((s, b), [])),
            )
        )
    return trials


def _settings(rows: Sequence[Row]) -> Settings:
    values: dict[str, list[Any]] = {}
    versions: dict[str, list[str]] = {}
    for row in rows:
        for path, value in flatten(row["recipe"]):
            _add(values, path, value)
        for name, version in row["versions"].items():
            _add(versions, name, version)
    return Settings(
        recipe={path: found[0] for path, found in values.items() if len(found) == 1 and path not in CELL_KEYS},
        varied={path: found for path, found in values.items() if len(found) > 1 and path not in CELL_KEYS},
        versions=versions,
        devices=list(dict.fromkeys(row["device"] for row in rows if row["device"])),
        threads=sorted({row["threads"] for row in rows}),
    )


def _add(found: dict[str, list[Any]], key: str, value: Any) -> None:
    if value not in (known := found.setdefault(key, [])):
        known.append(value)
