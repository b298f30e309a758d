"""Data sets: each is one function in `DATASETS`; `load` brings their images to one form and into portions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anybatch.data.images import (
    Files,
    Images,
    Mix,
    Part,
    Progress,
    collate,
    decode,
    fit,
    left_out,
    load_image,
    open_image,
)
from anybatch.data.portions import set_aside, subset
from anybatch.data.sets import DATASETS, SUFFIXES, Raw
from anybatch.recipe import Data
from anybatch.suggest import unknown

__all__ = [
    "DATASETS",
    "MEMORY",
    "SUFFIXES",
    "Files",
    "Images",
    "Mix",
    "Part",
    "Progress",
    "Raw",
    "Split",
    "Statistics",
    "channel_statistics",
    "collate",
    "load",
    "load_image",
    "open_image",
    "parse_data",
    "sample",
]

MEMORY = 2**30
"""Bytes of decoded images that are kept in memory; larger folders are decoded on every access."""


@dataclass(frozen=True)
class Split:
    """Images to train on and images to evaluate on."""

    name: str
    train: Images
    val: Images
    classes: tuple[str, ...]
    in_chans: int
    size: int
    """H = W in pixels, of images for evaluation."""
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
    fields = config.model_dump_json(
        exclude={"batch_size", "accumulate", "eval_batch_size", "workers", "mixup", "cutmix"}
    )
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


def sample(
    config: Data, count: int, *, statistics: Statistics | None = None, evaluation: bool = False
) -> tuple[Images, tuple[str, ...]]:
    """A few images without augmentation, and the classes: ``count``, balanced, or as many as there are.

    No others are brought to ``config.size`` or decoded, and portions that the config asks for do not matter.

    Args:
        config: Name, root and size.
        count: How many.
        statistics: As of `load`.
        evaluation: Take images for evaluation, where a data set sets some aside itself; its training images otherwise.

    Raises:
        ValueError: If the data set is unknown, absent or unreadable, or its images are of another kind than statistics.
    """
    if config.name not in DATASETS:
        raise unknown("data set", config.name, DATASETS)
    raw = DATASETS[config.name](config.model_copy(update={"val_fraction": 0.5}), None)  # which is not applied
    part = raw.val if evaluation and raw.val is not None else raw.train
    part = _square(subset(part, min(count, len(part.labels)), config.seed, "images", "count"), config.size)
    mean, std = _scale(raw.train.images if statistics is None else part.images, config, statistics)
    return Images(part.images, part.labels, size=part.images.shape[2], mean=mean, std=std), raw.classes


def _load(config: Data, statistics: Statistics | None, progress: Progress | None) -> Split:
    raw = DATASETS[config.name](config, progress)
    if len(raw.classes) < 2:
        raise ValueError(f"data set {config.name} must have at least 2 classes, got {', '.join(raw.classes)}")
    train, val = _portions(raw, config)
    train, val = _square(train, config.size), _square(val, config.eval_size or config.size)
    size = train.images.shape[2]
    if isinstance(val.images, Files) and config.eval_size is not None:
        val = Part(Files(val.images.paths, config.eval_size), val.labels)
    train, val, notes = _read_files(train, val, config, progress)
    lacking = sorted(set(range(len(raw.classes))) - set(train.labels.tolist()))
    if lacking:
        raise ValueError(
            f"the {len(train.labels)} training images leave out class {raw.classes[lacking[0]]}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}; use more images"
        )
    mean, std = map(tuple, _scale(train.images, config, statistics))
    return Split(
        name=config.name,
        train=Images(
            train.images,
            train.labels,
            size=size,
            mean=mean,
            std=std,
            augment=config.augment,
            crop_area=config.crop_area,
            layers=config.randaugment_layers,
            magnitude=config.randaugment_magnitude,
        ),
        val=Images(val.images, val.labels, size=val.images.shape[2], mean=mean, std=std),
        classes=raw.classes,
        in_chans=len(mean),
        size=val.images.shape[2],
        mean=mean,
        std=std,
        note=" ".join(raw.notes + notes),
    )


def _scale(images: Tensor | Files, config: Data, statistics: Statistics | None) -> Statistics:
    """Mean and standard deviation of each channel that images are normalized with: those given, or the images' own."""
    mean, std = map(tuple, statistics or channel_statistics(images))
    whole = images.dtype == torch.uint8
    if config.normalize is not None:
        if not whole:
            raise ValueError(
                f"data.normalize={config.normalize} is for images of whole numbers 0..255; those of {config.name} come "
                "normalized"
            )
        centre = {"unit": 0.0, "symmetric": 0.5}[config.normalize]
        mean, std = (centre,) * images.shape[1], (centre or 1.0,) * images.shape[1]
    elif statistics is not None and any(mean) != whole:  # 0 and 1 stand for images that come normalized
        raise ValueError(
            f"{config.name} holds images {'of whole numbers 0..255' if whole else 'that come normalized'}, "
            f"the model was trained on the other kind"
        )
    if len(mean) != images.shape[1] or len(std) != len(mean):
        c = images.shape[1]
        raise ValueError(f"the images have {c} channel{'s' * (c > 1)}, the model was trained on {len(mean)}")
    return mean, std


def _portions(raw: Raw, config: Data) -> tuple[Part, Part]:
    """Training and evaluation images, in the order that `load` documents."""
    train, val, fraction = raw.train, raw.val, config.val_fraction
    if val is None:
        if fraction is None:
            raise ValueError(f"{config.name} comes in one part; set data.val_fraction, such as 0.2, to split it")
        (train, val), fraction = set_aside(train, fraction, config.seed), None
    train = subset(train, config.train_size, config.seed, "training", "data.train_size")
    if fraction is not None:
        train, val = set_aside(train, fraction, config.seed)
    val = subset(val, config.val_size, config.seed, "evaluation", "data.val_size")
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
    train, bad = decode(train, config.skip_bad, fits, progress)
    val, bad_val = decode(val, config.skip_bad, fits, progress)
    return train, val, left_out(bad + bad_val)


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
