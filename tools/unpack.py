"""Unpack packed data sets into folders of images, one a class, as `anybatch` and torchvision's ImageFolder read them.

    python tools/unpack.py ARCHIVE... --out DIR

Members keep their paths (``train/<class>/...``, ``val/<class>/...``, ``test/<class>/...``). A WebP strip of small
images, 32 pixels wide and a multiple of 32 high, becomes one PNG file per image; other members are copied as they are.
"""

from __future__ import annotations

import argparse
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import rich.progress
from PIL import Image
from rich.console import Console

STRIP = 32  # pixels: width of a strip, height and width of the images in it


def unpack(archive: Path, out: Path, console: Console | None = None) -> int:
    """Unpack one tar archive, plain or compressed; files of the same name are replaced.

    Args:
        archive: The tar file.
        out: Folder to unpack into; made if it is not there.
        console: Where progress is shown; None for standard error.

    Returns:
        The number of files written.

    Raises:
        ValueError: If the archive cannot be read, or a member would land outside ``out``; what was written stays.
    """
    written = 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        show = console or Console(stderr=True)
        with (
            rich.progress.open(archive, "rb", description=archive.name, console=show) as file,
            tarfile.open(fileobj=file, mode="r|*") as tar,  # one pass, so that a compressed file is read once
        ):
            for member in tar:
                safe = tarfile.data_filter(member, str(out))
                content = tar.extractfile(safe) if safe.isfile() and safe.name.endswith(".webp") else None
                data = content.read() if content else b""
                images = split_strip(data, safe.name) if data else []
                target = out / safe.name
                if data:
                    target.parent.mkdir(parents=True, exist_ok=True)
                if images:
                    for i, image in enumerate(images):
                        image.save(target.with_name(f"{target.stem}-{i:03d}.png"), compress_level=1)
                elif data:
                    target.write_bytes(data)
                else:
                    tar.extract(safe, out, filter="data")
                written += len(images) or int(safe.isfile())
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is not safe to unpack: {error}") from None
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"cannot unpack {archive}: {error}") from None
    return written


def split_strip(data: bytes, name: str) -> list[Image.Image]:
    """The images, 32 x 32 RGB, stacked downwards in a WebP file, or none if it is an image of its own."""
    try:
        strip = Image.open(io.BytesIO(data))
        W, H = strip.size
        if W != STRIP or H <= STRIP or H % STRIP:
            return []
        return [strip.crop((0, top, W, top + STRIP)).convert("RGB") for top in range(0, H, STRIP)]
    except OSError as error:
        raise tarfile.ReadError(f"{name} in it cannot be read: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 with one line on standard error where an archive cannot be unpacked."""
    parser = argparse.ArgumentParser(description="Unpack packed data sets into folders of images, one a class.")
    parser.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="tar files, plain or compressed")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to unpack into")
    options = parser.parse_args(arguments)
    for archive in options.archives:
        try:
            written = unpack(archive, options.out)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"{archive.name}: {written} files in {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
