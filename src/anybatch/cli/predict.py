"""The command predict: classes of images, by a trained network or an exported one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from anybatch.cli.common import AsJson, Debug, SkipBad, UserError, app, err, out_console, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from anybatch.models.named import Facts


def _image_files(folder: Path) -> list[Path]:
    from anybatch.data import SUFFIXES

    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _network(run: Path) -> tuple[Callable[[Tensor], Tensor], Facts]:
    """What gives logits of a batch of images, and what is known of it."""
    from anybatch.convert import fold
    from anybatch.models.named import stored

    try:
        if run.suffix == ".onnx":
            from anybatch.export import open_onnx

            outputs, card = open_onnx(run)
            return lambda x: outputs(x)[0], card
        found = stored(run)
    except ImportError as error:  # of huggingface_hub, of onnxruntime
        raise UserError(str(error)) from None
    return fold(found.model.float(), inplace=True), found


def _reader(facts: Facts) -> Callable[[Path], Tensor]:
    """What brings an image file to the network."""
    import dataclasses

    import torch

    from anybatch import data as datasets
    from anybatch.models.preprocessing import transforms_of

    if facts.task != "classification":
        what = facts.architecture or facts.name
        raise UserError(f"{facts.name} holds a network that tells no images apart: {what}")
    if facts.recipe is not None and facts.mean is None:
        raise UserError(
            f"{facts.name} was trained on images that come normalized ({facts.recipe['data']['name']}), a form to "
            f"which image files cannot be brought; train on image files or uint8 arrays to predict"
        )
    if facts.mean is None or facts.std is None or facts.input_size is None:
        raise UserError(f"nothing is known of the mean and std of images for {facts.name}, so that none can be brought")
    chans, _, size = facts.input_size
    if (facts.interpolation, facts.crop_pct) == ("bilinear", 1.0):  # as runs see their images
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (facts.mean, facts.std))
        return lambda file: (datasets.load_image(file, size, chans) / 255 - mean) / std
    bring = transforms_of(dataclasses.asdict(facts), chans)
    return lambda file: bring(datasets.open_image(file, chans))


@app.command()
def predict(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder that anybatch train or save_pretrained wrote, hf-hub:SOMEONE/SOMETHING, by push_to_hub, or a "
            ".onnx file that anybatch export wrote."
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

    network, facts = _network(run)
    prepare, classes = _reader(facts), facts.classes
    files = [file for path in images for file in (_image_files(path) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"no image files in {', '.join(map(str, images))}")
    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for file in files:
            try:
                x = prepare(file)
            except ValueError as error:
                if not skip_bad:
                    raise
                err.print(f"skipped: {error}", style="yellow", markup=False, soft_wrap=True)
                continue
            chances = network(x[None]).softmax(1)[0]
            if len(chances) != len(classes):
                raise UserError(f"{run} names {len(classes)} classes and tells {len(chances)} apart")
            best = chances.topk(min(top, len(classes)))
            likely = [
                {"class": classes[i], "probability": p}
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            found.append({"file": str(file), "classes": likely})
    if as_json:
        print_json({"images": found})
        return
    table = Table("image", "classes", box=None)
    for item in found:
        classes = ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in item["classes"])
        table.add_row(escape(item["file"]), escape(classes))
    out_console.print(table)
