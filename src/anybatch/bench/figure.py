"""Bars of ratios to BatchNorm on a logarithmic axis, with what must hold and what is aimed at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from anybatch.bench.targets import TARGETS
from anybatch.report.figures import COLORS, STYLE

LEAST = 0.02
"""Where the axis begins at the least: work that is all but nothing would make all other bars short."""
NAMES = {"contiguous": "NCHW", "channels_last": "NHWC"}


def _label(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What bars tell apart; the shapes of blocks and norms share one."""
    facts, case = row["facts"], row["case"]
    skipped = {"mode", "shape"} | ({"memory_format"} if case in ("step", "inference", "agc") else set())
    told = {name: value for name, value in facts.items() if name not in skipped}
    words = {"batch_size": "batch {}", "size": "{} px", "clipped": "{} clipped"}
    of = ", ".join(words.get(name, "{}").format(NAMES.get(value, value)) for name, value in told.items())
    name = row["variant"].partition("(window")[0]
    return case, of, name if row["mode"] == "eager" else f"{name}, {row['mode']}"


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A bar for each variant of each case; a thin line spans the shapes it is the geometric mean of.

    None where nothing has a ratio.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["ratio"] and row["variant"] != row["baseline"]:
            groups.setdefault(_label(row), []).append(row)
    if not groups:
        return None
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9.2, max(2.2, 0.6 + 0.2 * (len(groups) + len({key[:2] for key in groups})))))
        drawn.set_layout_engine("constrained")
        ax: Any = drawn.subplots()
        place, heading, places, labels, ends = 0.0, ("", ""), [], [], [1.0]
        colors = {case: COLORS[i % len(COLORS)] for i, case in enumerate(dict.fromkeys(key[0] for key in groups))}
        for key, members in sorted(groups.items(), key=lambda item: item[0][:2]):
            if key[:2] != heading:
                heading, place = key[:2], place + 1
                ax.text(
                    0.0, place, f"{key[0]}: {key[1]}" if key[1] else key[0], transform=ax.get_yaxis_transform(),
                    va="center", ha="right", fontsize=8.5, fontweight="bold", parse_math=False, clip_on=False,
                )  # fmt: skip
                place += 1
            ratios = [row["ratio"] for row in members]
            mean = statistics.geometric_mean(ratios)
            ax.barh(place, math.log10(mean), left=0, height=0.7, color=colors[key[0]], alpha=0.75)
            ax.plot([math.log10(min(ratios)), math.log10(max(ratios))], [place, place], color="#333333", linewidth=0.8)
            for bar, dashes in (("must", "-"), ("aim", ":")):
                bars = [getattr(t, bar) for t in TARGETS if t.number == "ratio" and all(map(t.takes, members))]
                for value in dict.fromkeys(bars[:1]):
                    span = ([math.log10(value)] * 2, [place - 0.42, place + 0.42])
                    ax.plot(*span, color="black", linewidth=1.3, linestyle=dashes)
                    ends.append(value)
            places.append(place)
            labels.append(f"{key[2]}  {mean:.3g}")
            ends += [min(ratios), max(ratios)]
            place += 1
        ax.set_yticks(places, labels, fontsize=8)
        ax.set_ylim(place, -0.2)
        low, high = math.log10(max(min(ends), LEAST)) - 0.05, math.log10(max(ends)) + 0.05
        ax.set_xlim(low, high)
        steps = (1, 2, 5) if high - low < 2.5 else (1,)
        ticks = [m * 10.0**e for e in range(-6, 4) for m in steps if low <= math.log10(m * 10.0**e) <= high]
        ax.xaxis.set_major_locator(FixedLocator([math.log10(tick) for tick in ticks]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{10**x:g}"))
        ax.axvline(0, color="black", linewidth=0.8)
        ax.grid(axis="y", visible=False)
        drawn.suptitle(
            "time / BatchNorm's, or another baseline's as docs/speed.md tells", x=0.01, ha="left", fontsize=11
        )
        cut = f"\nbars that reach {LEAST:g} go on, as their numbers tell" if min(ends) < LEAST else ""
        ax.set_xlabel(f"ratio; a stroke is what must hold, a dotted one what is aimed at{cut}")
    return drawn
