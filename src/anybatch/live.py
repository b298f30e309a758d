"""What a person sees in the terminal while runs go on, and what is printed when they end."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from anybatch import bench as benching
    from anybatch.recipe import Recipe
    from anybatch.rows import Row
    from anybatch.study import Event, Study

_SOON = 2.0
"""Seconds after which a bar shows; shorter work would make it flicker."""


class Display:
    """A live table of a study: mean error of each cell so far, progress of the runs under way.

    On something that is no terminal it prints a line for each run that ends.
    """

    def __init__(self, console: Console, study: Study, out: Path) -> None:
        self.console, self.study, self.out = console, study, out
        self.total = self.done = 0
        self.errors: dict[tuple[str, int], list[float | None]] = defaultdict(list)
        self.ended: set[str] = set()
        self.under_way: dict[str, tuple[Recipe, float, float | None]] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("starting", total=None)
        self.live = Live(self._view(), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        else:
            self.console.print(f"study in {self.out}", highlight=False, soft_wrap=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live.is_started:
            self.live.stop()

    def event(self, event: Event) -> None:
        """Take in what happened."""
        if event.kind == "plan":
            self.total = event.total
            self.progress.update(self.task, total=event.total, description="study")
        elif event.kind == "progress" and event.recipe is not None and event.recipe.id not in self.ended:
            self.under_way[event.recipe.id] = event.recipe, event.samples / max(1, event.total), event.error
        elif event.kind in ("row", "there") and event.row is not None:
            self._ended(event.row, fresh=event.kind == "row")
        part = sum(share for _, share, _ in self.under_way.values())
        self.progress.update(self.task, completed=self.done + min(part, len(self.under_way)))
        if self.live.is_started:
            self.live.update(self._view())

    def _ended(self, row: Row, *, fresh: bool) -> None:
        self.done += 1
        self.ended.add(row["id"])  # its last progress may be told after it
        self.under_way.pop(row["id"], None)
        recipe = row["recipe"]
        if row["purpose"] == "run":
            self.errors[recipe["model"]["scheme"], recipe["data"]["batch_size"]].append(row["error"])
        if fresh and not self.console.is_terminal:
            result = f"error {100 * row['error']:.2f} %" if row["error"] is not None else f"failed: {row['message']}"
            what = "trial" if row["purpose"] == "tune" else "run"
            self.console.print(
                f"[{self.done}/{self.total}] {what} {recipe['model']['scheme']} batch {recipe['data']['batch_size']} "
                f"seed {row['seed']}: {result}, {row['seconds']:.1f} s",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _view(self) -> Group:
        table = Table(title="error in %, mean over the seeds so far", title_justify="left")
        table.add_column("scheme")
        for batch_size in sorted(self.study.batch_sizes):
            table.add_column(f"batch {batch_size}", justify="right")
        for scheme in self.study.schemes:
            table.add_row(scheme, *(self._cell(scheme, size) for size in sorted(self.study.batch_sizes)))
        runs = Table.grid(padding=(0, 2))
        for recipe, share, error in self.under_way.values():
            told = "" if error is None else f"{100 * error:.1f} %"
            runs.add_row(
                recipe.model.scheme,
                f"batch {recipe.data.batch_size}",
                f"seed {recipe.train.seed}",
                f"{100 * share:3.0f} %",
                told,
            )
        return Group(table, runs, self.progress)

    def _cell(self, scheme: str, batch_size: int) -> str:
        errors = self.errors[scheme, batch_size]
        known = [100 * error for error in errors if error is not None]
        if not errors:
            return "·"
        if not known:
            return "failed"
        missing = len(self.study.seeds) - len(errors)
        return f"{statistics.fmean(known):.1f}" + (f" ({len(errors)}/{len(self.study.seeds)})" if missing else "")


def print_summary(console: Console, summary: dict[str, Any], out: Path) -> None:
    """The verdict, the table of errors, and where the report is."""
    sizes = summary["batch_sizes"]
    cells = {(cell["scheme"], cell["batch_size"]): cell for cell in summary["cells"]}
    table = Table(title="error in %, mean ± 95 % interval", title_justify="left")
    table.add_column("scheme")
    for size in sizes:
        table.add_column(f"batch {size}", justify="right")
    for scheme in summary["schemes"]:
        table.add_row(scheme, *(_told(cells.get((scheme, size))) for size in sizes))
    console.print(table)
    for sentence in summary["verdict"]:
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _told(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["mean"] is None:
        return "failed" if cell is not None and cell["failed"] else "·"
    return f"{cell['mean']:.1f}" + ("" if cell["interval"] is None else f" ± {cell['interval']:.1f}")


def train(recipe: Recipe, out: Path, console: Console, *, tensorboard: bool = False) -> Row:
    """`anybatch.train.run_in` with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"loading {recipe.data.name}", total=None)
        last = [time.monotonic()]

        from anybatch import driver
        from anybatch import train as training

        def tell(state: driver.Progress) -> None:
            error = "" if state.error is None else f", error {100 * state.error:.1f} %"
            progress.update(
                task,
                total=state.total,
                completed=state.samples,
                description=f"{recipe.model.name} {recipe.model.scheme} batch {recipe.data.batch_size}{error}",
            )
            if not console.is_terminal and time.monotonic() - last[0] > 10:
                last[0] = time.monotonic()
                console.print(f"{100 * state.samples / state.total:.0f} %{error}", highlight=False)

        return training.run_in(recipe, out, tell=tell, tensorboard=tensorboard)


