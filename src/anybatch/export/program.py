"""A network written as a ``torch.export`` program or an ONNX file, checked against the network."""

from __future__ import annotations

import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybatch import convert
from anybatch.convert.fold import copied
from anybatch.export.card import KEY, Card
from anybatch.export.runtime import EXTRA, Run, onnx_runner, relative_error, tensors
from anybatch.files import check_writable, write_file
from anybatch.methods.parameters import bare
from anybatch.models.named import Facts, Named, described
from anybatch.suggest import one_line

SUFFIXES = (".onnx", ".pt2")
BATCHES = (1, 2, 7)
TOLERANCE = 1e-4
"""Relative to the largest value of an output."""


class CheckError(Exception):
    """The exported network does not give what the network gives; nothing was written."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    path: Path
    card: Card
    fixed: str = ""
    """Why the size is fixed though it was to be dynamic; empty where it is not."""
    report: convert.FoldReport = field(default_factory=convert.FoldReport)
    error: float | None = None
    """The largest relative error that the check found; None where nothing was checked."""


def export(
    model: nn.Module | Named,
    path: str | Path,
    *,
    size: Sequence[int] | int | None = None,
    dynamic_size: bool = False,
    fold: bool = True,
    check: bool = False,
) -> Exported:
    """Write a network in evaluation as a program for any batch size, with a `Card` of what it is.

    Args:
        model: A network in evaluation mode and float32, which takes one batch of images; a copy on the CPU is
            exported. One that `anybatch.models.named.model_named` gave brings what is known of it to the card.
        path: ``.onnx`` for ONNX (opset 20; the input is named ``images``, and a single output ``logits`` or
            ``output``), ``.pt2`` for ``torch.export.load``. A file that is there is replaced whole, at the end.
        size: Of the images: H = W, (H, W), or all behind the batch, such as (C, H, W); None for the network's own.
        dynamic_size: Whether height and width are free too, where the network allows it; `Exported.fixed` says why
            not.
        fold: Whether to fold the network first, see `anybatch.convert.fold`.
        check: Whether to compare what is to be written with the network, on random images in batches of 1, 2 and 7,
            and with ``dynamic_size`` at another size: ONNX in ONNX Runtime, ``.pt2`` as it is loaded.

    Returns:
        What was written.

    Raises:
        ValueError: If the path has another ending or cannot be written; if the network is in training mode, not
            in float32, does not take such images, or cannot be exported.
        CheckError: If an output differs by more than 1e-4 of its largest value.
        ImportError: If a library of the extra ``export`` is missing.
    """
    target = _checked_path(path)
    named = model if isinstance(model, Named) else described(model)
    _needed_libraries(target, check)
    network, shape = _checked_network(named), _image_shape(named, size)
    original = network
    report = convert.FoldReport()
    if fold:
        network, report = convert.fold(network, return_report=True)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with _own_randomness(), torch.no_grad():
        wanted = _outputs(original, named.name, x[:1])
        program, fixed = _program(network, named.name, x, dynamic_size)
        card = Card.of(named, input_size=shape, dynamic_size=dynamic_size and not fixed, folded=len(report.folded))
        content = _onnx(program, card, len(wanted)) if target.suffix == ".onnx" else _pt2(program, card)
        del program
        error = _checked(content, target, original, x, card) if check else None
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, content)
    return Exported(target, card, fixed, report, error)


@contextmanager
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def _checked_path(path: str | Path) -> Path:
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    check_writable(target)  # now, and not after minutes
    return target


def _needed_libraries(target: Path, check: bool) -> None:
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if check else [])] if target.suffix == ".onnx" else []
    for library in needed:
        try:
            importlib.import_module(library)
        except ImportError:
            raise ImportError(f"{target.name} needs {library}: {EXTRA}") from None


def _checked_network(named: Named) -> nn.Module:
    """A copy on the CPU, or a `ValueError`."""
    model = bare(named.model)
    if named.task == "detection":
        raise ValueError(f"{named.name} takes lists of images and boxes; networks of one batch of images are exported")
    if model.training:
        raise ValueError(f"{named.name} is in training mode; call eval() before it is exported")
    held = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in held):
        raise ValueError(f"{named.name} is on the meta device, without values")
    if others := {str(t.dtype).removeprefix("torch.") for t in held if t.is_floating_point()} - {"float32"}:
        raise ValueError(f"{named.name} has tensors of {' and '.join(sorted(others))}; call float() before")
    return copied(model).cpu()


def _image_shape(facts: Facts, size: Sequence[int] | int | None) -> tuple[int, ...]:
    """(C, H, W) or (C, T, H, W)."""
    own = facts.input_size
    if size is None:
        if own is None:
            raise ValueError(f"nothing is known of the images of {facts.name}; give size=(C, H, W)")
        return own
    given = (size, size) if isinstance(size, int) else tuple(size)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given) or len(given) < 2:
        raise ValueError(f"size must be H, (H, W) or (C, H, W), in whole numbers above 0, got {size!r}")
    if len(given) > 2:
        return given
    if own is None:
        raise ValueError(f"nothing is known of the channels of {facts.name}; give size=(C, {given[0]}, {given[1]})")
    return (*own[:-2], *given)


def _outputs(model: nn.Module, name: str, x: Tensor) -> list[Tensor]:
    try:
        found = tensors(model(x))
    except Exception as error:  # of the network's own code
        raise ValueError(f"{name} does not take images of shape {tuple(x.shape)}: {_line(error)}") from None
    if not found:
        raise ValueError(f"{name} gives no tensors for images of shape {tuple(x.shape)}")
    return found


def _line(error: Exception) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # of colours
    return one_line(plain, 300) if plain.strip() else type(error).__name__


def _program(model: nn.Module, name: str, x: Tensor, dynamic_size: bool) -> tuple[Any, str]:
    """The exported program, and why its size is fixed where it was not to be."""
    batch = {0: torch.export.Dim("batch", min=1)}
    side = torch.export.Dim.DYNAMIC
    free = {**batch, x.dim() - 2: side, x.dim() - 1: side}
    fixed = ""
    if dynamic_size:
        # A linear layer behind flattening, say, leaves an equation between height and width.
        other = torch.randn(_other_size(x.shape))
        try:
            model(other)
            program = _exported(model, x, free)
            program.module()(other)
            return program, fixed
        except Exception as error:  # of torch.export and of the network's own code
            fixed = _line(error)
    try:
        return _exported(model, x, batch), fixed
    except Exception as error:
        raise ValueError(f"{name} cannot be exported: {_line(error)}") from None


def _other_size(shape: Sequence[int]) -> tuple[int, ...]:
    *front, height, width = shape
    return (*front, height + 32, width + 64)


def _exported(model: nn.Module, x: Tensor, free: dict[int, Any]) -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what torch logs of a failure is in its error too
    try:
        return torch.export.export(model, (x,), dynamic_shapes=(free,))
    finally:
        logging.disable(before)


def _onnx(program: Any, card: Card, outputs: int) -> bytes:
    one = "logits" if card.task in ("classification", "video") else "output"
    names = [one] if outputs == 1 else [f"{one}{i}" for i in range(outputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the exporter's own libraries are to change
        try:
            made: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=names
            )
        except Exception as error:
            raise ValueError(f"{card.name} cannot be exported to ONNX: {_line(error)}") from None
    made.model.metadata_props[KEY] = card.to_json()
    try:
        return made.model_proto.SerializeToString()
    except ValueError as error:  # protobuf's limit of 2 GB
        raise ValueError(f"{card.name} is too large for one ONNX file, take .pt2: {_line(error)}") from None


def _pt2(program: Any, card: Card) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: card.to_json()})
    return buffer.getvalue()


def _loaded(content: bytes, target: Path) -> Run:
    if target.suffix == ".onnx":
        return onnx_runner(content, target.name)[0]
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda x: tensors(module(x))


def _checked(content: bytes, target: Path, model: nn.Module, x: Tensor, card: Card) -> float:
    """The largest relative error, or a `CheckError`."""
    run = _loaded(content, target)
    shapes: list[tuple[int, ...]] = [(n, *x.shape[1:]) for n in BATCHES]
    if card.dynamic_size:
        shapes.append(_other_size(x.shape))
    found: dict[str, float] = {}
    for shape in shapes:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
        wanted, got = _outputs(model, card.name, images), run(images)
        if len(got) != len(wanted):
            raise CheckError(f"{target.name} gives {len(got)} outputs, {card.name} {len(wanted)}; nothing was written")
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            found[f"output {i} of a batch of {shape[0]} at {' x '.join(map(str, shape[1:]))}"] = relative_error(a, b)
    worst = max(found, key=lambda place: found[place])
    if not found[worst] <= TOLERANCE:
        raise CheckError(
            f"{target.name} differs from {card.name}: worst is {worst}, by {found[worst]:.2g} of its largest value "
            f"(allowed {TOLERANCE:g}); nothing was written"
        )
    return found[worst]
