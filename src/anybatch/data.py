"""Data sets: each is one function in `DATASETS`; `load` brings their images to one form and into portions."""

from __future__ import annotations

import gzip
import math
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anybatch.recipe import Data
from anybatch.suggest import unknown

Progress = Callable[[int, int, str], None]
"""Called with what is done, how much there is, and of what."""

FOLDER_SIZE = 64
"""Pixels to which `imagefolder` brings images where ``data.size`` is None."""
MEMORY = 2**30
"""Bytes of decoded images that are kept in memory; larger folders are decoded on every access."""
SKIP_HINT = "; --skip-bad (data.skip_bad) leaves unreadable images out"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What an image file's name ends in; other files in a folder are no images."""


# Images


@dataclass(frozen=True)
class Files:
    """Image files, decoded when they are indexed: it stands where a tensor (N, 3, size, size) of uint8 does."""

    paths: tuple[Path, ...]
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.paths), 3, self.size, self.size)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self.read(i) for i in index.tolist()])

    def read(self, i: int) -> Tensor:
        """The i-th image, (3, size, size) uint8."""
        try:
            return load_image(self.paths[i], self.size, 3)
        except ValueError as error:
            raise ValueError(f"{error}{SKIP_HINT}") from None


class Part(NamedTuple):
    """Images and their labels."""

    images: Tensor | Files
    """(N, C, H, W), uint8 0..255, or float32 that is normalized already."""
    labels: Tensor
    """(N,) int64, 0..K-1."""

    def take(self, index: Tensor) -> Part:
        """The images at these places, in this order."""
        if isinstance(self.images, Files):
            images: Tensor | Files = Files(tuple(self.images.paths[i] for i in index.tolist()), self.images.size)
        else:
            images = self.images[index]
        return Part(images, self.labels[index])


class Images(Dataset[tuple[Tensor, int]]):
    """Images of one size with labels, fetched singly or by the batch, augmented and normalized.

    Every image of a batch draws its own augmentation, from torch's global generator, in this order: shift and flip,
    crop and resize, RandAugment. Nothing is drawn where ``augment`` is empty.

    Args:
        images: (N, C, S, S), uint8 0..255, or float32 that is normalized already.
        labels: (N,) int64.
        size: H = W in pixels of what comes out. S may be larger only with ``"crop"``.
        mean: One per channel on the 0..1 scale; used on uint8 alone.
        std: As ``mean``.
        augment: ``"crop"``: where S is ``size``, a shift by up to ``max(1, size // 8)`` pixels with reflected borders
            (torchvision's RandomCrop with padding); where S is larger, RandomResizedCrop with 0.35 to 1 of the area.
            ``"flip"``: left and right swapped with probability 1/2. ``"randaugment"``: torchvision's RandAugment.

    Raises:
        ValueError: If sizes do not fit each other, or RandAugment is asked for on other than uint8 images with 1 or
            3 channels.
    """

    def __init__(
        self,
        images: Tensor | Files,
        labels: Tensor,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[str] = (),
    ) -> None:
        n, c, stored = images.shape[:3]
        if len(labels) != n:
            raise ValueError(f"labels must be one for each of the {n} images, got {len(labels)}")
        if stored < size or (stored > size and "crop" not in augment):
            raise ValueError(f"images are {stored} pixels high; without data.augment 'crop' they must be size={size}")
        if "crop" in augment and stored < 2:
            raise ValueError("data.augment 'crop' needs images of at least 2 pixels, got 1")
        self.images = images
        self.labels = labels
        self._mean = 255 * torch.tensor(mean).reshape(c, 1, 1)
        self._std = 255 * torch.tensor(std).reshape(c, 1, 1)
        self._shift = max(1, size // 8) if "crop" in augment and stored == size else 0
        self._flip = "flip" in augment
        self._each: list[Callable[[Tensor], Tensor]] = []
        if stored > size:
            from torchvision.transforms import v2

            self._each.append(v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True))
        if "randaugment" in augment:
            if images.dtype != torch.uint8:
                raise ValueError(
                    "data.augment 'randaugment' needs images of whole numbers 0..255; use 'crop' or 'flip'"
                )
            if c not in (1, 3):
                raise ValueError(f"data.augment 'randaugment' needs 1 or 3 channels, the images have {c}")
            from torchvision.transforms import v2

            self._each.append(v2.RandAugment())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Image ``i``, (C, H, W) float32, and its label."""
        x_bchw, y_b = self.__getitems__([i])
        return x_bchw[0], int(y_b)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images at ``indices``, (B, C, H, W) float32, and their labels, (B,) int64; loaders `collate` them."""
        index = torch.as_tensor(indices)
        x = self.images[index]
        if self._shift or self._flip:
            x = shift_flip(x, self._shift, flip=self._flip)
        if self._each:
            x = torch.stack([self._augment_one(image) for image in x])
        if x.dtype == torch.uint8:
            x = x.float().sub_(self._mean).div_(self._std)
        return x, self.labels[index]

    def _augment_one(self, image: Tensor) -> Tensor:
        for transform in self._each:
            image = transform(image)
        return image