@contextmanager
def phases(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each phase of a work, as it comes: call with its name, what is done of it and what there is to do.

    Nothing shows on what is no terminal, or of work that is done within 2 seconds.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, transient=True)
    tasks: dict[str, TaskID] = {}

    def tell(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = progress.add_task(phase, total=total)
        progress.update(tasks[phase], completed=done)

    later = threading.Timer(_SOON, progress.start)
    later.daemon = True
    if console.is_terminal:
        later.start()
    try:
        yield tell
    finally:
        if console.is_terminal:
            later.cancel()
            later.join()
        if progress.live.is_started:
            progress.stop()


def bench(chosen: benching.Settings, path: Path, console: Console) -> list[benching.Row]:
    """`anybatch.bench.run` with a progress bar; on no terminal a line for each cell."""
    from anybatch import bench as benching

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        last = [""]

        def tell(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)
            if not console.is_terminal and text not in ("", last[0]):
                last[0] = text
                console.print(f"[{done + 1}/{total}] {text}", markup=False, highlight=False, soft_wrap=True)

        return benching.run(chosen, path, tell=tell)


def write_bench_figure(path: Path) -> Path | None:
    """Draw a file of rows beside it; returns the picture's path, or None where there is nothing to draw."""
    from anybatch.bench import read
    from anybatch.bench.figure import figure
    from anybatch.files import write_file
    from anybatch.report.figures import png

    drawn = figure(read(path))
    if drawn is None:
        return None
    picture = path.with_suffix(".png")
    write_file(picture, png(drawn))
    return picture


def print_bench(console: Console, rows: list[benching.Row], judged: list[benching.Judged]) -> None:
    """What was measured, and how it stands against the targets."""
    from anybatch.bench.tables import HEADINGS, TARGET_HEADINGS, line, plain, target_line

    ends = {"ok": "", "aim": "green", "short": "red", "must": "", "not measured": "dim"}
    tables = [(HEADINGS, [(line(row), ends.get(row["status"], "red")) for row in rows])]
    tables += [(TARGET_HEADINGS, [(target_line(one), ends[one.mark]) for one in judged])] * bool(judged)
    for headings, lines in tables:
        # In columns of their own width: a pipe has no width, and wrapped cells cannot be read.
        told = plain(headings, ([cell.strip("*") for cell in cells] for cells, _ in lines))
        for text, style in zip(told, ["bold", *(style for _, style in lines)], strict=True):
            console.print(Text(text, style=style), soft_wrap=True)
        console.print()
