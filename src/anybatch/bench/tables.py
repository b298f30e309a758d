"""Rows and targets as people read them: lines of a table, and ``docs/speed.md``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anybatch.bench.choice import CASES
from anybatch.bench.targets import Judged, is_gpu, judged

MARKS = {
    "aim": "reaches what we aim at",
    "must": "holds",
    "short": "**falls short**",
    "not measured": "not measured",
}


def short(value: float | None, digits: int = 3) -> str:
    """A number, or a dash.

    >>> short(0.98765), short(1234.5), short(None)
    ('0.988', '1,234', '–')
    """
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def size_of(facts: Mapping[str, Any]) -> str:
    """A cell's facts in a few words."""
    told = {name: value for name, value in facts.items() if name != "mode"}
    units = {"batch_size": "batch {}", "size": "{} px", "clipped": "{} units clipped", "mean": "mean {:g}"}
    return ", ".join(units.get(name, "{}").format(value) for name, value in told.items())


def bytes_of(count: int | None) -> str:
    """In MiB."""
    return "–" if count is None else f"{count / 2**20:,.1f}"


def mode_of(row: Mapping[str, Any]) -> str:
    """How it ran, and whether Triton kernels were tuned."""
    return f"{row['mode']}, autotuned" if row.get("autotuned") else row["mode"]


HEADINGS = ("case", "of", "variant", "mode", "ratio", "quartiles", "ms", "images/s", "kept, MiB", "ratio")
HEADINGS += ("peak, MiB", "error")


def line(row: Mapping[str, Any]) -> list[str]:
    """One row under `HEADINGS`; of one that was not timed, why."""
    told = [row["case"], size_of(row["facts"]), row["variant"], mode_of(row)]
    if row["status"] != "ok":
        return [*told, row["status"], str(row["message"]), *[""] * 5, short(row["error"], 2)]
    if row["value"] is not None:
        return [*told, *[""] * 7, short(row["value"], 2)]
    quartiles = "" if row["quartiles"] is None else " to ".join(short(value) for value in row["quartiles"])
    milliseconds = None if row["seconds"] is None else 1000 * row["seconds"]
    speed = "" if row["images_per_second"] is None else short(row["images_per_second"])
    kept = ("", "") if row["saved_bytes"] is None else (bytes_of(row["saved_bytes"]), short(row["saved_ratio"]))
    error = "" if row["error"] is None else short(row["error"], 2)
    peak = "" if row["peak_bytes"] is None else bytes_of(row["peak_bytes"])
    return [*told, short(row["ratio"]), quartiles, short(milliseconds), speed, *kept, peak, error]


def target_line(one: Judged) -> list[str]:
    """Under ``what, today, must, aim, measured, range, mark``."""
    target = one.target
    spread = "" if one.cells < 2 else f"{short(one.low)} to {short(one.high)} over {one.cells}"
    return [
        f"{target.what}, GPU" if target.gpu else target.what,
        target.before or "–",
        f"≤ {short(target.must)}",
        f"≤ {short(target.aim)}",
        short(one.measured) if one.measured is not None else "",
        spread,
        "not measured on a GPU" if target.gpu and one.measured is None else MARKS[one.mark],
    ]