def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The ``collate_fn`` for `Images`, whose batches are whole already."""
    return batch


def shift_flip(x: Tensor, shift: int, *, flip: bool) -> Tensor:
    """Move each image by its own whole number of pixels, and swap left and right in half of them.

    The same as padding by ``shift`` with reflection and cropping at random, as torchvision does image by image, in
    one indexing operation for the batch.

    Args:
        x: (B, C, S, S), S > shift.
        shift: Largest move up, down, left or right, in pixels; 0 moves nothing and draws nothing.
        flip: Whether to flip, with probability 1/2.

    Returns:
        (B, C, S, S), with the dtype of ``x``.
    """
    B, C, S = x.shape[:3]
    place_s = torch.arange(S)
    row_bs = col_bs = place_s.expand(B, S)
    if shift:
        moves_2b1 = torch.randint(-shift, shift + 1, (2, B, 1))
        row_bs, col_bs = S - 1 - (S - 1 - (place_s + moves_2b1).abs()).abs()
    if flip:
        col_bs = torch.where(torch.rand(B, 1) < 0.5, col_bs.flip(1), col_bs)
    source = (row_bs[:, :, None] * S + col_bs[:, None, :]).reshape(B, 1, S * S)
    return x.reshape(B, C, S * S).gather(2, source.expand(B, C, S * S)).reshape(B, C, S, S)


def load_image(path: str | Path, size: int, in_chans: int) -> Tensor:
    """One image file as evaluation sees it: the shorter side brought to ``size`` pixels, then the central square.

    A photo's orientation tag is obeyed; of an animation the first frame is taken. Large JPEG files are decoded at the
    smallest of libjpeg's scales (1, 1/2, 1/4, 1/8) that leaves them twice as large as needed, which is much faster.

    Args:
        path: A JPEG, PNG, WebP, GIF, BMP, TIFF or other file that Pillow reads, with 8 bits a channel.
        size: H = W in pixels.
        in_chans: 3 for RGB, 1 for grey.

    Returns:
        (in_chans, size, size) uint8.

    Raises:
        ValueError: If the file cannot be read, naming it; if ``in_chans`` is another number.
    """
    from PIL import Image, ImageOps

    if in_chans not in (1, 3):
        raise ValueError(f"in_chans must be 1 (grey) or 3 (RGB) to read image files, got {in_chans}")
    mode = "L" if in_chans == 1 else "RGB"
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # converting such values cuts them off at 255
                raise ValueError(
                    f"it has more than 8 bits a channel (mode {file.mode}); "
                    "scale it to 8 bits with a range that suits your images"
                )
            file.draft(mode, (2 * size, 2 * size))
            image_hwc = np.array(ImageOps.exif_transpose(file).convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises each of them
        raise ValueError(f"cannot read image {path}: {_one_line(error)}") from None
    image = torch.from_numpy(image_hwc).reshape(*image_hwc.shape[:2], in_chans).permute(2, 0, 1)
    return fit(image[None], size)[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fit(x: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) resized (bilinear, antialiased) to a shorter side of ``size``, cut to the central square."""
    if x.shape[2:] == (size, size):
        return x
    from torchvision.transforms.v2 import functional

    parts = [functional.resize(part, [size], antialias=True) for part in x.split(1024)]  # bounds float copies
    return functional.center_crop(torch.cat(parts), [size, size]).contiguous()


# Portions


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ranks(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image's place, 0.., in a random order of its class, and the images in its class; both (N,) int64."""
    rank, count = torch.empty_like(labels), torch.empty_like(labels)
    order = torch.randperm(len(labels), generator=generator)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members], count[members] = torch.arange(len(members)), len(members)
    return rank, count


