"""The figures: error, speed and memory against batch size, and learning curves."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from anybatch.report.summary import Cell, Summary, batch_size_of, finished, latest, scheme_of, summarize
from anybatch.report.words import significant
from anybatch.rows import Row

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette without its yellow, told apart with any colour vision."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
SHADED = 6
"""With more schemes than this the intervals are thin bars, since so many shaded bands hide one another."""
LOG_FROM = 8
"""Largest over smallest value from which an axis is logarithmic."""
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "svg.hashsalt": "anybatch",
    "figure.facecolor": "white",
}


def figure(rows: Sequence[Row]) -> Figure:
    """Error against batch size with the seeds' interval shaded, and beside it training speed and peak memory."""
    return overview(summarize(rows))


def overview(summary: Summary) -> Figure:
    """`figure` of a summary."""
    with mpl.rc_context(STYLE):
        drawn = blank(8.4, max(4.1, 0.36 * len(summary["schemes"])))
        halves: Any = drawn.subfigures(1, 2, width_ratios=(1.5, 1), wspace=0.04)
        left, right = halves
        _draw_error(left.subplots(), summary)
        _draw_costs(right.subplots(2, 1, sharex=True), summary)
    return drawn


def errors(summary: Summary) -> Figure:
    """The left part of `figure`."""
    with mpl.rc_context(STYLE):
        drawn = blank(5.0, 3.9)
        _draw_error(drawn.subplots(), summary)
    return drawn


def costs(summary: Summary) -> Figure:
    """The right part of `figure`."""
    with mpl.rc_context(STYLE):
        drawn = blank(3.9, 3.95)
        _draw_costs(drawn.subplots(2, 1, sharex=True), summary)
    return drawn


def learning_curves(rows: Sequence[Row], summary: Summary) -> list[tuple[int, Figure]]:
    """For each batch size, the error after each evaluation against images seen; thin: seeds, bold: their mean."""
    runs = [row for row in latest(rows) if row["purpose"] == "run" and row["curve"]]
    seen = [100 * point["error"] for row in runs for point in row["curve"] if math.isfinite(point["error"])]
    found: list[tuple[int, Figure]] = []
    if not seen:
        return found
    for batch in summary["batch_sizes"]:
        here = [row for row in runs if batch_size_of(row) == batch]
        if here:
            with mpl.rc_context(STYLE):
                drawn = blank(3.6, 2.7)
                _draw_curves(drawn.subplots(), here, batch, summary, seen)
            found.append((batch, drawn))
    return found


