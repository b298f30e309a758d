"""What commands share: the program they belong to, options that several take, and how mistakes are told."""

from __future__ import annotations

import errno
import json
import signal
import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from anybatch import __version__
from anybatch.suggest import listed_in, one_line

if TYPE_CHECKING:
    from anybatch.models.named import Named
    from anybatch.recipe import Recipe

app = typer.Typer(
    name="anybatch",
    help="Train ConvNets at any batch size: compare normalizations on your own data, train, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

err = Console(stderr=True)  # progress and messages; standard output holds results alone
out_console = Console()
_results: list[str] = []  # of --json

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
Size = Annotated[
    str | None, typer.Option(help="Of the images: 224, 224x320 or 3x224x224; the network's own by default.")
]
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
    warnings.showwarning = _warn
    _results.clear()
    try:
        # What a user's network prints is no result.
        with redirect_stdout(sys.stderr) if "--json" in sys.argv else nullcontext():
            code = app(standalone_mode=False)  # what typer.Exit carried, or None
        sys.stdout.write("".join(_results))
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted", style="yellow")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        sys.exit(told_in_one_line(error))
    sys.exit(code or 0)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    err.print(f"warning: {one_line(message)}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def told_in_one_line(error: Exception) -> int:
    """Print an error in one line; 2 for a user's mistake, 1 for a fault of ours."""
    usage = getattr(error, "format_message", None)  # typer's own errors have it
    said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    text = " ".join((usage() if usage else said).split()) or type(error).__name__
    ours = usage is None and not isinstance(error, UserError | ValueError | OSError)
    if ours:
        text = f"{type(error).__name__}: {text} (this looks like a fault of anybatch; --debug shows where)"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text += "; what was written before is whole: make room and give the same command again"
    err.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if ours else 2


def names(text: str | None, option: str) -> list[str]:
    """Those of an option, none where it is not given."""
    found = [] if text is None else listed_in(text)
    if text is not None and not found:
        raise UserError(f"{option} takes names separated by commas, got {text!r}; leave it out for the default")
    return found


def numbers(text: str, option: str) -> list[int]:
    try:
        if found := [int(part) for part in listed_in(text)]:
            return found
    except ValueError:
        pass
    raise UserError(f"{option} takes whole numbers separated by commas, such as 1,2,32; got {text!r}")


def recipe_from(
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
    changes |= key_values(sets, "--set", "optim.lr=0.1")
    name = changes.get("model.name", default.name)
    if own_scheme and name != default.name and "scheme" not in default.model_fields_set:
        changes.setdefault("model.scheme", model_entry(name).scheme)
    return recipe.replace(changes)


def named_model(text: str, **how: Any) -> Named:
    """As `anybatch.models.named.model_named`; a library that is not installed is a mistake of the user's here."""
    from anybatch.models.named import model_named

    try:
        return model_named(text, **how)
    except ImportError as error:
        raise UserError(str(error)) from None


def sides(text: str) -> tuple[int, ...]:
    """What ``--size`` says: H and W, or those behind C, or behind C and T."""
    try:
        found = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        found = ()
    if not 1 <= len(found) <= 4 or min(found) < 1:
        raise UserError(f"--size takes 224, 224x320 or 3x224x224, got {text!r}")
    return found * 2 if len(found) == 1 else found


def sized(found: Named, text: str | None) -> tuple[int, ...]:
    """What a network is to take, (C, H, W) say: as ``--size`` says, or its own."""
    known = found.input_size
    if text is not None:
        given = sides(text)
        return given if len(given) > 2 else (*(known[:-2] if known else (3,)), *given)
    if known is None:
        raise UserError(f"nothing is known of what {found.name} takes; give --size, as in --size 3x224x224")
    return known


def key_values(items: list[str] | None, option: str, example: str) -> dict[str, str]:
    """The values of a repeatable option by their keys."""
    found = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{option} takes key=value, such as {example}; got {item!r}")
        found[key.strip()] = value.strip()
    return found


def print_json(values: Any) -> None:
    _results.append(json.dumps(values, allow_nan=False) + "\n")


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"anybatch {__version__}\n")
        raise typer.Exit
