"""The folder that a study leaves for people and programs."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from matplotlib.figure import Figure

from anybatch.files import write_file
from anybatch.report import figures, words
from anybatch.report.summary import Cell, Settings, Summary, summarize
from anybatch.rows import Row

SYMBOLS = ("●", "■", "▲", "◆", "▼", "✚", "✖")
"""`figures.MARKERS` as characters."""


def write(rows: Sequence[Row], out: Path, *, title: str, reproduce: str, notes: Sequence[str] = ()) -> Summary:
    """Write ``figure.png``, ``figure.svg``, ``summary.json`` and ``report.html`` into a folder.

    Each file is replaced whole: a reader sees the old one or the new one. The same rows give the same bytes.

    Args:
        rows: Of one study, which may be unfinished or have failed.
        out: The folder; made if need be.
        title: Heading of the page.
        reproduce: Commands that make the study again.
        notes: What a reader should know first, such as ``"partial: 12 of 45 runs"``.

    Returns:
        What ``summary.json`` holds.
    """
    summary = summarize(rows)
    overview = figures.overview(summary)
    contents = {
        "figure.png": figures.png(overview),
        "figure.svg": figures.svg(overview),
        "summary.json": (json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "report.html": render(rows, summary, title=title, reproduce=reproduce, notes=notes).encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_file(out / name, content)
    return summary


def render(rows: Sequence[Row], summary: Summary, *, title: str, reproduce: str, notes: Sequence[str] = ()) -> str:
    """The page, self-contained: figures are inside, and nothing is fetched."""
    filters = {
        "percent": words.percent,
        "significant": words.significant,
        "listed": words.listed,
        "unbroken": _unbroken,
        "value": _value,
    }
    return rendered(
        "page.html",
        filters,
        title=title,
        notes=list(notes),
        reproduce=reproduce,
        s=summary,
        cells={(cell["scheme"], cell["batch_size"]): cell for cell in summary["cells"]},
        shaded=len(summary["schemes"]) <= figures.SHADED,
        marks={name: _mark(summary, name) for name in summary["schemes"]},
        sizes={name: _sizes(summary["cells"], name) for name in summary["schemes"]},
        errors=image(figures.errors(summary)),
        costs=image(figures.costs(summary)),
        curves=[(batch, image(drawn)) for batch, drawn in figures.learning_curves(rows, summary)],
        rule=_rate_rule(summary["settings"]),
    )


def rendered(template: str, filters: Mapping[str, Any], **values: Any) -> str:
    """A page from a template beside this file, which finds its style sheet as ``style``."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    page, style = (
        files("anybatch.report").joinpath(name).read_text(encoding="utf-8") for name in (template, "style.css")
    )
    return environment.from_string(page).render(style=markupsafe.Markup(style), **values)


def image(drawn: Figure) -> str:
    """A figure as the address of an image, for a page that holds all it shows."""
    return f"data:image/svg+xml;base64,{base64.b64encode(figures.svg(drawn)).decode()}"


def _mark(summary: Summary, scheme: str) -> dict[str, str]:
    symbol = SYMBOLS[summary["schemes"].index(scheme) % len(SYMBOLS)]
    return {"color": figures.look(summary["schemes"], scheme)["color"], "symbol": symbol}


def _sizes(cells: Sequence[Cell], scheme: str) -> dict[str, int | None]:
    mine = [cell for cell in cells if cell["scheme"] == scheme]
    return {
        "parameters": next((cell["parameters"] for cell in mine if cell["parameters"] is not None), None),
        "multiply_adds": next((cell["multiply_adds"] for cell in mine if cell["multiply_adds"] is not None), None),
    }


def _rate_rule(settings: Settings) -> str:
    """How peak learning rates follow from the recipe, where they were not tuned."""
    recipe = settings["recipe"]
    scaling = recipe.get("optim.lr_scaling")
    if scaling is None or "optim.lr" not in recipe or "optim.lr_batch" not in recipe:
        return "They are those of each run's recipe."
    if scaling == "none":
        return f"The peak is {words.significant(recipe['optim.lr'])} at every batch size."
    images = f"images a step / {recipe['optim.lr_batch']}"
    factor = f"({images})" if scaling == "linear" else f"√({images})"
    return f"The peak is {words.significant(recipe['optim.lr'])} × {factor}."


def _unbroken(sentence: str) -> str:
    """With no line break between a number and its sign."""
    return sentence.replace(" %", "\N{NO-BREAK SPACE}%").replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
