"""The command line. Everything heavy is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anybatch import __version__
from anybatch.suggest import listed_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from anybatch.models import Network
    from anybatch.recipe import Recipe

app = typer.Typer(
    name="anybatch",
    help="Train ConvNets at any batch size: compare normalizations on your own data, train, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

convert = typer.Typer(help="Bring weights from one library to another.", no_args_is_help=True)
app.add_typer(convert, name="convert")

err = Console(stderr=True)  # progress and messages; standard output holds results alone
out_console = Console()

Data = Annotated[
    str | None,
    typer.Option("--data", help="digits, cifar10, fashion-mnist, imagefolder:DIR or FILE.npz.", rich_help_panel="Data"),
]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder that holds the data set.", rich_help_panel="Data", show_default=False)
]
TrainSize = Annotated[
    int | None, typer.Option(help="Use this many training images, balanced over the classes.", rich_help_panel="Data")
]
ValFraction = Annotated[
    float | None, typer.Option(help="Evaluate on this share of the training images.", rich_help_panel="Data")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out unreadable images.", rich_help_panel="Data")]
ModelName = Annotated[str | None, typer.Option("--model", help="A network's name; see anybatch list --models.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate at 32 images a step; scaled to the batch.")]
Accumulate = Annotated[int | None, typer.Option(help="Batches whose gradients are averaged before a step.")]
Devices = Annotated[int | None, typer.Option(help="Devices (on the CPU: processes) that train together.")]
Precision = Annotated[str | None, typer.Option(help="32-true, bf16-mixed, 16-mixed or 64-true.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key of the recipe, as in --set model.options.width=64; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", hidden=True)]


class UserError(Exception):
    """A mistake of the user's, told in one line; exit code 2."""


def main() -> None:
    """Entry point: errors become one line on standard error."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)  # what typer.Exit carried, or None
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted", style="yellow")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        sys.exit(_told(error))
    sys.exit(code or 0)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _told(error: Exception) -> int:
    """Print an error in one line; 2 for a user's mistake, 1 for a fault of ours."""
    usage = getattr(error, "format_message", None)  # typer's own errors have it
    text = " ".join((usage() if usage else str(error)).split()) or type(error).__name__
    ours = usage is None and not isinstance(error, UserError | ValueError | OSError)
    if ours:
        text = f"{type(error).__name__}: {text} (this looks like a fault of anybatch; --debug shows where)"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text += "; what was written before is whole: make room and give the same command again"
    err.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if ours else 2


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in listed_in(text)]
    except ValueError:
        raise UserError(f"{option} takes whole numbers separated by commas, such as 1,2,32; got {text!r}") from None


def _recipe(
    base: Recipe | None,
    data: str | None,
    data_root: str | None,
    sets: list[str] | None,
    *,
    own_scheme: bool = False,
    **changes: Any,
) -> Recipe:
    """The recipe for the data, or the one given, with the options' changes and then ``--set``.

    With ``own_scheme`` another network than the recipe's comes with its own scheme, where none is named.
    """
    from anybatch import recipes
    from anybatch.data import parse_data
    from anybatch.models import model_entry

    if data is not None or base is None:
        name, root = parse_data(data or "digits", data_root)
        recipe = base or recipes.named(name)
        changes = {"data.name": name, "data.root": root, **changes}
    else:
        recipe = base
        changes = {"data.root": data_root, **changes}
    default = recipe.model
    if changes.get("model.name") not in (None, recipe.model.name):
        recipe = recipe.replace({"model.options": {}})  # they were meant for the recipe's own network
    changes = {path: value for path, value in changes.items() if value is not None}
    changes |= _pairs(sets, "--set", "optim.lr=0.1")
    name = changes.get("model.name", default.name)
    if own_scheme and name != default.name and "scheme" not in default.model_fields_set:
        changes.setdefault("model.scheme", model_entry(name).scheme)
    return recipe.replace(changes)


def _pairs(items: list[str] | None, option: str, example: str) -> dict[str, str]:
    """The values of a repeatable option by their keys."""
    found = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{option} takes key=value, such as {example}; got {item!r}")
        found[key.strip()] = value.strip()
    return found


