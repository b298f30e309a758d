"""Exported files at work: ONNX Runtime, and how far its outputs are from the network's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch.export.card import KEY, Card
from anybatch.suggest import one_line

Run = Callable[[Tensor], list[Tensor]]
EXTRA = "pip install 'anybatch[export]'"


def tensors(output: Any) -> list[Tensor]:
    """The tensors that a network gave, in the order of its tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return [tensor for item in items if not isinstance(item, str) for tensor in tensors(item)]


def onnx_runner(file: bytes | str, name: str) -> tuple[Run, Any]:
    """What runs an ONNX file's content, or the file of that path, on the CPU, and ONNX Runtime's session.

    Raises:
        ValueError: If it is no ONNX file or damaged.
        ImportError: If onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(f"running {name} needs onnxruntime: {EXTRA}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whose classes ONNX Runtime does not document
        raise ValueError(f"{name} is damaged or no ONNX file: {one_line(error, 200)}") from None
    images = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        try:
            found = session.run(None, {images: x.numpy()})
        except Exception as error:
            raise ValueError(f"{name} does not take images of shape {tuple(x.shape)}: {one_line(error, 200)}") from None
        return [torch.from_numpy(output) for output in found]

    return run, session


def open_onnx(path: str | Path) -> tuple[Run, Card]:
    """An ONNX file that `anybatch.export.export` wrote: what runs it, and its card.

    Args:
        path: The file.

    Returns:
        A function from images, (N, C, H, W) in float32, to the list of the network's outputs, and the card.

    Raises:
        ValueError: If the file is missing, damaged or without a card.
        ImportError: If onnxruntime is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file at {path}")
    run, session = onnx_runner(str(path), str(path))
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise ValueError(f"{path} has no card ({KEY}), and was not written by anybatch export")
    try:
        return run, Card.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; infinite where shapes differ or a value is not finite."""
    if got.shape != wanted.shape:
        return float("inf")
    difference = (got.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
    size = max(wanted.double().abs().max().item(), 1e-12) if wanted.numel() else 1.0
    return difference / size if difference / size < float("inf") else float("inf")
