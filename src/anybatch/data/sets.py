"""Data sets: each is one function in `DATASETS`, which reads all its images."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.data.images import Files, Part, Progress, decode, left_out
from anybatch.data.portions import balanced, set_aside
from anybatch.recipe import Data
from anybatch.suggest import one_line

FOLDER_SIZE = 64
"""Pixels to which `imagefolder` brings images where ``data.size`` is None."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What an image file's name ends in; other files in a folder are no images."""


HOLDS = {
    "cifar10": "cifar-10-batches-py, or train/ and test/ with one folder of images a class",
    "cifar100": "cifar-100-python, or train/ and test/ with one folder of images a class",
    "fashion-mnist": "the four IDX files (train-images-idx3-ubyte, ...), plain or .gz, or FashionMNIST/raw with them",
    "imagefolder": "train/ and val/ (or test/) with one folder of images a class, or with the class folders themselves",
}
"""What is expected in a data set's folder."""


@dataclass(frozen=True)
class Raw:
    """What a data set's function returns: all its images, before sizes and portions are chosen."""

    train: Part
    val: Part | None
    """None: ``data.val_fraction`` of the training images is set aside."""
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Sentences that a reader of results should know."""


def digits(config: Data, progress: Progress | None = None) -> Raw:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 grey, each under its own exposure; nothing is downloaded.

    ``(x - mean) / std * e^u + s``, with mean and std of all pixels, u uniform in ±1.5, s uniform in ±2, both drawn
    once per image by ``seed``. Float32, so not for RandAugment. 512 training images, or ``train_size``; all others
    are for evaluation.
    """
    from sklearn.datasets import load_digits

    source: Any = load_digits()  # a Bunch, which type checkers do not know
    x = torch.tensor(source.images, dtype=torch.float32)[:, None]
    y = torch.tensor(source.target)
    generator = torch.Generator().manual_seed(config.seed)
    u, s = 2 * torch.rand(2, len(x), 1, 1, 1, generator=generator) - 1
    var, mean = torch.var_mean(x)
    whole = Part((x - mean) / var.sqrt() * torch.exp(1.5 * u) + 2 * s, y)
    n = config.train_size or 512
    if n >= len(y):
        raise ValueError(
            f"data.train_size={n} is more than the {len(y) - 1} training images that leave one for evaluation"
        )
    train, val = balanced(y, n, generator)
    note = (
        "Scikit-learn's handwritten digits (8 x 8) under a synthetic exposure: each image's contrast is multiplied by "
        "e^u, u uniform in ±1.5, and its brightness shifted by up to ±2 standard deviations, both drawn once for each "
        "image by data.seed."
    )
    return Raw(whole.take(train), whole.take(val), tuple("0123456789"), (note,))


