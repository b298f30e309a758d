"""Commands under convert: weights from one library to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from anybatch.cli.common import (
    AsJson,
    Debug,
    UserError,
    app,
    key_values,
    out_console,
    print_json,
)

convert = typer.Typer(help="Bring weights from one library to another.", no_args_is_help=True)
app.add_typer(convert, name="convert")


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
    chosen = {key: read_value(value) for key, value in key_values(options, "--option", "stem=bit").items()}
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
        print_json({"out": str(out), **facts, "options": chosen, "from": told.layout, **counted, **mapped})
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
