"""Commands under convert: a network off BatchNorm, and weights from one library to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from anybatch.cli.common import (
    AsJson,
    Data,
    DataRoot,
    Debug,
    Size,
    UserError,
    app,
    err,
    key_values,
    named_model,
    out_console,
    print_json,
    sized,
)
from anybatch.suggest import listed

if TYPE_CHECKING:
    from torch import Tensor

    from anybatch.convert import ConversionReport
    from anybatch.models.named import Named

_FEW = 64  # images to calibrate on


class _ModelFirst(typer.core.TyperGroup):
    """What names no command is a model: ``convert torchvision:resnet50`` is ``convert model torchvision:resnet50``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["model", *args]
        return super().resolve_command(ctx, args)


convert = typer.Typer(
    cls=_ModelFirst,
    help="Take BatchNorm out of a trained network (convert MODEL), or bring weights from one library to another.",
    no_args_is_help=True,
)
app.add_typer(convert, name="convert")


@convert.command(name="model")
def convert_model(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder that anybatch train or save_pretrained wrote, hf-hub:SOMEONE/SOMETHING, timm:NAME, "
            "torchvision:NAME, FILE.py:FUNCTION, or a network's name; see anybatch list --models."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The .safetensors file to write; none tries it out.")] = None,
    to: Annotated[
        str, typer.Option(help="A scheme: gn, ws+gn, ln, in, pn, lcn, ws+bcn, frn, evos0, kn, sws, nf, frozen.")
    ] = "ws+gn",
    data: Data = None,
    data_root: DataRoot = None,
    size: Size = None,
    images: Annotated[int, typer.Option(min=2, max=512, help="Training images to calibrate on.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Of the steps without labels.")] = 2,
    distill: Annotated[int, typer.Option(min=0, help="Steps without labels that match the old network.")] = 0,
    groups: Annotated[str, typer.Option(help="Of norms with groups: a number, or auto.")] = "auto",
    offset: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Standard deviations of constants in front of group norms: more keeps more of what was learned, and "
            "normalizes less; 4 by default.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="A module that stays, with all it holds; repeatable.")
    ] = None,
    dp: Annotated[bool, typer.Option("--dp", help="For Opacus: nothing in place, nothing of other samples.")] = False,
    scheme: Annotated[str | None, typer.Option(help="How a network of the list normalizes before.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A file of weights for a network that is named.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Of a network that is named.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take BatchNorm out of a trained network and keep what it computes, as far as the new norm allows.

    With --data the new norms are fitted to what BatchNorm gave, forward only and without labels. The file is a network
    for every command that takes one.
    """
    if out is not None:
        _check_out(out)
    if groups != "auto" and not groups.isdecimal():
        raise UserError(f"--groups takes a number or auto, got {groups!r}")
    if distill and data is None:
        raise UserError("--distill needs images: --data digits, cifar10, imagefolder:DIR, ...")
    if data is None:
        for option, value in (("--data-root", data_root), ("--size", size), ("--offset", offset)):
            if value is not None:
                raise UserError(f"{option} goes with --data")
    from anybatch import live
    from anybatch.convert import convert_batchnorm
    from anybatch.convert.offsets import OFFSET
    from anybatch.convert.saved import Origin, save_converted

    how = {"scheme": scheme, "num_classes": num_classes}
    how = {key: value for key, value in how.items() if value is not None}
    found = named_model(model, weights=weights, **how)
    if weights is not None and found.architecture:  # as many as the weights have, which are not needed again
        how["num_classes"] = len(found.classes)
    loader = None if data is None else _calibration(found, data, data_root, size, images, batch_size)
    with live.phases(err) as tell:
        try:
            made, report = convert_batchnorm(
                found.model,
                to,
                calibrate=loader,
                exclude=exclude or (),
                groups="auto" if groups == "auto" else int(groups),
                dp=dp,
                distill=distill,
                offset=OFFSET if offset is None else offset,
                return_report=True,
                tell=tell,
            )
        except ImportError as error:
            raise UserError(str(error)) from None
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_converted(made, out, Origin(model, how, tuple(exclude or ()), dp), report)
    if as_json:
        print_json({"out": None if out is None else str(out), "model": model, **report.as_dict()})
        return
    _show(report)
    notes = [] if found.trained or ".py:" in model else ["its weights are drawn at random; --weights gives it others"]
    if loader is not None and (count := sum(map(len, loader))) < _FEW:
        notes.append(f"calibrated on {count} images; a few hundred tell more")
    if offset and not report.offsets:
        notes.append("no constants were added: no group norm takes one convolution's output, or they do not serve")
    for note in [*report.advice, *notes, *([] if out is None else [f"{out}: {model} with {report.to}"])]:
        out_console.print(note, markup=False, highlight=False, soft_wrap=True)


def _check_out(out: Path) -> None:
    from anybatch.files import check_writable

    if out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {out}")
    check_writable(out)


def _calibration(
    found: Named, data: str, root: str | None, size: str | None, images: int, batch_size: int
) -> list[Tensor]:
    """The first training images of a data set, normalized as the network takes them, in batches."""
    from anybatch import data as data_sets
    from anybatch.recipe import Data as DataSection

    shape = sized(found, size)
    if len(shape) != 3 or shape[1] != shape[2] or found.task == "detection":
        takes = "lists of images" if found.task == "detection" else "x".join(map(str, shape))
        raise UserError(f"--data gives square images, {found.name} takes {takes}; call convert_batchnorm(calibrate=)")
    name, at = data_sets.parse_data(data, root)
    statistics = None if found.mean is None or found.std is None else (found.mean, found.std)
    with err.status(f"reading {name}"):
        found_images, _ = data_sets.sample(
            DataSection(name=name, root=at, size=shape[1]), images, statistics=statistics
        )
    x, _ = found_images.__getitems__(range(len(found_images)))
    if x.shape[1] != shape[0]:
        raise UserError(f"--data {data} has images of {x.shape[1]} channels, and {found.name} takes {shape[0]}")
    return list(x.split(batch_size))


def _show(report: ConversionReport) -> None:
    """The report as tables, alike layers together."""
    from rich.table import Table

    told = f"{len(report.replaced)} norms replaced, {len(report.left)} left"
    if report.convolutions or report.convolutions_left:
        told += f"; {len(report.convolutions)} convolutions changed, {len(report.convolutions_left)} left plain"
    if report.drift is not None:
        told += f"; the output changed by {report.drift:.1%} of its norm"
    table = Table(title=f"{report.to}: {told}", title_justify="left", box=None)
    table.add_column("layer")
    table.add_column("becomes, or why not")
    table.add_column("unexplained", justify="right")
    for name, what in report.replaced.items():
        rest = report.residuals.get(name)
        table.add_row(name, what, "" if rest is None else f"{rest:.1%}")
    for name, what in report.branches.items():
        table.add_row(name, f"scales its branch: {what}")
    for name, why in (*report.left.items(), *report.convolutions_left.items()):
        table.add_row(name, f"stays: {why}")
    out_console.print(table, markup=False, highlight=False)
    if report.offsets:
        out_console.print(f"constants added in front of {len(report.offsets)} norms", highlight=False)
    if report.heads:
        out_console.print(f"fitted anew behind the norms: {listed(report.heads)}", markup=False, highlight=False)
    if report.new_parameters:
        out_console.print(f"new: {listed(report.new_parameters)}", markup=False, highlight=False)


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

    _check_out(out)
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
