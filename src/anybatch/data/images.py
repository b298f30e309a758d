"""Images: read from files, held with their labels, and fetched by the batch, augmented and normalized."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anybatch.suggest import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int, str], None]
"""Called with what is done, how much there is, and of what."""
SKIP_HINT = "; --skip-bad (data.skip_bad) leaves unreadable images out"


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
            (torchvision's RandomCrop with padding); where S is larger, RandomResizedCrop with ``crop_area`` to 1 of
            the area.
            ``"flip"``: left and right swapped with probability 1/2. ``"randaugment"``: torchvision's RandAugment.
        crop_area: Of RandomResizedCrop.
        layers: RandAugment's operations on an image.
        magnitude: Their strength, 0 to 30.

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
        crop_area: float = 0.35,
        layers: int = 2,
        magnitude: int = 9,
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

            self._each.append(v2.RandomResizedCrop(size, scale=(crop_area, 1.0), antialias=True))
        if "randaugment" in augment:
            if images.dtype != torch.uint8:
                raise ValueError(
                    "data.augment 'randaugment' needs images of whole numbers 0..255; use 'crop' or 'flip'"
                )
            if c not in (1, 3):
                raise ValueError(f"data.augment 'randaugment' needs 1 or 3 channels, the images have {c}")
            from torchvision.transforms import v2

            self._each.append(v2.RandAugment(layers, magnitude))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Image ``i``, (C, H, W) float32, and its label."""
        x_bchw, y_b = self.__getitems__([i])
        return x_bchw[0], int(y_b)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images at ``indices``, (B, C, H, W) float32, and their labels, (B,) int64; loaders `collate` them."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        x = self.images[index]
        if self._shift or self._flip:
            x = shift_flip(x, self._shift, flip=self._flip)
        if self._each and len(index):
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


class Mix:
    """The ``collate_fn`` that mixes a batch of `Images` with torchvision's MixUp and CutMix.

    With both, the first half of the batch goes through MixUp and the second through CutMix. Each draws one ratio and
    mixes every image with the one before it in its half.

    Args:
        classes: K, how many there are.
        mixup: Parameter of the distribution of MixUp's ratios; None for no MixUp.
        cutmix: As ``mixup``, of CutMix.

    Shape:
        (B, C, H, W) and labels (B,) to (B, C, H, W) and shares (B, K).
    """

    def __init__(self, classes: int, mixup: float | None, cutmix: float | None) -> None:
        from torchvision.transforms import v2

        self._mixers: list[Callable[..., tuple[Tensor, Tensor]]] = []
        if mixup is not None:
            self._mixers.append(v2.MixUp(alpha=mixup, num_classes=classes))
        if cutmix is not None:
            self._mixers.append(v2.CutMix(alpha=cutmix, num_classes=classes))

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        parts = [part.tensor_split(len(self._mixers)) for part in batch]
        mixed = [mix(x, y) for mix, x, y in zip(self._mixers, *parts, strict=True) if len(x)]
        return torch.cat([x for x, _ in mixed]), torch.cat([y for _, y in mixed])


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
    image_hwc = np.array(open_image(path, in_chans, least=2 * size))
    image = torch.from_numpy(image_hwc).reshape(*image_hwc.shape[:2], in_chans).permute(2, 0, 1)
    return fit(image[None], size)[0]


def open_image(path: str | Path, in_chans: int, *, least: int | None = None) -> Image:
    """An image file as Pillow's image, grey or RGB; see `load_image`.

    Args:
        path: The file.
        in_chans: 3 for RGB, 1 for grey.
        least: Sides that are enough, to which a JPEG file need not be decoded whole.
    """
    import PIL.Image
    import PIL.ImageOps

    if in_chans not in (1, 3):
        raise ValueError(f"in_chans must be 1 (grey) or 3 (RGB) to read image files, got {in_chans}")
    mode = "L" if in_chans == 1 else "RGB"
    try:
        with PIL.Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # converting such values cuts them off at 255
                raise ValueError(
                    f"it has more than 8 bits a channel (mode {file.mode}); "
                    "scale it to 8 bits with a range that suits your images"
                )
            if least is not None:
                file.draft(mode, (least, least))
            return PIL.ImageOps.exif_transpose(file).convert(mode)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # Pillow raises each of them
        raise ValueError(f"cannot read image {path}: {one_line(error)}") from None


def fit(x: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) resized (bilinear, antialiased) to a shorter side of ``size``, cut to the central square."""
    if x.shape[2:] == (size, size):
        return x
    from torchvision.transforms.v2 import functional

    # Parts bound float copies. torch fails to bring whole numbers that lie one channel behind the other to one pixel.
    dense = {"memory_format": torch.channels_last if size == 1 else torch.contiguous_format}
    parts = [functional.resize(part.contiguous(**dense), [size], antialias=True) for part in x.split(1024)]
    return functional.center_crop(torch.cat(parts), [size, size]).contiguous()


def decode(part: Part, skip_bad: bool, keep: bool, progress: Progress | None) -> tuple[Part, int]:
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


def left_out(bad: int) -> tuple[str, ...]:
    """The note that ``bad`` images could not be read; no note where there were none."""
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
