"""Commands that run recipes: compare, train, eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from anybatch.cli.common import (
    Accumulate,
    AsJson,
    Data,
    DataRoot,
    Debug,
    Devices,
    Epochs,
    Lr,
    ModelName,
    Precision,
    Sets,
    SkipBad,
    TrainSize,
    UserError,
    ValFraction,
    app,
    err,
    numbers,
    out_console,
    print_json,
    recipe_from,
)
from anybatch.files import check_writable
from anybatch.suggest import listed_in

if TYPE_CHECKING:
    pass


@app.command()
def compare(
    ctx: typer.Context,
    data: Data = None,
    data_root: DataRoot = None,
    schemes: Annotated[
        str, typer.Option(help="Schemes separated by commas, as in bn,gn:16,ws+gn.", rich_help_panel="Study")
    ] = "bn,gn,ws+gn",
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", "-b", help="Batch sizes separated by commas.", rich_help_panel="Study")
    ] = "1,2,4,8,32",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.", rich_help_panel="Study")] = 3,
    tune: Annotated[
        int,
        typer.Option(
            min=0,
            help="Learning rates tried for each scheme and batch size, on a part of the training images; 0 keeps the "
            "rule: --lr scaled to the batch.",
            rich_help_panel="Study",
        ),
    ] = 0,
    study_file: Annotated[
        Path | None,
        typer.Option(
            "--study",
            help="A study.yaml to repeat, with its data in --data-root and a folder in --out.",
            rich_help_panel="Study",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study; runs/compare-DATA by default.", rich_help_panel="Study")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Runs side by side; one a core, or one a GPU, by default.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    train_size: TrainSize = None,
    val_fraction: ValFraction = None,
    skip_bad: SkipBad = False,
    model: ModelName = None,
    epochs: Epochs = None,
    lr: Lr = None,
    accumulate: Accumulate = None,
    precision: Precision = None,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Error, speed and memory against batch size, one curve a scheme, on your data.

    Leaves rows.jsonl, figure.png, figure.svg, report.html and summary.json in a folder. A study that was interrupted
    goes on where it stopped when the same command is given again.
    """
    from anybatch import live, report, study

    if study_file is not None:
        plan = study.Study.read(study_file)
        free = {"study_file", "data_root", "out", "jobs", "retry_failed", "as_json", "debug"}
        for name in ctx.params.keys() - free:
            if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE":
                raise UserError(f"--study repeats a study as it is; leave out --{name.replace('_', '-')}")
        if data_root is not None:
            plan = plan.model_copy(update={"base": plan.base.replace({"data.root": data_root})})
    else:
        base = recipe_from(
            None,
            data,
            data_root,
            sets,
            **{
                "data.train_size": train_size,
                "data.val_fraction": val_fraction,
                "data.skip_bad": skip_bad or None,
                "data.accumulate": accumulate,
                "model.name": model,
                "schedule.epochs": epochs,
                "optim.lr": lr,
                "train.precision": precision,
            },
        )
        axes = {"model.scheme": "--schemes", "data.batch_size": "--batch-sizes", "train.seed": "--seeds"}
        for item in sets or []:
            if (path := item.partition("=")[0].strip()) in axes:
                raise UserError(f"a study varies {path}; give {axes[path]} in place of --set {path}")
        if not listed_in(schemes):
            raise UserError(f"--schemes takes schemes separated by commas, such as bn,gn,ws+gn; got {schemes!r}")
        plan = study.Study.make(
            base=base,
            schemes=_canonical(listed_in(schemes)),
            batch_sizes=numbers(batch_sizes, "--batch-sizes"),
            seeds=list(range(seeds)),
            tune=tune,
        )
    folder = out or Path("runs") / f"compare-{plan.base.data.name}"
    check_writable(folder / study.ROWS)
    study.check(plan)
    jobs = jobs or study.default_jobs(plan)
    display = live.Display(err, plan, folder)
    try:
        with display:
            rows = study.run(plan, folder, jobs=jobs, retry_failed=retry_failed, on_event=display.event)
    except KeyboardInterrupt:
        _write_report(report, plan, folder, study.collect(plan, folder), jobs)
        err.print(
            f"interrupted: {display.done} of {display.total} runs are in {folder / study.ROWS}; the same command "
            f"goes on from there",
            style="yellow",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    summary = _write_report(report, plan, folder, rows, jobs)
    if as_json:
        print_json(summary)
    else:
        live.print_summary(out_console, summary, folder)
    if all(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


def _canonical(schemes: list[str]) -> list[str]:
    from anybatch.schemes import scheme

    return [scheme(spec).name for spec in schemes]


def _write_report(report: Any, plan: Any, folder: Path, rows: list[Any], jobs: int) -> dict[str, Any]:
    total = len(plan.runs({}))
    done = sum(row["purpose"] == "run" for row in rows)
    notes = [f"Runs went side by side, {jobs} at a time, and slowed each other: speeds are rough."] if jobs > 1 else []
    if done < total:
        notes.append(f"Partial: {done} of {total} runs are done.")
    edges = plan.at_the_edge({row["id"]: row for row in rows})
    if edges and done == total:
        cells = ", ".join(f"{scheme} at batch {size}" for scheme, size in edges)
        notes.append(
            f"The best learning rate was the lowest or highest tried for {cells}; more trials may find better."
        )
    data = plan.base.data.name
    return report.write(
        rows,
        folder,
        title=f"Error against batch size on {data}",
        reproduce=f"anybatch compare --study study.yaml --out {data}-again",
        notes=notes,
    )


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe's YAML file or name; see anybatch list --recipes.", show_default=False),
    ] = None,
    data: Data = None,
    data_root: DataRoot = None,
    model: ModelName = None,
    scheme: Annotated[str | None, typer.Option(help="How the network normalizes, such as ws+gn.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Images that a device takes at a time.")
    ] = None,
    accumulate: Accumulate = None,
    lr: Lr = None,
    epochs: Epochs = None,
    seed: Annotated[int | None, typer.Option(help="Initial weights, order of the images, augmentation.")] = None,
    devices: Devices = None,
    precision: Precision = None,
    train_size: TrainSize = None,
    val_fraction: ValFraction = None,
    skip_bad: SkipBad = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/MODEL-SCHEME-DATA by default.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard too.")] = False,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train one model; an interrupted run goes on when the same command is given again."""
    from anybatch import live, recipes
    from anybatch.recipe import Recipe

    given = None
    if recipe is not None:
        given = Recipe.read(recipe) if recipe.endswith((".yaml", ".yml")) else recipes.named(recipe)
    plan = recipe_from(
        given,
        data,
        data_root,
        sets,
        **{
            "model.name": model,
            "model.scheme": None if scheme is None else _canonical([scheme])[0],
            "data.batch_size": batch_size,
            "data.accumulate": accumulate,
            "data.train_size": train_size,
            "data.val_fraction": val_fraction,
            "data.skip_bad": skip_bad or None,
            "optim.lr": lr,
            "schedule.epochs": epochs,
            "train.seed": seed,
            "train.devices": devices,
            "train.precision": precision,
        },
        own_scheme=True,
    )
    folder = out or Path("runs") / f"{plan.model.name}-{plan.model.scheme}-{plan.data.name}"
    check_writable(folder / "rows.jsonl")
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # the others of several processes are silent
    try:
        row = live.train(plan, folder, err if first else Console(quiet=True), tensorboard=tensorboard)
    except KeyboardInterrupt:
        if first:
            err.print(f"interrupted: the same command goes on from the last whole epoch in {folder}", style="yellow")
        raise typer.Exit(130) from None
    if not first:
        return
    if row["status"] == "failed":
        raise UserError(f"{row['message']}; the row is in {folder / 'rows.jsonl'}")
    if as_json:
        print_json(row)
    else:
        curve = row["curve"][-1]
        spent = row.get("privacy")
        told = "" if spent is None else f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g}, "
        out_console.print(
            f"error {100 * curve['error']:.2f} % after {curve['epoch']} epochs, {told}"
            f"{row['images_per_second']:.0f} images/s; model in {folder}",
            highlight=False,
            soft_wrap=True,
        )