def cifar10(config: Data, progress: Progress | None = None) -> Raw:
    """CIFAR-10, 32 x 32 RGB, 10 classes; torchvision downloads it where ``root`` is None or an empty folder.

    ``root`` may hold the authors' ``cifar-10-batches-py``, or ``train/`` and ``test/`` folders of images, one folder a
    class.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", config, progress)


def cifar100(config: Data, progress: Progress | None = None) -> Raw:
    """CIFAR-100, 32 x 32 RGB, 100 classes; torchvision downloads it where ``root`` is None or an empty folder.

    ``root`` may hold the authors' ``cifar-100-python``, or ``train/`` and ``test/`` folders of images, one folder a
    class.
    """
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", config, progress)


def _cifar(dataset: Any, title: str, config: Data, progress: Progress | None) -> Raw:
    root = _root(config)
    if (root / "train").is_dir():
        raw = _folders(root, 32)
        train, bad = decode(raw.train, config.skip_bad, True, progress)
        val, bad_val = decode(raw.val, config.skip_bad, True, progress) if raw.val is not None else (None, 0)
        return Raw(train, val, raw.classes, left_out(bad + bad_val))
    try:
        sets = [dataset(str(root), train=train, download=_is_empty(root)) for train in (True, False)]
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"cannot read or download {title}: {one_line(error)}; {root} should hold {HOLDS[config.name]}"
        ) from None
    train, val = (
        Part(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets
    )
    return Raw(train, val, tuple(sets[0].classes))


def fashion_mnist(config: Data, progress: Progress | None = None) -> Raw:
    """Fashion-MNIST, 28 x 28 grey, 10 classes; torchvision downloads it where ``root`` is None or an empty folder.

    ``root`` may hold the four IDX files, plain or ``.gz``, or torchvision's ``FashionMNIST/raw`` with them.
    """
    from torchvision.datasets import FashionMNIST

    root = _root(config)
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    found = _idx_files(root, names) or _idx_files(root / "FashionMNIST" / "raw", names)
    if not found:
        try:
            FashionMNIST(str(root), download=_is_empty(root))
        except (OSError, RuntimeError, EOFError, zlib.error) as error:
            raise ValueError(
                f"cannot read or download Fashion-MNIST: {one_line(error)}; {root} should hold {HOLDS['fashion-mnist']}"
            ) from None
        found = _idx_files(root / "FashionMNIST" / "raw", names)
    x, y, x_val, y_val = (read_idx(path) for path in found)
    for images, labels, folder in ((x, y, "train"), (x_val, y_val, "t10k")):
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or int(labels.max()) > 9:
            raise ValueError(
                f"{root}: the {folder} files must hold N images (N, H, W) and N labels 0 to 9, "
                f"got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
    return Raw(Part(x[:, None], y.long()), Part(x_val[:, None], y_val.long()), tuple(FashionMNIST.classes))


def imagefolder(config: Data, progress: Progress | None = None) -> Raw:
    """Folders of images, one a class: ``root/train`` with ``root/val`` or ``root/test``, or class folders in ``root``.

    Without val and test, ``data.val_fraction`` sets a share of each class aside. Images are decoded to RGB and brought
    to ``data.size`` pixels, 64 if it is None: the shorter side is resized, the central square kept. Training images
    that are to be cropped at random are kept larger by 8/7. What fits into `anybatch.data.MEMORY` is decoded once.
    """
    if config.root is None:
        raise ValueError(
            f"data.root is None; imagefolder needs a folder with {HOLDS['imagefolder']}, as in imagefolder:DIR"
        )
    raw = _folders(_root(config), config.size or FOLDER_SIZE)
    if raw.val is None and config.val_fraction is None:
        raise ValueError(
            f"{config.root} has no val or test folder; data.val_fraction (--val-fraction), such as 0.2, sets training "
            f"images aside"
        )
    return raw


def arrays(config: Data, progress: Progress | None = None) -> Raw:
    """An ``.npz`` file with arrays ``x`` and ``y``, and ``x_val`` and ``y_val`` if they are apart.

    ``x`` is uint8, (N, H, W, C) with C 1 to 4, or (N, H, W); ``y`` is whole numbers, (N,), with each of 0..K-1 present.
    Without ``x_val``, ``data.val_fraction`` of the images is set aside, 0.2 if it is None. Nothing is unpickled.
    """
    path = config.root
    if path is None:
        raise ValueError("data.root is None; arrays needs an .npz file, as in --data FILE.npz")
    held = read_npz(path)
    missing = [name for name in ("x", "y") if name not in held] + [
        b for a, b in (("x_val", "y_val"), ("y_val", "x_val")) if a in held and b not in held
    ]
    if missing:
        raise ValueError(f"{path} lacks the array {' and '.join(missing)}; it holds {', '.join(held) or 'nothing'}")
    part = _array_part(held["x"], held["y"], path, "")
    present = part.labels.unique()
    classes = int(present[-1]) + 1
    absent = sorted(set(range(classes)) - set(present.tolist()))
    if absent:
        shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        raise ValueError(
            f"{path}: y goes up to {classes - 1} but has no image of class {shown}; number classes from 0 on"
        )
    names = tuple(map(str, range(classes)))
    if "x_val" in held:
        val = _array_part(held["x_val"], held["y_val"], path, "_val")
        if val.images.shape[1:] != part.images.shape[1:]:
            raise ValueError(
                f"{path}: x_val must have (C, H, W) {tuple(part.images.shape[1:])} like x, "
                f"got {tuple(val.images.shape[1:])}"
            )
        if int(val.labels.max()) >= classes:
            raise ValueError(f"{path}: y_val has the label {int(val.labels.max())}, y only 0 to {classes - 1}")
        return Raw(part, val, names)
    if config.val_fraction is not None:
        return Raw(part, None, names)
    return Raw(*set_aside(part, 0.2, config.seed), names, ("A fifth of the images was set aside for evaluation.",))


DATASETS: dict[str, Callable[[Data, Progress | None], Raw]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion-mnist": fashion_mnist,
    "imagefolder": imagefolder,
    "arrays": arrays,
}
"""Each data set's function. One more is a function that returns a `Raw`, and a line here."""


