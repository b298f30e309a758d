"""Commands about what is here: bench, list, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from anybatch.cli.common import (
    AsJson,
    Debug,
    app,
    err,
    names,
    numbers,
    out_console,
    print_json,
)


@app.command()
def bench(
    cases: Annotated[
        str | None,
        typer.Option(
            help="conv, grouped, norm, recompute, weight_standardize, agc, accuracy, step, inference, separated by "
            "commas; layers for all but the last two. All by default."
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
    autotune: Annotated[
        bool,
        typer.Option("--autotune", help="Launch Triton kernels in the fastest of a few ways, timed first; on CUDA."),
    ] = False,
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
        cases=names(cases, "--cases"),
        schemes=names(schemes, "--schemes"),
        models=names(models, "--models"),
        batch_sizes=[] if batch_sizes is None else numbers(batch_sizes, "--batch-sizes"),
        device=device,
        precision=precision,
        channels_last=channels_last,
        compile=compiled,
        autotune=autotune,
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
        print_json({"rows": rows, "targets": told, "file": str(path), "figure": figure and str(figure)})
    else:
        live.print_bench(out_console, rows, judged)
        told = f"rows: {path}" + (f"; figure: {figure}" if figure else "")
        out_console.print(told, markup=False, highlight=False, soft_wrap=True)
    if any(row["status"] != "ok" for row in rows):
        raise typer.Exit(1)


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
        print_json(tables)
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
        print_json(facts)
        return
    _print_tables(facts, "state")


def _print_tables(tables: dict[str, dict[str, Any]], heading: str) -> None:
    for name, entries in tables.items():
        table = Table("name", heading, title=name, title_justify="left", box=None, pad_edge=False)
        for entry, text in entries.items():
            table.add_row(escape(entry), escape(str(text)))
        out_console.print(table)