@app.command(name="eval")
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder that anybatch train or save_pretrained wrote, or a file of anybatch convert; --data names the "
            "images where no run tells them."
        ),
    ],
    data: Data = None,
    data_root: DataRoot = None,
    skip_bad: SkipBad = False,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Error and loss of a trained model on its own evaluation images, or on those of other data."""
    from anybatch import data as datasets
    from anybatch.models.named import stored
    from anybatch.recipe import Recipe
    from anybatch.step import evaluate as measure

    found = stored(run)
    if found.task != "classification" or found.input_size is None:
        raise UserError(f"{run} holds a network that tells no images apart")
    if found.recipe is None and data is None:
        raise UserError(f"{run} does not say on what data it was trained; name some by --data")
    own = None if found.recipe is None else Recipe.parse(found.recipe)
    if own is not None and data is not None:  # portions of the run's own data say nothing of other data
        own = own.replace({"data.train_size": None, "data.val_size": None, "data.val_fraction": None})
    chans, size = found.input_size[0], found.input_size[-1]
    recipe = recipe_from(
        own,
        data,
        data_root,
        sets,
        **{"data.skip_bad": skip_bad or None, "data.size": size, "data.batch_size": 1},
    )
    statistics = found.mean or (0.0,) * chans, found.std or (1.0,) * chans  # of images that come normalized
    split = datasets.load(recipe.data, statistics=statistics)
    known, given = list(found.classes), list(split.classes)
    if known != given and not (own is None and len(known) == len(given)):  # which are numbers where no run tells
        raise UserError(f"{run} knows the classes {', '.join(known[:10])}; the data has {', '.join(given[:10])}")
    model = found.model
    error, loss = measure(model, split.val, batch_size=recipe.data.eval_batch_size)
    if as_json:
        print_json({"error": error, "loss": loss, "images": len(split.val), "data": split.name})
    else:
        out_console.print(f"error {100 * error:.2f} %, loss {loss:.4f} on {len(split.val)} images", highlight=False)