def svg(drawn: Figure) -> bytes:
    """The same bytes for the same figure, on any day."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        FigureCanvasSVG(drawn).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def png(drawn: Figure, dpi: int = 160) -> bytes:
    """The figure in pixels."""
    buffer = io.BytesIO()
    FigureCanvasAgg(drawn)
    drawn.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def look(schemes: Sequence[str], scheme: str) -> dict[str, Any]:
    """Colour, marker and dashes of a scheme, by its place in the study."""
    place = schemes.index(scheme)
    return {
        "color": COLORS[place % len(COLORS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place // len(COLORS) % len(DASHES)],
    }


def blank(width: float, height: float) -> Figure:
    """A figure with nothing on it, in inches; draw on it within ``mpl.rc_context(STYLE)``."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def _draw_error(ax: Axes, summary: Summary) -> None:
    ax.set_title("error (%) against batch size")
    ax.set_xlabel("batch size")
    cells = [cell for cell in summary["cells"] if cell["mean"] is not None]
    _batch_axis(ax, summary["batch_sizes"])
    if not cells:
        _say_nothing(ax)
        return
    _error_axis(ax, cells)
    lowest, highest = ax.get_ylim()
    ends: list[tuple[float, float, str, str]] = []
    for scheme in summary["schemes"]:
        known = {cell["batch_size"]: cell for cell in cells if cell["scheme"] == scheme}
        shift = _dodge(summary["schemes"], scheme)
        kind = look(summary["schemes"], scheme)
        x = [b * shift for b in summary["batch_sizes"]]
        mean = [_or_nan(known[b]["mean"]) if b in known else math.nan for b in summary["batch_sizes"]]
        half = [_or_nan(known[b]["interval"]) if b in known else math.nan for b in summary["batch_sizes"]]
        low = [max(m - h, lowest) if m == m and h == h else math.nan for m, h in zip(mean, half, strict=True)]
        high = [m + h for m, h in zip(mean, half, strict=True)]
        shaded = len(summary["schemes"]) <= SHADED
        if shaded:
            ax.fill_between(x, low, high, color=kind["color"], alpha=0.13, linewidth=0)
        for index, band in enumerate(zip(x, low, high, strict=True)):
            if not shaded or all(map(math.isnan, [*low[max(index - 1, 0) : index], *low[index + 1 : index + 2]])):
                ax.vlines(
                    *band, color=kind["color"], alpha=0.45, linewidth=1.2 if shaded else 0.8
                )  # nothing to shade between
        ax.plot(x, mean, **kind, linewidth=1.8, markersize=5.5, label=scheme)
        for b, cell in known.items():
            ax.plot(
                [b * shift] * cell["n"], cell["errors"], ".", color=kind["color"], alpha=0.5, markersize=5, zorder=3
            )
        if known:
            last = max(known)
            ends.append((last * shift, known[last]["mean"] or 0.0, scheme, kind["color"]))
    for cell in summary["cells"]:
        if cell["failed"]:
            kind = look(summary["schemes"], cell["scheme"])
            x = cell["batch_size"] * _dodge(summary["schemes"], cell["scheme"])
            ax.plot(
                [x], [0.985], "x", color=kind["color"], transform=ax.get_xaxis_transform(), markersize=7, clip_on=False
            )
    if any(cell["failed"] for cell in summary["cells"]):
        ax.set_xlabel("batch size (×: some run failed)")
    if summary["chance"] and lowest < summary["chance"] < highest:
        ax.axhline(summary["chance"], color="#777777", linewidth=0.9, linestyle=":")
        ax.annotate(
            "guessing", (1, summary["chance"]), xycoords=("axes fraction", "data"), xytext=(-2, 2),
            textcoords="offset points", ha="right", fontsize=8.5, color="#555555",
        )  # fmt: skip
    _label_ends(ax, ends)


def _draw_costs(axes: Sequence[Axes], summary: Summary) -> None:
    speed, memory = axes
    _draw_cost(speed, summary, lambda cell: cell["images_per_second"])
    speed.set_title("training speed (images/s)")
    _draw_cost(memory, summary, lambda cell: cell["peak_memory"] / 2**20 if cell["peak_memory"] is not None else None)
    memory.set_title("peak memory (MiB)")
    memory.set_xlabel("batch size")


def _draw_cost(ax: Axes, summary: Summary, value: Callable[[Cell], float | None]) -> None:
    _batch_axis(ax, summary["batch_sizes"])
    known = {
        (cell["scheme"], cell["batch_size"]): found for cell in summary["cells"] if (found := value(cell)) is not None
    }
    if not known:
        _say_nothing(ax)
        return
    for scheme in summary["schemes"]:
        shift = _dodge(summary["schemes"], scheme)
        x = [b * shift for b in summary["batch_sizes"]]
        y = [known.get((scheme, b), math.nan) for b in summary["batch_sizes"]]
        ax.plot(x, y, **look(summary["schemes"], scheme), linewidth=1.5, markersize=4.5)
    low, high = min(known.values()), max(known.values())
    if low > 0 and high >= 2 * low:
        _log_axis(ax, low / 1.25, high * 1.25)
    else:
        ax.set_ylim(0, high * 1.15 or 1)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: significant(y)))


