"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def check_writable(path: Path) -> None:
    """Raise a `ValueError` where no file could be written, before any work is done for it. Nothing is made."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: you may not write into {folder}")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, bring it to disk, and put it in the place of ``path``.

    Whatever goes wrong, a full disk say, the file that was there stays as it was. The new one has its permissions, or
    those that any new file has.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        write(temporary)
        temporary.chmod(stat.S_IMODE(mode))  # safetensors writes files that nobody else can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Replace the content of a file whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors whole or not at all; tensors that share memory are written twice."""
    from safetensors import SafetensorError  # here, so that who uses the layers alone does not load it
    from safetensors.torch import save_file

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        replace_file(path, lambda temporary: save_file(own, temporary, metadata=metadata))
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