def _balanced(labels: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of ``n`` images, as many of each class as there are or as divide evenly, and of the rest; ascending."""
    rank, _ = _ranks(labels, generator)
    order = torch.argsort(rank * (int(labels.max()) + 1) + labels)
    return order[:n].sort().values, order[n:].sort().values


def _subset(part: Part, n: int | None, seed: int, what: str, argument: str) -> Part:
    if n is None or n == len(part.labels):
        return part
    if n > len(part.labels):
        raise ValueError(f"{argument}={n} is more than the {len(part.labels)} {what} images there are")
    return part.take(_balanced(part.labels, n, _generator(seed))[0])


def set_aside(part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    """What stays and what is set aside: ``fraction`` of the images, and of each class as nearly as whole images allow.

    At least one image of each class stays.

    Raises:
        ValueError: If there is not one image to set aside.
    """
    labels = part.labels
    rank, count = _ranks(labels, _generator(seed))
    # Classes take turns in the rounding: the offset, below one image, differs from class to class.
    share = (rank + (labels + 0.5) / (int(labels.max()) + 1)) / count
    share[rank == count - 1] = torch.inf
    n = min(max(1, round(fraction * len(labels))), int(share.isfinite().sum()))
    if n == 0:
        raise ValueError(f"no image can be set aside for evaluation: there is one image a class ({len(labels)} in all)")
    order = torch.argsort(share, stable=True)
    return part.take(order[n:].sort().values), part.take(order[:n].sort().values)


# Data sets


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
    generator = _generator(config.seed)
    u, s = 2 * torch.rand(2, len(x), 1, 1, 1, generator=generator) - 1
    var, mean = torch.var_mean(x)
    whole = Part((x - mean) / var.sqrt() * torch.exp(1.5 * u) + 2 * s, y)
    n = config.train_size or 512
    if n >= len(y):
        raise ValueError(
            f"data.train_size={n} is more than the {len(y) - 1} training images that leave one for evaluation"
        )
    train, val = _balanced(y, n, generator)
    note = (
        "Scikit-learn's handwritten digits (8 x 8) under a synthetic exposure: each image's contrast is multiplied by "
        "e^u, u uniform in ±1.5, and its brightness shifted by up to ±2 standard deviations."
    )
    return Raw(whole.take(train), whole.take(val), tuple("0123456789"), (note,))


def cifar10(config: Data, progress: Progress | None = None) -> Raw:
    """CIFAR-10, 32 x 32 RGB, 10 classes; torchvision downloads it where ``root`` is None or an empty folder.

    ``root`` may hold the authors' ``cifar-10-batches-py``, or ``train/`` and ``test/`` folders of images, one folder a
    class.
    """
    root = _root(config)
    if (root / "train").is_dir():
        raw = _folders(root, 32)
        train, bad = _decode(raw.train, config.skip_bad, True, progress)
        val, bad_val = _decode(raw.val, config.skip_bad, True, progress) if raw.val is not None else (None, 0)
        return Raw(train, val, raw.classes, _left_out(bad + bad_val))
    from torchvision.datasets import CIFAR10

    try:
        sets = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"cannot read or download CIFAR-10: {_one_line(error)}; {root} should hold the folder "
            "cifar-10-batches-py, or train/ and test/ with one folder of images a class"
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
            FashionMNIST(str(root), download=True)
        except (OSError, RuntimeError, EOFError, zlib.error) as error:
            raise ValueError(
                f"cannot download Fashion-MNIST: {_one_line(error)}; {root} should hold "
                f"{', '.join(names)}, plain or .gz"
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
    that are to be cropped at random are kept larger by 8/7. What fits into `MEMORY` is decoded once.
    """
    if config.root is None:
        raise ValueError("data.root is None; imagefolder needs a folder of images, as in imagefolder:DIR")
    raw = _folders(_root(config), config.size or FOLDER_SIZE)
    if raw.val is None and config.val_fraction is None:
        raise ValueError(
            f"{config.root} has no val or test folder; set data.val_fraction (such as 0.2) to set training images aside"
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
    "fashion-mnist": fashion_mnist,
    "imagefolder": imagefolder,
    "arrays": arrays,
}
"""Each data set's function. One more is a function that returns a `Raw`, and a line here."""


def _root(config: Data) -> Path:
    """The folder that was asked for, which must be there, or the data set's own in the user's cache."""
    if config.root is None:
        return Path("~/.cache/anybatch").expanduser() / config.name
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(
            f"data.root={config.root} is {'a file' if root.exists() else 'not there'}; {config.name} needs a folder"
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
        raise ValueError(f"cannot read {path}: {_one_line(error)}; fetch it again") from None
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
            f"cannot read {path}: {_one_line(error)}; write it with numpy.savez(path, x=..., y=...), "
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


def _decode(part: Part, skip_bad: bool, keep: bool, progress: Progress | None) -> tuple[Part, int]:
    """Read every file once: the readable ones, in memory with ``keep``, and how many others there were."""
    files = part.images
    if isinstance(files, Tensor):
        return part, 0
    good: list[int] = []
    images: list[Tensor] = []
    for i in _reported(range(len(files)), "decode images", progress):
        try:
            image = files.read(i)
        except ValueError:
            if not skip_bad:
                raise
            continue
        good.append(i)
        if keep:
            images.append(image)
    if not good:
        raise ValueError(f"none of the {len(files)} images can be read, such as {files.paths[0]}")
    part = part.take(torch.tensor(good))
    return Part(torch.stack(images), part.labels) if keep else part, len(files) - len(good)


def _left_out(bad: int) -> tuple[str, ...]:
    return (f"{bad} unreadable image{'s were' if bad > 1 else ' was'} left out.",) if bad else ()


def _reported(items: range, what: str, progress: Progress | None) -> Iterator[int]:
    """The items; what takes longer than two seconds is reported to ``progress``, some ten times a second."""
    last = time.monotonic() + 1.9
    shown = False
    for done, item in enumerate(items):
        now = time.monotonic()
        if progress is not None and now - last >= 0.1:
            progress(done, len(items), what)
            last, shown = now, True
        yield item
    if progress is not None and shown:
        progress(len(items), len(items), what)


# From a recipe to images


@dataclass(frozen=True)
class Split:
    """Images to train on and images to evaluate on."""

    name: str
    train: Images
    val: Images
    classes: tuple[str, ...]
    in_chans: int
    size: int
    """H = W in pixels."""
    mean: tuple[float, ...]
    """One per channel, of the training images, on the 0..1 scale; 0 for images that come normalized."""
    std: tuple[float, ...]
    """As ``mean``; 1 for images that come normalized."""
    note: str
    """What a reader of results should know, such as a synthetic exposure or images left out; "" for nothing."""


Statistics = tuple[Sequence[float], Sequence[float]]
_KEPT = 2  # a study has two in use: one for its runs, one for the trials of learning rates
_loaded: dict[tuple[object, ...], Split] = {}


def load(config: Data, *, statistics: Statistics | None = None, progress: Progress | None = None) -> Split:
    """The images that a recipe's data section describes; the last two results are kept, so asking again is free.

    Portions are chosen by ``config.seed``, in this order. A data set that comes in one part gets its evaluation images
    by ``val_fraction``. ``train_size`` and ``val_size`` take balanced subsets. On a data set with a split of its own,
    ``val_fraction`` of the training images chosen so far takes the place of the evaluation images, which are ignored.
    ``holdout`` does so once more, on any data set, and ``val_size`` does not apply to what it sets aside.

    Args:
        config: What to load.
        statistics: Mean and standard deviation to normalize with, one per channel on the 0..1 scale, as a trained model
            was; None takes those of the training images.
        progress: Told of what takes longer than two seconds.

    Raises:
        ValueError: If the data set is unknown, absent, unreadable or too small for what is asked.
    """
    if config.name not in DATASETS:
        raise unknown("data set", config.name, DATASETS)
    fields = config.model_dump_json(exclude={"batch_size", "accumulate", "eval_batch_size", "workers"})
    root = Path(config.root).expanduser() if config.root else None
    changed = root.stat().st_mtime_ns if root is not None and root.exists() else None
    key = (fields, changed, str(statistics))  # a file that was written again is read again
    if key not in _loaded:
        split = _load(config, statistics, progress)
        while len(_loaded) >= _KEPT:
            del _loaded[next(iter(_loaded))]
        _loaded[key] = split
    split = _loaded[key]
    if config.batch_size > len(split.train):
        raise ValueError(f"data.batch_size={config.batch_size} is larger than the {len(split.train)} training images")
    return split


def _load(config: Data, statistics: Statistics | None, progress: Progress | None) -> Split:
    raw = DATASETS[config.name](config, progress)
    if len(raw.classes) < 2:
        raise ValueError(f"data set {config.name} must have at least 2 classes, got {', '.join(raw.classes)}")
    train, val = _portions(raw, config)
    train, val, left_out = _read_files(_square(train, config.size), _square(val, config.size), config, progress)
    lacking = sorted(set(range(len(raw.classes))) - set(train.labels.tolist()))
    if lacking:
        raise ValueError(
            f"the {len(train.labels)} training images leave out class {raw.classes[lacking[0]]}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}; use more images"
        )
    size = val.images.shape[2]
    mean, std = map(tuple, statistics or channel_statistics(train.images))
    if len(mean) != train.images.shape[1] or len(std) != len(mean):
        c = train.images.shape[1]
        raise ValueError(f"the images have {c} channel{'s' * (c > 1)}, the model was trained on {len(mean)}")
    return Split(
        name=config.name,
        train=Images(train.images, train.labels, size=size, mean=mean, std=std, augment=config.augment),
        val=Images(val.images, val.labels, size=size, mean=mean, std=std),
        classes=raw.classes,
        in_chans=len(mean),
        size=size,
        mean=mean,
        std=std,
        note=" ".join(raw.notes + left_out),
    )


def _portions(raw: Raw, config: Data) -> tuple[Part, Part]:
    """Training and evaluation images, in the order that `load` documents."""
    train, val, fraction = raw.train, raw.val, config.val_fraction
    if val is None:
        if fraction is None:
            raise ValueError(f"{config.name} comes in one part; set data.val_fraction, such as 0.2, to split it")
        (train, val), fraction = set_aside(train, fraction, config.seed), None
    train = _subset(train, config.train_size, config.seed, "training", "data.train_size")
    if fraction is not None:
        train, val = set_aside(train, fraction, config.seed)
    val = _subset(val, config.val_size, config.seed, "evaluation", "data.val_size")
    return (train, val) if config.holdout is None else set_aside(train, config.holdout, config.seed)


def _square(part: Part, size: int | None) -> Part:
    """Arrays brought to ``size``; files have their size already."""
    if isinstance(part.images, Files):
        return part
    H, W = part.images.shape[2:]
    if size is None and H != W:
        raise ValueError(f"images are {H} x {W} pixels; set data.size to bring them to a square")
    return Part(fit(part.images, size or H), part.labels)


def _read_files(train: Part, val: Part, config: Data, progress: Progress | None) -> tuple[Part, Part, tuple[str, ...]]:
    """Image files decoded into memory if they fit, and without the unreadable ones if these may be skipped."""
    if isinstance(train.images, Files) and "crop" in config.augment:
        train = Part(Files(train.images.paths, -(-train.images.size * 8 // 7)), train.labels)
    fits = sum(math.prod(part.images.shape) for part in (train, val)) <= MEMORY
    if not fits and not config.skip_bad:
        return train, val, ()
    train, bad = _decode(train, config.skip_bad, fits, progress)
    val, bad_val = _decode(val, config.skip_bad, fits, progress)
    return train, val, _left_out(bad + bad_val)


def channel_statistics(images: Tensor | Files) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, on the 0..1 scale; 0 and 1 for float images, which are normalized.

    Exact in memory, by counting each of the 256 values; files are sampled, at most 1024 of them at even distances.
    A channel that never changes gets 1/255, one step of its scale.
    """
    C = images.shape[1]
    if images.dtype != torch.uint8:
        return (0.0,) * C, (1.0,) * C
    if isinstance(images, Files):
        images = images[torch.arange(0, len(images), -(-len(images) // 1024))]
    value = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append(float((share * value).sum()))
        std.append(max(float((share * (value - mean[-1]) ** 2).sum() ** 0.5), 1 / 255))
    return tuple(mean), tuple(std)


def parse_data(text: str, root: str | None = None) -> tuple[str, str | None]:
    """What ``--data`` says: a data set's name, and the folder or file that holds it.

    ``digits``, ``cifar10``, ``imagefolder:DIR`` (so for any name), ``FILE.npz``, or a folder with ``train`` in it.

    >>> parse_data("images.npz")
    ('arrays', 'images.npz')
    >>> parse_data("cifar10", root="/data")
    ('cifar10', '/data')

    Raises:
        ValueError: If it is none of these, with the nearest names; if ``root`` gives a second place.
    """
    name, colon, place = text.partition(":")
    if text in DATASETS:
        return text, root
    if name in DATASETS and colon and place:
        found = name, place
    elif text.lower().endswith(".npz"):
        found = "arrays", text
    elif Path(text).expanduser().is_dir():
        if not (Path(text).expanduser() / "train").is_dir():
            raise ValueError(
                f"--data {text} has no train folder; for a folder of class folders write imagefolder:{text}"
            )
        found = "imagefolder", text
    else:
        raise unknown("data set", text, [*DATASETS, "imagefolder:DIR", "FILE.npz"])
    if root is not None:
        raise ValueError(f"--data {text} says where the data are, and so does root={root}; give one of them")
    return found
