"""What probes found, drawn: one function for each kind of result."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from anybatch.probe import (
    BatchDependence,
    EliminationSingularities,
    Result,
    SignalPropagation,
    Smoothness,
    SplitInvariance,
    TileConsistency,
)
from anybatch.probe.batch_dependence import STEADY
from anybatch.report.figures import COLORS, MARKERS, STYLE, blank

BLUE, ORANGE, GREEN = COLORS[:3]
WIDTH = 10.4
"""In inches, at which letters on the page are as large as its text."""
_LEAST = 1e-18
"""Where a logarithmic axis shows 0."""


@functools.singledispatch
def drawn(result: Result, before: Result | None = None) -> Figure | None:
    """The figure of a result; None where there is nothing to draw.

    Args:
        result: What a probe returned.
        before: What the same probe returned of the network before training, to lay beneath.
    """
    raise TypeError(f"result must be what a probe returned, got {type(result).__name__}")


@drawn.register
def _(result: BatchDependence, before: Result | None = None) -> Figure | None:
    norms = [layer for layer in result.layers if layer.standard_error is not None]
    if not norms:
        return None
    with mpl.rc_context(STYLE):
        figure = blank(WIDTH, 3.2)
        ax = figure.subplots()
        ax.set_title(f"standard error of each norm's mean at a batch of {result.batch_size}, in standard deviations")
        ax.plot(
            [_nan(x.standard_error) for x in norms], color=BLUE, marker=MARKERS[0], ms=3, label="by number of values"
        )
        ax.plot([_nan(x.measured_error) for x in norms], color=ORANGE, marker=MARKERS[1], ms=3, label="measured")
        ax.axhline(STEADY, color="#555555", linestyle="--", linewidth=1)
        ax.annotate("noisy above", (0, STEADY), xytext=(2, 3), textcoords="offset points", fontsize=9)
        ax.set_yscale("log")
        _by_name(ax, [x.name for x in norms])
        ax.legend(frameon=False)
    return figure


@drawn.register
def _(result: SplitInvariance, before: Result | None = None) -> Figure | None:
    with mpl.rc_context(STYLE):
        figure = blank(WIDTH, 3.2)
        ax = figure.subplots()
        parts = f"{result.batch_size // result.micro} parts of {result.micro}"
        ax.set_title(f"relative difference of gradients, a batch of {result.batch_size} against {parts}")
        least = 1e-17 if result.dtype == "float64" else 1e-9
        values = [max(x.relative, least) for x in result.layers]
        ax.plot(values, color=BLUE, marker=MARKERS[0], ms=3, linewidth=1)
        limit = result.tolerance
        ax.axhline(limit, color="#555555", linestyle="--", linewidth=1)
        ax.annotate(
            "rounding explains what is below", (0, limit), xytext=(2, 3), textcoords="offset points", fontsize=9
        )
        ax.set_yscale("log")
        ax.set_ylim(min(*values, limit) / 5, max(*values, limit) * 8)
        _by_name(ax, [x.name for x in result.layers])
    return figure


@drawn.register
def _(result: TileConsistency, before: Result | None = None) -> Figure | None:
    with mpl.rc_context(STYLE):
        figure = blank(WIDTH, 3.5)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        left.set_title("error map, over the output's size")
        shown = result.error_map.clamp_min(1e-8).numpy()
        image = left.imshow(shown, cmap="viridis", norm=LogNorm(1e-8, 1.0))
        left.grid(False)
        left.set_xticks([])
        left.set_yticks([])
        figure.colorbar(image, ax=left)
        right.set_title("mean error by distance from the tile's edge")
        right.plot([max(v, 1e-8) for v in result.profile], color=BLUE, marker=MARKERS[0], ms=4)
        right.set_yscale("log")
        right.set_ylim(5e-9, 3)
        right.set_xlabel(f"positions of {result.stride:.3g} x {result.stride:.3g} pixels")
    return figure


@drawn.register
def _(result: SignalPropagation, before: Result | None = None) -> Figure | None:
    runs: list[tuple[str, SignalPropagation, dict[str, Any]]] = [
        ("measured", result, {"color": BLUE, "marker": MARKERS[0], "ms": 4})
    ]
    if isinstance(before, SignalPropagation):
        runs.append(("before training", before, {"color": GREEN, "marker": MARKERS[2], "ms": 4, "linestyle": ":"}))
    with mpl.rc_context(STYLE):
        figure = blank(WIDTH, 5.6)
        axes = figure.subplots(2, 2, sharex=True)
        panels = (
            ("average channel squared mean", "squared_mean"),
            ("average channel variance", "variance"),
            ("residual average channel variance", "residual_variance"),
            ("norm of the gradient", "gradient"),
        )
        for ax, (title, field) in zip(axes.flat, panels, strict=True):
            ax.set_title(title)
            known = []
            for label, run, look in runs:
                values = [_nan(getattr(b, field)) for b in run.blocks]
                known += [v for v in values if math.isfinite(v) and v > 0]
                ax.plot(values, label=label, **look)
            if field == "variance" and any(b.expected is not None for b in result.blocks):
                both = (("expected", ORANGE, "--"), ("expected_at_gain", COLORS[3], "-."))
                for name, color, dashes in both:
                    told = "expected" if name == "expected" else "expected at its gains"
                    line = [_nan(getattr(b, name)) for b in result.blocks]
                    ax.plot(line, color=color, linestyle=dashes, label=told)
                    known += [v for v in line if math.isfinite(v)]
            if known and max(known) / min(known) > 20:
                ax.set_yscale("log")
            elif known:
                ax.set_ylim(0, 1.1 * max(known))
            else:
                ax.text(0.5, 0.5, "no residual branch", ha="center", transform=ax.transAxes, color="#555555")
            if len(ax.get_lines()) > 1:
                ax.legend(frameon=False, fontsize=9)
        for ax in axes[1]:
            _by_name(ax, [b.name for b in result.blocks])
    return figure


@drawn.register
def _(result: EliminationSingularities, before: Result | None = None) -> Figure | None:
    with mpl.rc_context(STYLE):
        figure = blank(WIDTH, 3.7)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        left.set_title("channels: mean and deviation")
        depth = [i for i, layer in enumerate(result.layers) for _ in layer.means]
        means, deviations = ([v for x in result.layers for v in getattr(x, f)] for f in ("means", "deviations"))
        dots = left.scatter(means, deviations, c=depth, s=4, cmap="viridis", rasterized=True)
        left.plot([0], [1], marker="X", color=ORANGE, ms=9, linestyle="", label="batch norm")
        left.set_xlabel("mean")
        left.set_ylabel("standard deviation")
        reach = max(1.0, *(abs(v) for v in means)) * 1.1
        left.set_xlim(-reach, reach)
        left.set_ylim(0, max(2.0, *deviations) * 1.05)
        left.legend(frameon=False)
        figure.colorbar(dots, ax=left, label="layer")
        right.set_title("units that are off, or on, for nearly all values (%)")
        right.plot([100 * x.dead for x in result.layers], color=BLUE, marker=MARKERS[0], ms=3, label="dead")
        right.plot([100 * x.linear for x in result.layers], color=ORANGE, marker=MARKERS[1], ms=3, label="always on")
        right.set_ylim(-1, max(10.0, *(110 * max(x.dead, x.linear) for x in result.layers)))
        right.legend(frameon=False)
        _by_name(right, [x.name for x in result.layers])
    return figure


@drawn.register
def _(result: Smoothness, before: Result | None = None) -> Figure | None:
    with mpl.rc_context(STYLE):
        figure = blank(WIDTH, 3.4)
        axes = figure.subplots(1, 3 if result.layers else 2, width_ratios=(1, 1, 1.5) if result.layers else (1, 1))
        lengths = [s.length for s in result.steps]
        loss, change = axes[:2]
        loss.set_title("loss")
        loss.plot(lengths, [s.loss for s in result.steps], color=BLUE, marker=MARKERS[0], ms=4)
        loss.axhline(result.loss, color="#555555", linestyle="--", linewidth=1)
        change.set_title("gradient's change")
        changes = [max(s.change, _LEAST) for s in result.steps]
        change.plot(lengths, changes, color=BLUE, marker=MARKERS[0], ms=4)
        change.axhline(1, color="#555555", linestyle="--", linewidth=1)
        if max(changes) / min(changes) > 20:
            change.set_yscale("log")
        for ax in (loss, change):
            ax.set_xscale("log")
            ax.set_xlabel("step over the weights' norm")
        if result.layers:
            ax = axes[2]
            verb = "removed" if result.standardized else "that WS would remove"
            ax.set_title(f"% of gradient {verb}")
            for field, color, label in (("mean", BLUE, "by centering"), ("radial", ORANGE, "by scaling")):
                ax.plot([100 * getattr(x, field) for x in result.layers], color=color, label=label, linewidth=1.2)
            ax.set_ylim(0, None)
            ax.legend(frameon=False)
            _by_name(ax, [x.name for x in result.layers])
    return figure


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _by_name(ax: Axes, names: Sequence[str], most: int = 14) -> None:
    """An axis of layers or blocks, of whose names as many are shown as go."""
    room = ax.get_position().width * ax.figure.get_figwidth() * 2.4  # pyright: ignore[reportAttributeAccessIssue]
    every = max(1, math.ceil(len(names) / max(2, min(most, int(room)))))
    places = list(range(0, len(names), every))
    ax.set_xticks(places, [names[i] for i in places], rotation=40, ha="right", fontsize=8, rotation_mode="anchor")
    ax.set_xlim(-0.5, len(names) - 0.5)