def _draw_curves(ax: Axes, rows: Sequence[Row], batch: int, summary: Summary, seen: Sequence[float]) -> None:
    ax.set_title(f"batch {batch}")
    ax.set_xlabel("images seen")
    ax.set_ylabel("error (%)")
    for name in summary["schemes"]:
        kind = look(summary["schemes"], name)
        at: dict[int, list[float]] = defaultdict(list)
        mine = [row for row in rows if scheme_of(row) == name]
        for row in mine:
            ax.plot(
                [point["samples"] for point in row["curve"]],
                [100 * point["error"] for point in row["curve"]],
                color=kind["color"], alpha=0.25, linewidth=0.8,
            )  # fmt: skip
        averaged = [row for row in mine if finished(row)] or mine
        for row in averaged:
            for point in row["curve"]:
                at[point["samples"]].append(100 * point["error"])
        shared = {samples: found for samples, found in sorted(at.items()) if len(found) == len(averaged)}
        ax.plot(list(shared), [fmean(found) for found in shared.values()], **kind, linewidth=1.6, markersize=3.5)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: significant(x)))
    low, high = min(seen), max(seen)
    if low > 0 and high >= LOG_FROM * low:
        _log_axis(ax, low / 1.2, high * 1.2, least=4)
    else:
        margin = max(0.08 * (high - low), 0.5)
        ax.set_ylim(max(0.0, low - margin), high + margin)


def _batch_axis(ax: Axes, batch_sizes: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(list(batch_sizes)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if batch_sizes:
        ax.set_xlim(batch_sizes[0] / 2**0.35, batch_sizes[-1] * 2**0.35)


def _error_axis(ax: Axes, cells: Sequence[Cell]) -> None:
    """Limits that show every seed, and of wide intervals as much as does not squeeze the rest."""
    shown = [error for cell in cells for error in cell["errors"]]
    bounds = [(cell["mean"] or 0.0, cell["interval"] or 0.0) for cell in cells]
    low, high = min(shown), max(shown)
    if low > 0 and high >= LOG_FROM * low:
        least = min((mean - half for mean, half in bounds if mean > half), default=low)
        most = max(mean + half for mean, half in bounds)
        _log_axis(ax, max(least, low / 1.5) / 1.08, min(most, high * 1.5, 100.0) * 1.08, least=4)
        return
    span = max(high - low, 0.1 * high, 0.5)
    least = max(min(mean - half for mean, half in bounds), low - span, 0.0)
    most = min(max(mean + half for mean, half in bounds), high + span, 100.0)
    ax.set_ylim(max(0.0, min(least, low) - 0.06 * span), max(most, high) + 0.06 * span)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _log_axis(ax: Axes, low: float, high: float, least: int = 3) -> None:
    """With plain numbers at the ticks, ``least`` of them or a few more."""
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        if sum(low <= tick <= high for tick in ticks) >= least:
            break
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: significant(y)))


def _label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the last points, moved apart where they would overlap, each tied to its point by a thin line."""
    place = ax.transLimits.transform
    scale = ax.transScale.transform
    wanted = sorted((float(place(scale((x, y)))[1]), x, y, name, color) for x, y, name, color in ends)
    gap = min(0.075, 1 / max(len(wanted), 1))
    heights: list[float] = []
    for height, *_ in wanted:
        heights.append(max(min(max(height, 0.0), 1.0), heights[-1] + gap if heights else 0.0))
    ceiling = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    for height, (_, x, y, name, color) in zip(heights, wanted, strict=True):
        ax.annotate(
            _plain(name), (x, y), xytext=(1.03, height), textcoords="axes fraction", va="center", color=color,
            fontweight="bold", parse_math=False, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.5, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _say_nothing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no run has finished", transform=ax.transAxes, ha="center", va="center", color="#777777")
    ax.set_yticks([])


def _dodge(schemes: Sequence[str], scheme: str) -> float:
    """A factor of the batch size that sets schemes side by side, so that equal points don't hide each other."""
    step = min(0.07, 0.6 / len(schemes))
    return 2 ** (step * (schemes.index(scheme) - (len(schemes) - 1) / 2))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(name: str) -> str:
    """A name that the fonts at hand can draw, on one line."""
    shown = name.encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= 32 else f"{shown[:29]}..."
