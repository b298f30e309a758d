"""The command export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.common import (
    AsJson,
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


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder that anybatch train or save_pretrained wrote, hf-hub:SOMEONE/SOMETHING, timm:NAME, "
            "torchvision:NAME, FILE.py:FUNCTION, or a network's name; see anybatch list --models."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for torch.export.load.")],
    scheme: Annotated[str | None, typer.Option(help="How a network of the list normalizes.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A file of weights for a network that is named.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Of a network that is named.")] = None,
    size: Size = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Leave height and width free too, where the network allows it.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare with the network at batches 1, 2 and 7, ONNX in ONNX Runtime; above 1e-4 of an output's "
            "largest value nothing is written, and the exit code is 1.",
        ),
    ] = False,
    no_fold: Annotated[bool, typer.Option("--no-fold", help="Leave BatchNorm and filters as they are.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A network as a file that runs without its code, at any batch size: ONNX or torch.export.

    BatchNorm is folded into convolutions and standardized filters are made once. A card travels in the file: scheme,
    recipe, size, mean and std of the images, classes. anybatch predict takes the ONNX file.
    """
    import dataclasses

    from anybatch import export as exporting

    found = named_model(model, scheme=scheme, weights=weights, num_classes=num_classes)
    floating = [t.dtype for t in found.model.state_dict().values() if t.is_floating_point()]
    narrow = sorted({str(dtype).removeprefix("torch.") for dtype in floating if dtype.itemsize < 4})
    found.model.float()
    try:
        done = exporting.export(
            found, out, size=sized(found, size), dynamic_size=dynamic_size, fold=not no_fold, check=check
        )
    except ImportError as error:
        raise UserError(str(error)) from None
    except exporting.CheckError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    card = done.card
    if as_json:
        told = {
            "out": str(done.path),
            "bytes": done.path.stat().st_size,
            "fixed_because": done.fixed or None,
            "left": done.report.left,
            "relative_error": done.error,
        }
        print_json({**told, "card": dataclasses.asdict(card)})
        return
    freely = "batch and size are free" if card.dynamic_size else "the batch is free"
    notes = [
        f"{done.path}: {card.name}{f' with {card.scheme}' if card.scheme else ''}, {card.folded} layers folded, "
        f"{done.path.stat().st_size / 1e6:.1f} MB; images of {'x'.join(map(str, card.input_size or ()))}, {freely}",
        f"the size is fixed: {done.fixed}" if done.fixed else "",
        f"float32, from {' and '.join(narrow)}" if narrow else "",
        "" if card.trained or ".py:" in model else "its weights are drawn at random; --weights gives it others",
        f"not folded: {len(done.report.left)} layers; --json says why" if done.report.left else "",
        "" if done.error is None else f"checked at batches 1, 2 and 7: relative error {done.error:.1g} at most",
    ]
    for note in filter(None, notes):
        out_console.print(note, markup=False, highlight=False, soft_wrap=True)
