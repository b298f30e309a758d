"""A Study: a grid of recipes, run side by side, one row a run."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from anybatch import rows
from anybatch.files import write_file
from anybatch.recipe import Recipe, explain, read_yaml
from anybatch.rows import Row
from anybatch.suggest import one_line

ROWS, STUDY = "rows.jsonl", "study.yaml"
# Learning rates are tried on part of the training images, with a seed that no run of the study uses.
TUNE_HOLDOUT, TUNE_SEED = 0.2, 10_007


class Study(BaseModel):
    """One recipe under several schemes, batch sizes and seeds.

    Every run sees the same number of images. Its learning rate is the base recipe's, scaled to its batch size as the
    recipe says, or, with ``tune``, the best of as many candidates for each scheme and batch size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Recipe
    schemes: tuple[str, ...] = Field(min_length=1)
    batch_sizes: tuple[int, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    tune: int = Field(default=0, ge=0)
    """Learning rates tried for each scheme and batch size: the base's and its neighbours by factors of 2."""

    @field_validator("schemes", "batch_sizes", "seeds")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("holds a value twice")
        return values

    @classmethod
    def make(cls, **values: Any) -> Self:
        """A checked study; a `ValueError` says in one line what is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"study: {explain(error, cls)}") from None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The study in a YAML file."""
        return cls.make(**read_yaml(path))

    def to_yaml(self) -> str:
        """The whole study; `read` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def _essence(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json", exclude={"base"}), "base": self.base.essence()}

    def cells(self) -> Iterator[tuple[str, int]]:
        """Each scheme at each batch size, the smallest and slowest batches first."""
        for batch_size in sorted(self.batch_sizes):
            for scheme in self.schemes:
                yield scheme, batch_size

    def recipe(self, scheme: str, batch_size: int, seed: int, lr: float | None = None) -> Recipe:
        """The run of one cell and seed."""
        return self.base.replace(
            {
                "model.scheme": scheme,
                "data.batch_size": batch_size,
                "train.seed": seed,
                "optim.lr": self.base.optim.lr if lr is None else lr,
            }
        )

    def trials(self, scheme: str, batch_size: int) -> list[Recipe]:
        """The runs that choose a cell's learning rate."""
        factors = [2.0 ** (i - (self.tune - 1) // 2) for i in range(self.tune)]
        return [
            self.recipe(scheme, batch_size, TUNE_SEED, self.base.optim.lr * factor).replace(
                {"data.holdout": TUNE_HOLDOUT}
            )
            for factor in factors
        ]

    def chosen_lr(self, scheme: str, batch_size: int, done: dict[str, Row]) -> float:
        """The best trial's learning rate: lowest error, then lowest loss; the base's where nothing was tried."""
        tried = [done[recipe.id] for recipe in self.trials(scheme, batch_size) if recipe.id in done]
        finished = [row for row in tried if row["error"] is not None]
        if not finished:
            return self.base.optim.lr
        best = min(finished, key=lambda row: (row["error"], row["curve"][-1]["val_loss"] or math.inf))
        return best["recipe"]["optim"]["lr"]

    def at_the_edge(self, done: dict[str, Row]) -> list[tuple[str, int]]:
        """Cells whose chosen learning rate is the lowest or highest tried, so that a better one may lie beyond."""
        if self.tune < 2:
            return []
        found = []
        for scheme, batch_size in self.cells():
            tried = [recipe.optim.lr for recipe in self.trials(scheme, batch_size)]
            if self.chosen_lr(scheme, batch_size, done) in (min(tried), max(tried)):
                found.append((scheme, batch_size))
        return found

    def runs(self, done: dict[str, Row]) -> list[Recipe]:
        """All runs of the study, with learning rates as far as they are chosen."""
        return [
            self.recipe(scheme, batch_size, seed, self.chosen_lr(scheme, batch_size, done))
            for scheme, batch_size in self.cells()
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Event:
    """What happened in a study."""

    kind: str
    """``"plan"`` (how many runs there are), ``"there"`` (a run of an earlier start), ``"progress"`` (of one run),
    ``"row"`` (a run ended)."""
    recipe: Recipe | None = None
    row: Row | None = None
    samples: int = 0
    total: int = 0
    """Of a plan: runs in all. Of progress: images in all."""
    error: float | None = None


def run(
    study: Study,
    out: Path,
    *,
    jobs: int | None = None,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Row]:
    """Run what is missing of a study, and append a row for each run to ``out/rows.jsonl``.

    Args:
        study: The grid.
        out: Folder of the study; made if missing.
        jobs: Runs side by side, among which the processor's threads are divided; None chooses (see `default_jobs`).
        retry_failed: Run failed runs again.
        on_event: Told of every start, step and end.

    Returns:
        The study's rows, trials first.

    Raises:
        ValueError: If the folder holds another study, or a scheme does not fit the model or the data.
        OSError: If a row cannot be written; the rows before it are whole.
        KeyboardInterrupt: After the workers have been stopped; the rows so far are whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"another process is running a study in {out}; wait for it, or give another --out") from None
    with lock:
        claim(study, out)
        path = out / ROWS
        rows.repair(path)
        done = {row["id"]: row for row in rows.read(path)}
        if retry_failed:
            done = {key: row for key, row in done.items() if row["status"] == "ok"}
        with _Crew(jobs or default_jobs(study)) as crew:
            trials = [trial for scheme, size in study.cells() for trial in study.trials(scheme, size)]
            on_event(Event("plan", total=len(trials) + len(study.runs(done))))
            for purpose in ("tune", "run"):
                recipes = trials if purpose == "tune" else study.runs(done)
                for row in (done[recipe.id] for recipe in recipes if recipe.id in done):
                    on_event(Event("there", row=row))
                missing = [recipe for recipe in recipes if recipe.id not in done]
                for row in crew.run(missing, purpose, on_event):
                    rows.append(path, row)
                    done[row["id"]] = row
                    on_event(Event("row", row=row))
        return collect(study, out)


def collect(study: Study, out: Path) -> list[Row]:
    """The rows that a folder holds of a study so far."""
    done = {row["id"]: row for row in rows.read(out / ROWS)}
    trials = [trial for scheme, size in study.cells() for trial in study.trials(scheme, size)]
    return [done[recipe.id] for recipe in [*trials, *study.runs(done)] if recipe.id in done]


def check(study: Study) -> None:
    """Raise a `ValueError` before anything runs where the data cannot be read or a scheme does not fit the model."""
    import torch

    from anybatch import data
    from anybatch.driver import Epoch
    from anybatch.schemes import scheme as parse_scheme

    if study.base.train.devices > 1:
        raise ValueError(
            f"a study's runs take one device each and go side by side; got train.devices={study.base.train.devices}"
        )
    with torch.device("meta"):
        for scheme in study.schemes:
            model = study.recipe(scheme, 1, 0).model.build(num_classes=2, in_chans=3)
            if (clip := parse_scheme(scheme).clip) is not None:
                clip(model)  # which checks the names of what is not clipped
    largest = study.recipe(study.schemes[0], max(study.batch_sizes), 0)
    for recipe in [largest, *study.trials(study.schemes[0], max(study.batch_sizes))[:1]]:
        Epoch.of(recipe, len(data.load(recipe.data).train))


def default_jobs(study: Study) -> int:
    """One run at a time on a GPU, so that they do not slow each other; else one for each core."""
    import torch

    if study.base.train.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return 1
    return max(1, min(available_cores(), len(study.schemes) * len(study.batch_sizes) * len(study.seeds)))


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def claim(study: Study, out: Path) -> None:
    """Write the study into its folder, or check that the folder's is the same."""
    path = out / STUDY
    if path.exists():
        there = Study.read(path)
        if there._essence() != study._essence():
            raise ValueError(
                f"{out} holds another study ({_difference(there, study)}); give another --out, or repeat that study's "
                f"options to continue it"
            )
    else:
        if any(file.name != ".lock" for file in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no {STUDY}; give another --out")
        write_file(path, study.to_yaml().encode())


def _difference(there: Study, here: Study) -> str:
    """The first value in which two studies differ."""
    a, b = dict(rows.flatten(there._essence())), dict(rows.flatten(here._essence()))
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            return f"{key} is {a.get(key)} there and {b.get(key)} here"
    return "equal values, another form"


class _Crew:
    """Worker processes, each with one run at a time; if one dies, only its run is lost."""

    def __init__(self, jobs: int) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.messages: Any = self.context.Queue()
        self.threads = max(1, available_cores() // jobs)
        self.pools = [self._pool() for _ in range(jobs)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            # Not multiprocessing.active_children(), which are the caller's too. (Python 3.14 has kill_workers.)
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
        self.messages.cancel_join_thread()
        self.messages.close()

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self.context, _start_worker, (self.threads, self.messages))

    def _submit(self, slot: int, recipe: Recipe, purpose: str) -> Future[Row]:
        try:
            return self.pools[slot].submit(_run_one, recipe.model_dump_json(), purpose)
        except BrokenProcessPool:  # its process died while it had nothing to do
            self.pools[slot] = self._pool()
            return self.pools[slot].submit(_run_one, recipe.model_dump_json(), purpose)

    def run(self, recipes: Sequence[Recipe], purpose: str, on_event: Callable[[Event], None]) -> Iterator[Row]:
        """Run all, and give each row as its run ends."""
        waiting = list(reversed(recipes))
        by_id = {recipe.id: recipe for recipe in recipes}
        busy: dict[Future[Row], tuple[int, Recipe, float]] = {}
        while waiting or busy:
            for slot in set(range(len(self.pools))) - {slot for slot, _, _ in busy.values()}:
                if waiting:
                    recipe = waiting.pop()
                    busy[self._submit(slot, recipe, purpose)] = slot, recipe, time.perf_counter()
            ended, _ = wait(busy, timeout=0.2, return_when=FIRST_COMPLETED)
            while not self.messages.empty():
                key, samples, total, error = self.messages.get()
                if key in by_id:
                    on_event(Event("progress", by_id[key], samples=samples, total=total, error=error))
            for future in ended:
                slot, recipe, began = busy.pop(future)
                try:
                    row = future.result()
                except BrokenProcessPool:
                    from anybatch.train import failed_row

                    self.pools[slot] = self._pool()
                    message = "its process ended abruptly; where memory ran out, fewer --jobs help"
                    row = failed_row(recipe, purpose, message, time.perf_counter() - began)
                yield row


_messages: Any = None  # a worker process's way to its parent


def _start_worker(threads: int, messages: Any) -> None:
    """What a worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    globals()["_messages"] = messages


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run_one(recipe_json: str, purpose: str) -> Row:
    """One run in a worker process; whatever goes wrong in it becomes a row."""
    from anybatch import train
    from anybatch.driver import Progress

    recipe = Recipe.model_validate_json(recipe_json)
    key, began = recipe.id, time.perf_counter()

    def tell(progress: Progress) -> None:
        _messages.put((key, progress.samples, progress.total, progress.error))

    try:
        return train.run(recipe, purpose=purpose, tell=tell)
    except Exception as error:
        message = one_line(error)
        return train.failed_row(recipe, purpose, message, time.perf_counter() - began)
