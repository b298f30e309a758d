"""Rows of results: append, read, repair. Nothing else touches the file.

A row is one JSON object on one line of ``rows.jsonl``: one run of a recipe, or in other files what `anybatch.bench`
measured.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NotRequired, TypedDict

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
KEYS = frozenset({"format", "id", "status", "recipe", "curve"})
"""What tells a run's row from other lines."""


class Evaluation(TypedDict):
    """One point of a learning curve."""

    epoch: int
    samples: int
    """Training images seen so far, repeats counted."""
    train_loss: float
    val_loss: float | None
    """Mean cross-entropy of the evaluated images; None where it is no finite number."""
    error: float
    """Share of the evaluated images that are wrong, 0 to 1."""
    epsilon: NotRequired[float]
    """Of a private run: the privacy spent so far."""


class PrivacyFacts(TypedDict):
    """What a private run spent, and how; of the weights alone: a row's losses and errors are told without noise."""

    epsilon: float
    """Spent by all steps so far."""
    delta: float
    noise_multiplier: float
    """Standard deviation of the noise in the summed gradient, in units of `max_grad_norm`."""
    max_grad_norm: float
    sample_rate: float
    """Probability with which a step takes an image."""
    steps: int


class DataFacts(TypedDict):
    """What the run was trained and evaluated on."""

    name: str
    train_images: int
    val_images: int
    classes: list[str]
    note: str
    """What a reader should know about the images, such as a synthetic exposure."""


class Row(TypedDict):
    """One run; `None` stands where a failed run has no number."""

    format: int
    id: str
    """`Recipe.id`."""
    purpose: str
    """``"run"``, or ``"tune"`` for a trial of a learning rate, evaluated on a part of the training images."""
    status: str
    """``"ok"`` or ``"failed"``."""
    message: str | None
    """Why the run failed, in one line."""
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    threads: int
    seed: int
    data: DataFacts | None
    peak_lr: float
    parameters: int | None
    multiply_adds: int | None
    """Of one image's forward pass."""
    curve: list[Evaluation]
    """One entry for each evaluation, also of a failed run up to its failure."""
    error: float | None
    """The last evaluation's error, 0 to 1."""
    images_per_second: float | None
    """In training, evaluation left out, data loading included."""
    peak_memory: int | None
    """Bytes, measured as `memory_measure` says."""
    memory_measure: str
    seconds: float
    """Wall time of the whole run."""
    privacy: NotRequired[PrivacyFacts]
    """Of private runs alone."""
    started: str
    """Time in UTC, ISO 8601."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested values, each with its dotted path."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to the file whole or not at all.

    Raises:
        OSError: If it cannot be written, a full disk say; the rows before it stay as they were.
    """
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if fcntl is not None:  # until the file is closed: cutting it back must not take another process's row along
            fcntl.flock(file, fcntl.LOCK_EX)
        before = os.fstat(file).st_size
        try:
            written = os.write(file, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file)
        except OSError:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def read(path: Path) -> list[Row]:
    """All rows of the file, in order; none where there is no file. A half-written last line is left out.

    Raises:
        ValueError: If a line before the last is no row, naming the line; nothing is dropped silently.
    """
    return read_kind(path, KEYS)  # pyright: ignore[reportReturnType] (mappings with the keys of a row)


def read_kind(path: Path, keys: Set[str], version: int = FORMAT) -> list[dict[str, Any]]:
    """`read`, for rows that have these keys and, in ``format``, this version."""
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    rows = [_parse(line, path, number, keys, version) for number, line in enumerate(lines, 1) if line.strip()]
    if rest.strip():  # a last line without its end: whole if it parses, else cut off half-way
        with contextlib.suppress(_NoRowError):
            rows.append(_parse(rest, path, len(lines) + 1, keys, version))
    return rows


class _NoRowError(ValueError):
    """A line that is not a row, unlike one of another version's format."""


def repair(path: Path, keys: Set[str] = KEYS, version: int = FORMAT) -> str | None:
    """Cut off a half-written last line, so that rows can be appended again; returns what was done, or None.

    Raises:
        ValueError: If the last line is no row, nor the beginning of one; the file stays as it was.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    whole, newline, rest = content.rpartition(b"\n")
    if not rest:
        return None
    try:
        _parse(rest, path, content.count(b"\n") + 1, keys, version)
    except _NoRowError:
        if not rest.startswith(b"{") or _is_json(rest):  # nothing that a crash leaves of a row
            raise
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
        return f"cut off a half-written last line of {len(rest)} bytes in {path}"
    with path.open("ab") as file:
        file.write(b"\n")
    return f"ended the last line of {path}"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return True


def _parse(line: bytes, path: Path, number: int, keys: Set[str], version: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        row = None
    if not isinstance(row, dict) or not keys <= row.keys():
        raise _NoRowError(f"line {number} of {path} is not a row; mend or delete that line, the others are whole")
    if row["format"] != version:
        raise ValueError(f"line {number} of {path} has format {row['format']}, this version reads {version}")
    return row