def _is_empty(root: Path) -> bool:
    return not root.exists() or not any(root.iterdir())


def _root(config: Data) -> Path:
    """The folder that was asked for, which must be there, or the data set's own in the user's cache."""
    if config.root is None:
        return Path("~/.cache/anybatch").expanduser() / config.name
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(
            f"data.root={config.root} is {'a file' if root.exists() else 'not there'}; "
            f"{config.name} needs a folder with {HOLDS[config.name]}"
        )
    return root


def _idx_files(folder: Path, names: list[str]) -> list[Path]:
    """The files of these names, plain or ``.gz``; none where one is absent."""
    found = [path for name in names for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    plain = {path.stem if path.suffix == ".gz" else path.name: path for path in reversed(found)}
    return [plain[name] for name in names] if len(plain) == len(names) else []


def read_idx(path: Path) -> Tensor:
    """The array of bytes in an IDX file, plain or ``.gz``.

    A file starts with 0, 0, 8 (unsigned bytes), the number of dimensions, and each dimension as a big-endian int32.

    Raises:
        ValueError: If the file is something else or cut off, naming it.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}; fetch it again") from None
    if len(content) < 8 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} is not an IDX file of bytes; it starts with {content[:4].hex(' ') or 'nothing'}")
    sizes = np.frombuffer(content, ">i4", content[3], 4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes))
    if len(values) != np.prod(sizes):
        raise ValueError(f"{path} is cut off: its header says {sizes}, {len(values)} bytes follow; fetch it again")
    return torch.tensor(values).reshape(sizes)


def read_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays ``x``, ``y``, ``x_val``, ``y_val`` that an ``.npz`` file holds; a `ValueError` names another file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"data.root={path} is not a file; arrays needs an .npz file with x and y")
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an .npz archive, or is cut off")
        with np.load(file, allow_pickle=False) as held:
            return {name: held[name] for name in ("x", "y", "x_val", "y_val") if name in held.files}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"cannot read {path}: {one_line(error)}; write it with numpy.savez(path, x=..., y=...), "
            "x of uint8 and y of whole numbers"
        ) from None


def _array_part(x: np.ndarray, y: np.ndarray, path: str, suffix: str) -> Part:
    """Checked arrays as images (N, C, H, W) and labels."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and not 1 <= x.shape[3] <= 4) or 0 in x.shape:
        raise ValueError(
            f"{path}: x{suffix} must be uint8 0..255, (N, H, W, C) with C 1 to 4 last, or (N, H, W), none of them 0; "
            f"got {x.dtype} {x.shape}"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ValueError(f"{path}: y{suffix} must be {len(x)} whole numbers, one an image, got {y.dtype} {y.shape}")
    if int(y.min()) < 0:
        raise ValueError(
            f"{path}: y{suffix} has the label {int(y.min())}; labels go from 0 to the number of classes - 1"
        )
    images = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    return Part(images, torch.from_numpy(y.astype(np.int64)))


def _folders(root: Path, size: int) -> Raw:
    """The image files under ``root``, not decoded."""
    if not (root / "train").is_dir():
        train, classes = _class_folders(root, size)
        return Raw(train, None, classes)
    train, classes = _class_folders(root / "train", size)
    for name in ("val", "test"):
        if (root / name).is_dir():
            val, val_classes = _class_folders(root / name, size)
            if val_classes != classes:
                lacking = [
                    f"{a} lacks {', '.join(sorted(missing))}"
                    for a, missing in (
                        (name, set(classes) - set(val_classes)),
                        ("train", set(val_classes) - set(classes)),
                    )
                    if missing
                ]
                raise ValueError(f"{root}: train and {name} must hold the same class folders; {'; '.join(lacking)}")
            return Raw(train, val, classes)
    return Raw(train, None, classes)


def _class_folders(folder: Path, size: int) -> tuple[Part, tuple[str, ...]]:
    """The images in a folder's folders, and those folders' names."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} has no class folders; put the images of each class into a folder of its own")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(
            Path(place) / file
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not found:
            raise ValueError(f"class folder {folder / name} holds no image ({', '.join(SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    return Part(Files(tuple(paths), size), torch.tensor(labels)), tuple(names)