def _print_json(values: Any) -> None:
    sys.stdout.write(json.dumps(values, allow_nan=False) + "\n")


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"anybatch {__version__}\n")
        raise typer.Exit


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
        base = _recipe(
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
        plan = study.Study.make(
            base=base,
            schemes=_canonical(listed_in(schemes)),
            batch_sizes=_numbers(batch_sizes, "--batch-sizes"),
            seeds=list(range(seeds)),
            tune=tune,
        )
    folder = out or Path("runs") / f"compare-{plan.base.data.name}"
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
        _print_json(summary)
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
    plan = _recipe(
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
        _print_json(row)
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
    run: Annotated[Path, typer.Argument(help="Folder that anybatch train wrote.")],
    data: Data = None,
    data_root: DataRoot = None,
    skip_bad: SkipBad = False,
    sets: Sets = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Error and loss of a trained model on its own evaluation images, or on those of other data."""
    from anybatch import checkpoint
    from anybatch import data as datasets
    from anybatch.recipe import Recipe
    from anybatch.step import evaluate as measure

    model, facts = checkpoint.load_model(run)
    own = Recipe.parse(facts.recipe)
    if data is not None:  # portions of the run's own data say nothing of other data
        own = own.replace({"data.train_size": None, "data.val_size": None, "data.val_fraction": None})
    recipe = _recipe(
        own,
        data,
        data_root,
        sets,
        **{"data.skip_bad": skip_bad or None, "data.size": facts.size, "data.batch_size": 1},
    )
    split = datasets.load(recipe.data, statistics=(facts.mean, facts.std))
    if list(split.classes) != facts.classes:
        raise UserError(
            f"{run} knows the classes {', '.join(facts.classes[:10])}; the data has {', '.join(split.classes[:10])}"
        )
    error, loss = measure(model, split.val, batch_size=recipe.data.eval_batch_size)
    if as_json:
        _print_json({"error": error, "loss": loss, "images": len(split.val), "data": split.name})
    else:
        out_console.print(f"error {100 * error:.2f} %, loss {loss:.4f} on {len(split.val)} images", highlight=False)


def _image_files(folder: Path) -> list[Path]:
    from anybatch.data import SUFFIXES

    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _predictor(run: Path) -> tuple[Network, list[str], Callable[[Path], Tensor]]:
    """A network, the names of its classes, and what brings an image file to it."""
    import torch

    from anybatch import checkpoint
    from anybatch import data as datasets
    from anybatch.models import Network, hub, transforms

    if str(run).startswith(hub.ON_HUB) or (run / hub.CONFIG).is_file():
        try:
            model = Network.from_pretrained(str(run))
        except ImportError as error:  # of huggingface_hub
            raise UserError(str(error)) from None
        if model.dense or not model.num_classes:
            raise UserError(f"{run} holds a network that tells no images apart: {model.default_cfg['architecture']}")
        bring, dtype = transforms(model), next(model.parameters()).dtype
        names = [str(i) for i in range(model.num_classes)]
        return model, names, lambda file: bring(datasets.open_image(file, model.in_chans)).to(dtype)
    model, facts = checkpoint.load_model(run)
    if not any(facts.mean) and facts.recipe["data"].get("normalize") is None:
        raise UserError(
            f"{run} was trained on images that come normalized ({facts.recipe['data']['name']}), a form to which image "
            f"files cannot be brought; train on image files or uint8 arrays to predict"
        )
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (facts.mean, facts.std))
    return model, facts.classes, lambda file: (datasets.load_image(file, facts.size, facts.in_chans) / 255 - mean) / std


@app.command()
def predict(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder that anybatch train or save_pretrained wrote, or hf-hub:SOMEONE/SOMETHING, by push_to_hub."
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Classes of images and their probabilities.

    What save_pretrained or push_to_hub wrote has no names of classes: they are numbers then.
    """
    import torch

    from anybatch.methods.filters import reuse_filters

    model, classes, prepare = _predictor(run)
    files = [file for path in images for file in (_image_files(path) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"no image files in {', '.join(map(str, images))}")
    found: list[dict[str, Any]] = []
    with torch.inference_mode(), reuse_filters(model):
        for file in files:
            try:
                x = prepare(file)
            except ValueError as error:
                if not skip_bad:
                    raise
                err.print(f"skipped: {error}", style="yellow", markup=False, soft_wrap=True)
                continue
            chances = model(x[None]).softmax(1)[0]
            best = chances.topk(min(top, len(classes)))
            likely = [
                {"class": classes[i], "probability": p}
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            found.append({"file": str(file), "classes": likely})
    if as_json:
        _print_json({"images": found})
        return
    table = Table("image", "classes", box=None)
    for item in found:
        classes = ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in item["classes"])
        table.add_row(escape(item["file"]), escape(classes))
    out_console.print(table)


@app.command()
def bench(
    cases: Annotated[
        str | None,
        typer.Option(
            help="conv, norm, weight_standardize, agc, accuracy, step, inference, separated by commas; layers for all "
            "but the last two. All by default."
        ),
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(help="Schemes separated by commas; those of the target table by default.")
    ] = None,
    models: Annotated[str | None, typer.Option(help="Networks of steps and inference, separated by commas.")] = None,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", "-b", help="Batch sizes separated by commas.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="32-true, bf16-mixed or 16-mixed; float32 on the CPU, bfloat16 on a GPU.")
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            "--channels-last/--contiguous", help="One memory format for all; by default both for layers on the CPU."
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time everything under torch.compile too.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds, each of which times every variant once.")] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Of the CPU; one is timed by processor time, more by the wall's.")
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, to see that all works.")] = False,
    out: Annotated[
        Path, typer.Option(help="A .jsonl file to which rows are added, or a folder for it; a figure stands beside it.")
    ] = Path("runs/bench"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Speed and memory beside BatchNorm's on this machine: layers, training steps, inference.

    Nothing is timed that does not agree with float64: that is a row with the reason, and exit code 1.
    """
    from anybatch import live
    from anybatch.bench import runner, settings, targets

    chosen = settings(
        cases=listed_in(cases or ""),
        schemes=listed_in(schemes or ""),
        models=listed_in(models or ""),
        batch_sizes=_numbers(batch_sizes or "", "--batch-sizes"),
        device=device,
        precision=precision,
        channels_last=channels_last,
        compile=compiled,
        repeats=repeats,
        threads=threads,
        quick=quick,
    )
    path = runner.file_in(out, chosen.device)
    rows = live.bench(chosen, path, err)
    figure = live.write_bench_figure(path)
    judged = [one for one in targets.judged(runner.read(path)) if one.measured is not None]
    if as_json:
        told = [
            {"what": one.target.what, "must": one.target.must, "aim": one.target.aim, "measured": one.measured}
            | {"mark": one.mark}
            for one in judged
        ]
        _print_json({"rows": rows, "targets": told, "file": str(path), "figure": figure and str(figure)})
    else:
        live.print_bench(out_console, rows, judged)
        told = f"rows: {path}" + (f"; figure: {figure}" if figure else "")
        out_console.print(told, markup=False, highlight=False, soft_wrap=True)
    if any(row["status"] != "ok" for row in rows):
        raise typer.Exit(1)


@convert.command(name="weights")
def convert_weights(
    source: Annotated[Path, typer.Argument(help="A .safetensors, .npz, .pt, .pth, .ckpt, .bin or .tar file.")],
    model: Annotated[str, typer.Option("--model", help="The network's name here; see anybatch list --models.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    scheme: Annotated[str | None, typer.Option(help="How it normalizes; the network's own by default.")] = None,
    layout: Annotated[
        str, typer.Option(help="torchvision, timm, knresnet, ws, mmcv, deepmind, bit or anybatch; auto tries them all.")
    ] = "auto",
    to: Annotated[str, typer.Option(help="Names in the file: anybatch, timm or torchvision.")] = "anybatch",
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="Refuse other numbers of classes; 0 leaves the classifier out.")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="adapt (to as many classes as the source has; so without --num-classes), load (so with it), or skip: "
            "start a new one."
        ),
    ] = None,
    in_chans: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 3,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the network, as in --option stem=bit; repeatable."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A checkpoint of another library or a release as one of ours, or for timm."""
    from anybatch.files import save_tensors
    from anybatch.models import export_weights, load_weights
    from anybatch.models.registry import create_network
    from anybatch.recipe import read_value
    from anybatch.suggest import listed

    if out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {out}")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    if classifier not in (None, "adapt") and num_classes is None:
        raise UserError(f"--classifier {classifier} takes --num-classes; without both it has as many as the source")
    chosen = {key: read_value(value) for key, value in _pairs(options, "--option", "stem=bit").items()}
    classes = 1 if num_classes is None else num_classes
    network = create_network(model, scheme, chosen, num_classes=classes, in_chans=in_chans)
    how: Any = classifier or ("adapt" if num_classes is None else "load")
    told = load_weights(network, source, layout=layout, classifier=how)
    tensors = network.state_dict() if to == "anybatch" else export_weights(network, to)
    out.parent.mkdir(parents=True, exist_ok=True)
    built: str = network.default_cfg["scheme"]
    facts = {"model": model, "scheme": built, "options": json.dumps(chosen), "layout": to}
    save_tensors(tensors, out, facts)
    if as_json:
        mapped = {"mapped": told.mapped, "set_anew": told.missing, "unused": told.unused, "note": told.note}
        counted = {"classes": network.num_classes, "tensors": len(tensors)}
        _print_json({"out": str(out), **facts, "options": chosen, "from": told.layout, **counted, **mapped})
        return
    renamed = sum(ours != theirs for ours, theirs in told.mapped.items())
    out_console.print(
        f"{out}: {len(tensors)} tensors of {model} with {built} and {network.num_classes} classes, from "
        f"layout {told.layout} to {to}; {renamed} of {len(told.mapped)} have other names here",
        markup=False,
        highlight=False,
    )
    if told.unused:
        out_console.print(f"not used: {listed(told.unused)}", markup=False, highlight=False)
    if told.missing:
        out_console.print(f"not in the source: {listed(told.missing)}", markup=False, highlight=False)
    if told.note:
        out_console.print(f"the same outputs as there take: {told.note}", markup=False, highlight=False)


@app.command(name="list")
def list_(
    models: Annotated[bool, typer.Option("--models", help="Only the networks.")] = False,
    schemes: Annotated[bool, typer.Option("--schemes", help="Only the scheme parts.")] = False,
    recipes: Annotated[
        bool, typer.Option("--recipes", help="Only the named recipes; NAME-quick is a twin of each for seconds.")
    ] = False,
    data: Annotated[bool, typer.Option("--data", help="Only the data sets.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Networks, scheme parts, recipes and data sets."""
    from anybatch import catalogue

    chosen = [
        name for name, on in (("models", models), ("schemes", schemes), ("recipes", recipes), ("data", data)) if on
    ]
    tables = catalogue.tables(chosen or ["schemes", "models", "recipes", "data"])
    if as_json:
        _print_json(tables)
        return
    if "schemes" in tables:
        tables["schemes"] = {name: _described(part) for name, part in tables["schemes"].items()}
    if "models" in tables:
        tables["models"] = {name: _counted(model) for name, model in tables["models"].items()}
    _print_tables(tables, "what it is")
    if "recipes" in tables:
        told = (
            "Each recipe has a twin for seconds on a CPU, of 64 images and 2 epochs: NAME-quick, as gn-imagenet-quick."
        )
        out_console.print(told, highlight=False, soft_wrap=True)


def _described(part: dict[str, Any]) -> str:
    """A scheme part in one line."""
    free = "batch-free" if part["batch_free"] else "depends on the batch"
    options = ", ".join(f"{name}={default}" for name, default in part["options"].items())
    return f"{part['about']} {free.capitalize()}; {', '.join(part['sources']) or 'no source'}." + (
        f" Options: {options}." if options else ""
    )


def _counted(model: dict[str, Any]) -> str:
    """A network in one line."""
    accuracy = f"; published {model['published_top1']:g} %" if model["published_top1"] is not None else ""
    return (
        f"{model['about']} {model['parameters'] / 1e6:.4g} M parameters, {model['multiply_adds'] / 1e9:.3g} G "
        f"multiply-adds at {model['size']} pixels with {model['scheme']}{accuracy}."
    )


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Versions, devices, and what is missing for which extra."""
    from anybatch import catalogue

    facts = catalogue.doctor()
    if as_json:
        _print_json(facts)
        return
    _print_tables(facts, "state")


def _print_tables(tables: dict[str, dict[str, Any]], heading: str) -> None:
    for name, entries in tables.items():
        table = Table("name", heading, title=name, title_justify="left", box=None, pad_edge=False)
        for entry, text in entries.items():
            table.add_row(escape(entry), escape(str(text)))
        out_console.print(table)
        out_console.print()


if __name__ == "__main__":
    main()
