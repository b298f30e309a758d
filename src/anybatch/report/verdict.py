"""What a study shows, in plain sentences, with nothing claimed that its intervals do not support.

A difference is claimed where its simultaneous interval excludes 0. Where it does not, the sentence gives the
interval, since "cannot be told apart" from three seeds is not "is the same".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from anybatch.report.words import listed, percent, points

if TYPE_CHECKING:
    from anybatch.report.summary import Cell, Difference, Summary

MANY = 4
"""With more schemes than this beside the lowest, those not told apart from it are named without their numbers."""
NEAR_CHANCE = 0.9
"""A mean error above this share of guessing's is called close to guessing."""


def sentences(summary: Summary) -> list[str]:
    """At each batch size which scheme errs least; what each scheme loses at small batches; what failed."""
    cells = [cell for cell in summary["cells"] if cell["mean"] is not None]
    if not cells:
        return ["No run has finished, so nothing is compared.", *_failures(summary)]
    return [
        *_at_batch_sizes(summary, cells),
        *_against_largest(summary),
        *_near_chance(summary, cells),
        *_failures(summary),
    ]


def _at_batch_sizes(summary: Summary, cells: list[Cell]) -> Iterator[str]:
    if all(cell["n"] == 1 for cell in cells):
        yield "No difference is claimed: one seed in each cell gives no interval. The table shows single runs."
        return
    for batch in summary["batch_sizes"]:
        here = [cell for cell in cells if cell["batch_size"] == batch]
        pairs = [d for d in summary["between_schemes"] if d["batch_size"] == batch]
        if pairs:
            lowest = next(cell for cell in here if cell["scheme"] == pairs[0]["other_scheme"])
            yield _at_batch(batch, lowest, [d for d in pairs if d["other_scheme"] == lowest["scheme"]], here)
        single = [cell["scheme"] for cell in here if cell["n"] == 1]
        if single and len(here) > 1:
            yield f"At batch {batch}, {listed(single)} finished one seed only, which gives no interval to compare by."


def _at_batch(batch: int, lowest: Cell, pairs: list[Difference], cells: list[Cell]) -> str:
    means = {cell["scheme"]: cell["mean"] or 0.0 for cell in cells}
    name, error = lowest["scheme"], f"{percent(lowest['mean'] or 0.0)} %"
    if lowest["failed"]:
        error += f" (over the {lowest['n']} of {lowest['n'] + len(lowest['failed'])} runs that finished)"
    place = f"At batch {batch}, "
    if any(cell["n"] == 1 for cell in cells):
        place += "among the schemes with two seeds or more, "
    above = {d["scheme"]: points(d["difference"], d["interval"]) for d in pairs}
    worse = [d["scheme"] for d in pairs if d["distinct"]]
    tied = [d["scheme"] for d in pairs if not d["distinct"]]
    if len(worse) > MANY:
        more = listed([f"{scheme} ({above[scheme]})" for scheme in worse]) + " err so many points more"
    else:
        more = listed([f"{scheme} errs {above[scheme]} points more" for scheme in worse])
    tail = f"; {more} than {name}." if worse else "."
    if not tied:
        return f"{place}{name} has the lowest error, {error}: {more}."
    if len(tied) == 1:
        other = tied[0]
        both = f"{error} and {percent(means[other])} %"
        said = f"{name} and {other} cannot be told apart ({both}, {above[other]} points apart)"
    elif len(tied) > MANY:
        most = percent(max(d["difference"] for d in pairs if not d["distinct"]))
        said = (
            f"{listed(tied)} cannot be told apart from {name}, the lowest mean at {error} (theirs are up to {most} "
            "points higher)"
        )
    else:
        others = listed([f"{scheme} ({above[scheme]} points more)" for scheme in tied])
        said = f"{others} cannot be told apart from {name}, the lowest mean at {error}"
    return f"{place}{said}{tail}"


def _against_largest(summary: Summary) -> Iterator[str]:
    """What schemes lose and gain at small batches, those that do neither in one sentence."""
    steady: dict[tuple[int, str], dict[str, float]] = {}
    for scheme in summary["schemes"]:
        found = [d for d in summary["against_largest"] if d["scheme"] == scheme]
        if not found:
            continue
        reference = found[0]["other_batch_size"]
        losses = [d for d in found if d["distinct"] and d["difference"] > 0]
        gains = [d for d in found if d["distinct"] and d["difference"] < 0]
        rest = [d for d in found if not d["distinct"]]
        bound = max((abs(d["difference"]) + d["interval"] for d in rest), default=0.0)
        if not losses and not gains:
            steady.setdefault((reference, _batches(rest)), {})[scheme] = bound
            continue
        said = []
        if losses:
            said.append(f"loses {_each(losses)}")
        if gains:
            said.append(f"gains {_each(gains)}")
        change = f"{scheme} {' and '.join(said)} against its own batch {reference}"
        yield change + (
            f"; at {_batches(rest)} no change shows, up to {percent(bound)} points not ruled out." if rest else "."
        )
    for (reference, batches), bounds in steady.items():
        if len(bounds) == 1:
            ((scheme, bound),) = bounds.items()
            yield (
                f"{scheme} shows no loss at {batches}: it stays within {percent(bound)} points of its own batch "
                f"{reference}, and a change of up to that size is not ruled out."
            )
        else:
            within = listed([f"{scheme} ({percent(bound)})" for scheme, bound in bounds.items()])
            yield (
                f"{within} show no loss at {batches}: each stays within so many points of its own batch {reference}, "
                "and a change of up to that size is not ruled out."
            )


def _each(found: list[Difference]) -> str:
    return listed([f"{points(abs(d['difference']), d['interval'])} points at batch {d['batch_size']}" for d in found])


def _batches(found: list[Difference]) -> str:
    return f"batch {listed([str(d['batch_size']) for d in found])}"


def _near_chance(summary: Summary, cells: list[Cell]) -> Iterator[str]:
    chance = summary["chance"]
    for cell in cells:
        if chance and cell["mean"] is not None and cell["mean"] >= NEAR_CHANCE * chance:
            yield (
                f"{cell['scheme']} at batch {cell['batch_size']} errs {percent(cell['mean'])} %, "
                f"close to guessing ({percent(chance)} %)."
            )


def _failures(summary: Summary) -> Iterator[str]:
    for cell in summary["cells"]:
        if not cell["failed"]:
            continue
        runs = cell["n"] + len(cell["failed"])
        reasons = list(dict.fromkeys(failure["message"].rstrip(".") for failure in cell["failed"]))
        said = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else "")
        how_many = f"{len(cell['failed'])} of {runs} runs" if runs > 1 else "its one run"
        yield (
            f"{cell['scheme']} at batch {cell['batch_size']} failed in {how_many}: {said}."
            + (" Its mean is over the runs that finished, which favours it." if cell["n"] else "")
        )
