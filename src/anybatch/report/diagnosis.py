"""The page on which probes of one model stand together, findings first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anybatch.files import write_file
from anybatch.probe import BatchDependence
from anybatch.probe.result import Cell, Finding, Result, Table, shown
from anybatch.report.page import image, rendered
from anybatch.report.probe_figures import drawn

LEVELS = ("fault", "warning", "note", "good")
EXPLAINED: dict[str, str] = {
    "batch_dependence": "Each layer gets its own input again with all samples but the first exchanged. Where the first "
    "one's output changes, the layer mixes samples. For norms of the batch: from how many values a statistic comes, "
    "how far its mean errs, and from which batch on it is steady.",
    "split_invariance": "The gradient of one batch against the mean over its parts, which is what accumulating "
    "gradients or splitting a batch over devices gives.",
    "tile_consistency": "The network on a tile against the network on the whole image, and each norm on the middle of "
    "its own input. Padding changes a border; layers that take statistics of the whole map change every position.",
    "signal_propagation": "Moments of each channel behind each block, averaged over channels, of the residual "
    "branches, and the norm of the loss's gradient there.",
    "elimination_singularities": "Channel statistics in front of scale and shift: batch normalization gives mean 0 and "
    "deviation 1. Dead units are above 0 for less than 1 % of the values, units that are always on for more than 99 %.",
    "smoothness": "A walk against the gradient; and which parts of the squared gradient of filters lie along the "
    "constant filter and along the filter itself, which Weight Standardization removes.",
}
"""What each probe measures, by its name."""


NOISE = Finding(
    "note",
    "Inputs are noise, whose pixels are independent and whose samples are alike. Images are neither: statistics of a "
    "batch err more on them than is told here, and are steady from a larger batch only.",
    "measure on your own images, by --data.",
)
"""What goes with findings about statistics of a batch where no images were given."""


def on_noise(result: Result) -> Result:
    """A result with `NOISE` among its findings, where it tells of statistics of a batch."""
    if not (isinstance(result, BatchDependence) and any(x.scope == "batch" for x in result.layers)):
        return result
    return replace(result, findings=(*result.findings, NOISE))


@dataclass(frozen=True)
class Entry:
    """One probe of a model."""

    name: str
    """Of the function in `anybatch.probe`."""
    result: Result | None
    """None where it could not run."""
    error: str = ""
    seconds: float = 0.0
    before: Result | None = None
    """Of the network before training."""


def findings(entries: Sequence[Entry]) -> list[tuple[tuple[str, ...], Finding]]:
    """All findings, each once, with the names of their probes, the gravest first."""
    probes: dict[Finding, list[str]] = {}
    for entry in entries:
        for finding in () if entry.result is None else entry.result.findings:
            probes.setdefault(finding, []).append(entry.name)
    return sorted(((tuple(names), f) for f, names in probes.items()), key=lambda pair: LEVELS.index(pair[1].level))


def render(entries: Sequence[Entry], *, title: str, facts: Mapping[str, str], reproduce: str) -> str:
    """The page, self-contained: figures are inside, and nothing is fetched.

    Args:
        entries: The probes, in order.
        title: Heading of the page.
        facts: What the model and its inputs are, by name.
        reproduce: The command that makes the page again.
    """
    sections = []
    for entry in entries:
        table = None if entry.result is None else _filled(entry.result.table())
        sections.append(
            {
                "entry": entry,
                "title": entry.name.replace("_", " ") if entry.result is None else entry.result.title,
                "explained": EXPLAINED[entry.name],
                "figure": _picture(entry),
                "finite": entry.result is None or entry.result.finite,
                "table": table,
            }
        )
    return rendered(
        "diagnosis.html",
        {"shown": _shown},
        title=title,
        facts=facts,
        findings=findings(entries),
        sections=sections,
        reproduce=reproduce,
    )


def _filled(table: Table) -> Table:
    """Without columns that hold nothing."""
    kept = [i for i in range(len(table.head)) if any(row[i] is not None for row in table.rows)]
    return Table(tuple(table.head[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in table.rows))


def _picture(entry: Entry) -> str | None:
    try:
        figure = None if entry.result is None else drawn(entry.result, entry.before)
        return None if figure is None else image(figure)
    except ValueError:  # of axes that end at what is not finite
        if entry.result is None or entry.result.finite:
            raise
        return None


def write(entries: Sequence[Entry], out: Path, *, title: str, facts: Mapping[str, str], reproduce: str) -> Path:
    """Write `render`'s page as ``report.html`` into a folder, which is made if need be; its path."""
    page = render(entries, title=title, facts=facts, reproduce=reproduce)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    write_file(path, page.encode())
    return path


def _shown(cell: Cell) -> str:
    return shown(cell).replace("-", "−") if isinstance(cell, (int, float)) else shown(cell) or "–"