TARGET_HEADINGS = ("what", "before", "must", "aim", "measured", "range", "")


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines.

    >>> markdown(["a", "b"], [["1", "2|3"]])
    ['| a | b |', '|---|---|', '| 1 | 2\\\\|3 |']
    """
    rows = [headings, ["---"] * len(headings), *lines]
    made = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    made[1] = "|" + "---|" * len(headings)
    return made


def plain(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines in columns of equal width.

    >>> plain(["a", "b"], [["10", "2"]])
    ['a   b', '10  2']
    """
    rows = [list(headings), *(list(one) for one in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _mean_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Blocks and norms have too many shapes to list: their geometric means over them."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["ratio"] is not None and row["variant"] != row["baseline"]:
            name = row["variant"].partition("(window")[0]
            facts = row["facts"]
            key = (name, mode_of(row), facts["memory_format"], str(facts["batch_size"]), row["precision"])
            groups.setdefault(key, []).append(row)
    made = []
    for key, members in groups.items():
        ratios = [row["ratio"] for row in members]
        spread = f"{short(min(ratios))} to {short(max(ratios))}"
        made.append([*key, short(statistics.geometric_mean(ratios)), spread, str(len(ratios))])
    return made


def speed_page(by_machine: Mapping[str, Sequence[Mapping[str, Any]]], command: str) -> str:
    """``docs/speed.md``: the targets, then everything that was measured.

    Args:
        by_machine: Rows of each kind of machine.
        command: How the rows are made.
    """
    by_device = [(_device(rows), rows) for rows in by_machine.values() if rows]
    text = [
        "# Speed",
        "",
        f"Made by `make speed` from the rows in `benchmarks/rows/`, which `{command}` appends to. A number is a ratio "
        "to the BatchNorm of the same work (for convolutions with norm and ReLU; for norms with ReLU; of whole "
        "training steps), forward and backward, where nothing else is said: the median over rounds of the ratio within "
        "a round, each of which times every variant once in an order drawn anew. With one thread the processor's time "
        "is taken. Over several shapes the geometric mean or, as told, the largest counts. Outputs, and of layers "
        "gradients, agreed with float64 before. Of kernels as they are (`eager`) and with compiled passes (`helpers`) "
        "the faster counts; the network around them and BatchNorm's run in eager mode.",
        "",
        "## Targets",
    ]
    for device, rows in by_device:
        own = (one for one in judged(rows) if one.target.gpu == is_gpu(rows[0]["machine"]))
        text += ["", f"### {device}", "", *markdown(TARGET_HEADINGS, map(target_line, own))]
        measured = {row["case"] for row in rows}
        if is_gpu(rows[0]["machine"]) and (left := [case for case in CASES if case not in measured]):
            text += ["", f"Not measured there: {', '.join(left)}; `{command} --cases {','.join(left)}` does it."]
    if not any(is_gpu(rows[0]["machine"]) for _, rows in by_device):
        text += ["", f"Nothing was measured on a GPU. On a machine that has one, `{command}` does it."]
    for device, rows in by_device:
        versions = dict.fromkeys(f"torch {row['versions']['torch']}" for row in rows)
        text += ["", f"## {device}", "", f"{'; '.join(versions)}."]
        for case in dict.fromkeys(row["case"] for row in rows):
            mine = [row for row in rows if row["case"] == case]
            text += ["", f"### {case}", ""]
            if case in ("conv", "norm", "recompute"):
                headings = ("variant", "mode", "memory format", "batch", "precision", "ratio", "range", "shapes")
                text += markdown(headings, _mean_lines(mine))
                wrong = [line(row) for row in mine if row["status"] != "ok"]
                text += ["", *markdown(HEADINGS, wrong)] if wrong else []
            else:
                text += markdown(HEADINGS[1:], (line(row)[1:] for row in mine))
    return "\n".join(text) + "\n"


def _device(rows: Sequence[Mapping[str, Any]]) -> str:
    """What rows of one kind of machine ran on."""
    return "; ".join(
        dict.fromkeys(f"{row['device']}, {row['threads']} thread" + "s" * (row["threads"] > 1) for row in rows)
    )


def comparison(first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """For what both hold: ratios to the baseline in both, and those of the second to the first, of ratio and time."""
    others = {_work(row): row for row in second}
    made = []
    for row in first:
        other = others.get(_work(row))
        if other is None:
            continue
        told = [row["case"], size_of(row["facts"]), row["variant"], row["mode"]]
        if row["status"] != "ok" or other["status"] != "ok":
            made.append([*told, row["status"], other["status"], "", "", ""])
            continue
        number = "value" if row["value"] is not None else "ratio"
        made.append(
            [
                *told,
                short(row[number]),
                short(other[number]),
                short(_over(other[number], row[number])),
                short(_over(other["seconds"], row["seconds"])),
                short(_over(other["saved_bytes"], row["saved_bytes"])),
            ]
        )
    return made


def _work(row: Mapping[str, Any]) -> str:
    """A row's id without the machine."""
    return row["id"].replace(f" {row['machine']} ", " ")


COMPARISON_HEADINGS = ("case", "of", "variant", "mode", "first", "second", "second/first", "time", "kept")


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
