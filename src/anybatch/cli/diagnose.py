"""The command diagnose: probes of one model, on one page."""

from __future__ import annotations

import inspect
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from anybatch.cli.common import (
    AsJson,
    Data,
    DataRoot,
    Debug,
    Size,
    UserError,
    app,
    err,
    named_model,
    out_console,
    print_json,
    sized,
)
from anybatch.suggest import listed_in, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from anybatch.models.named import Named
    from anybatch.report.diagnosis import Entry

PROBES = (
    "batch_dependence",
    "split_invariance",
    "tile_consistency",
    "signal_propagation",
    "elimination_singularities",
    "smoothness",
)
USUAL = ("batch_dependence", "split_invariance", "signal_propagation")
MOST = {"split_invariance": 4, "tile_consistency": 2, "smoothness": 4}
"""Samples that probes which run a model many times, or on large images, take at most."""
COLORS = {"fault": "red", "warning": "yellow", "note": "blue", "good": "green"}


@app.command()
def diagnose(
    model: Annotated[
        str,
        typer.Argument(
            help="A network's name (anybatch list --models), timm:NAME, torchvision:NAME, FILE.py:FUNCTION, or a "
            "folder that anybatch train or save_pretrained wrote."
        ),
    ],
    every: Annotated[bool, typer.Option("--all", help="Run all probes.")] = False,
    probe: Annotated[
        str | None,
        typer.Option(help=f"Probes to run, of {', '.join(PROBES)}; by default {', '.join(USUAL)}.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=2, help="Samples to probe with: the batch that norms see.")
    ] = 8,
    size: Size = None,
    data: Data = None,
    data_root: DataRoot = None,
    scheme: Annotated[str | None, typer.Option(help="How a network of the list normalizes.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A file of weights for a network that is named.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Of a network that is named.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and inputs that are drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html; runs/diagnose-MODEL by default.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Is a model free of its batch, and is its signal healthy? Findings with what to do, and a page with figures.

    Inputs are standard normal unless --data names real ones. Probes that run a model many times take fewer samples than
    --batch-size. Exit code 1 if a probe could not run.
    """
    import torch

    from anybatch.files import check_writable
    from anybatch.report import diagnosis

    names = _asked(every, probe)
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    folder = out or Path("runs") / f"diagnose-{''.join(c if c.isalnum() or c in '-_.' else '-' for c in model)}"
    check_writable(folder / "report.html")
    torch.manual_seed(seed)
    found = named_model(model, scheme=scheme, weights=weights, num_classes=num_classes)
    shape = sized(found, size)
    x, labels, what = _inputs(found, shape, batch_size, data, data_root, seed)
    untrained = _untrained(found, seed) if "signal_propagation" in names else None
    entries = [_entry(name, found, x, labels, untrained, i, len(names)) for i, name in enumerate(names, 1)]
    if data is None:
        entries = [
            entry if entry.result is None else replace(entry, result=diagnosis.on_noise(entry.result))
            for entry in entries
        ]
    facts = {
        "model": f"{found.name}{f' with {found.scheme}' if found.scheme else ''}",
        "parameters": f"{sum(p.numel() for p in found.model.parameters()):,}",
        "weights": "of a file" if found.trained else "as its builder drew them",
        "inputs": what,
    }
    command = shlex.join(["anybatch", "diagnose", model, *_options(locals())])
    page = diagnosis.write(entries, folder, title=f"Diagnosis of {found.name}", facts=facts, reproduce=command)
    if as_json:
        told = {
            entry.name: {"seconds": round(entry.seconds, 3), "error": entry.error or None}
            | ({} if entry.result is None else entry.result.as_dict())
            for entry in entries
        }
        print_json({"report": str(page), "facts": facts, "probes": told})
    else:
        _print(out_console, entries, page)
    if any(entry.error for entry in entries):
        raise typer.Exit(1)


def _asked(every: bool, probe: str | None) -> list[str]:
    if every and probe is not None:
        raise UserError("--all runs every probe; leave out --probe")
    if probe is None:
        return list(PROBES if every else USUAL)
    names = [name.replace("-", "_") for name in listed_in(probe)]
    for name in names:
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    if not names:
        raise UserError(f"--probe names none; known: {', '.join(PROBES)}")
    return list(dict.fromkeys(names))


def _inputs(
    found: Named, shape: tuple[int, ...], n: int, data: str | None, root: str | None, seed: int
) -> tuple[Tensor, Tensor | None, str]:
    import torch

    if data is None:
        if root is not None:
            raise UserError("--data-root goes with --data")
        x = torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed))
        return x, None, f"{n} standard normal samples of {' x '.join(map(str, shape))}"
    from anybatch import data as datasets
    from anybatch import recipe

    name, root = datasets.parse_data(data, root)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(f"--data gives square images, and {found.name} is to take {' x '.join(map(str, shape))}")
    section = recipe.Data(name=name, root=root, size=shape[1], seed=seed)
    statistics = None
    if found.trained and found.mean is not None and found.std is not None:
        statistics = found.mean, found.std
    with err.status(f"reading {name}"):
        images, classes = datasets.sample(section, n, statistics=statistics, evaluation=True)
    chans = images.images.shape[1]
    if chans != shape[0]:
        raise UserError(f"images of {name} have {chans} channels, and {found.name} takes {shape[0]}")
    if len(images) < n:
        raise UserError(f"--batch-size {n} is more than the {len(images)} images of {name} for evaluation")
    x, labels = images.__getitems__(range(n))
    fits = found.task == "classification" and len(found.classes) >= len(classes)
    told = f"{n} images of {name}, {shape[1]} x {shape[2]} pixels"
    return x, labels if fits else None, told


def _untrained(found: Named, seed: int) -> Any:
    """The same network as it was before training, where it is known how it was built."""
    import torch

    from anybatch.models.network import Network
    from anybatch.models.registry import create_network

    if not (found.trained and isinstance(found.model, Network)):
        return None
    cfg = found.model.default_cfg
    torch.manual_seed(seed)
    sizes = {"num_classes": found.model.num_classes, "in_chans": found.model.in_chans}
    return create_network(cfg["architecture"], cfg["scheme"], cfg["options"], **sizes)


def _entry(name: str, found: Named, x: Tensor, labels: Tensor | None, untrained: Any, i: int, total: int) -> Entry:
    from anybatch import probe as probes
    from anybatch.report.diagnosis import Entry

    run = getattr(probes, name)
    n = MOST.get(name, len(x))
    x = _larger(x[:n]) if name == "tile_consistency" else x[:n]
    given: dict[str, Any] = {}
    if "labels" in inspect.signature(run).parameters:
        given["labels"] = None if labels is None else labels[:n]
    if name == "split_invariance":  # in float64 where the model's own dtype says too little
        dtypes = [p.dtype for p in found.model.parameters() if p.is_floating_point()]
        given["double"] = any(dtype.itemsize < 4 for dtype in dtypes)
    begun = time.perf_counter()
    result, before, error = None, None, ""
    with err.status(f"{i} of {total}: {name.replace('_', ' ')}"):
        try:
            result = run(found.model, x, **given)
            if name == "signal_propagation" and untrained is not None:
                before = run(untrained, x, **given)
        except (ValueError, TypeError) as failed:
            error = " ".join(str(failed).split())
    seconds = time.perf_counter() - begun
    if seconds > 2:
        err.print(f"{name.replace('_', ' ')}: {seconds:.0f} s", style="dim", highlight=False)
    return Entry(name, result, error, seconds, before)


def _larger(x: Tensor) -> Tensor:
    """Images resized so that the smallest map of a tile still is one."""
    import torch.nn.functional as F

    if x.dim() != 4 or min(x.shape[-2:]) >= 384:
        return x
    scale = 384 / min(x.shape[-2:])
    if (x.mean(dim=(1, 2, 3)).abs() < 0.1).all() and x.std() > 0.9:  # noise keeps its variance where it is repeated
        return F.interpolate(x, scale_factor=scale, mode="nearest")
    return F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)


def _options(given: dict[str, Any]) -> list[str]:
    """What was asked, as the command line had it."""
    told: list[str] = ["--all"] if given["every"] else []
    names = ("probe", "batch_size", "size", "data", "data_root", "scheme", "weights", "num_classes", "seed")
    for name in names:
        if given[name] is not None:
            told += [f"--{name.replace('_', '-')}", str(given[name])]
    return told


def _print(console: Console, entries: list[Entry], page: Path) -> None:
    from anybatch.report.diagnosis import findings

    for names, finding in findings(entries):
        fix = f" → [bold]{escape(finding.fix)}[/]" if finding.fix else ""
        color = COLORS[finding.level]
        line = (
            f"[{color}]{finding.level:8}[/]{escape(finding.text)}{fix} [dim]({', '.join(names).replace('_', ' ')})[/]"
        )
        console.print(line, highlight=False, soft_wrap=True)
    for entry in entries:
        if entry.error:
            console.print(
                f"[red]not run [/]{escape(entry.name)}: {escape(entry.error)}", highlight=False, soft_wrap=True
            )
    console.print(f"{page}", markup=False, highlight=False, soft_wrap=True)
