"""What a trained BatchNorm network keeps when it is converted: docs/studies/conversion.

A ResNet-18 is trained with BatchNorm at batch 128, converted in each way, and fine-tuned at batch 2. The error is that
of test images, right after the conversion and after the fine-tuning, which has the same images and learning rates for
every way. Trained networks are kept, rows that are there already are not made again.

    python benchmarks/conversion.py train --data fashion-mnist --root data/fashion-mnist --seed 0 --out runs
    python benchmarks/conversion.py convert --data fashion-mnist --root data/fashion-mnist --seed 0 --out runs
    python benchmarks/conversion.py table --out runs
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anybatch
from anybatch import data
from anybatch.convert import convert_batchnorm
from anybatch.data import Images, Split
from anybatch.recipe import Data
from anybatch.rows import append
from anybatch.step import evaluate, training_loss

WIDTH = 16


@dataclass(frozen=True)
class Task:
    """How much of a data set is used, and for how long."""

    train_size: int
    epochs: int
    augment: tuple[str, ...]
    test_size: int = 2000


TASKS = {
    "fashion-mnist": Task(16000, 3, ("flip",)),
    "cifar10": Task(16000, 4, ("crop", "flip")),
}


def split_of(name: str, root: str) -> Split:
    task = TASKS[name]
    return data.load(
        Data(name=name, root=root, train_size=task.train_size, val_size=task.test_size, augment=task.augment)  # pyright: ignore[reportArgumentType]
    )


def network(split: Split) -> nn.Module:
    return anybatch.create_model(
        "resnet18",
        scheme="bn",
        num_classes=len(split.classes),
        in_chans=split.in_chans,
        stem="cifar",
        width=WIDTH,
    )


def kept_at(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}.pt"


def fit(
    model: nn.Module, images: Images, *, batch: int, steps: int, lr: float, seed: int, weight_decay: float = 5e-4
) -> None:
    """SGD with momentum 0.9 along a cosine with a warm-up of a tenth of the steps."""
    torch.manual_seed(seed)
    model.train()
    params = anybatch.optim.param_groups(model, weight_decay)
    optimizer = torch.optim.SGD(params, lr, momentum=0.9, nesterov=True)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images)).tolist()
        x, y = images.__getitems__([order.pop() for _ in range(batch)])
        # BatchNorm nets are trained in bfloat16 where that is many times faster; batches of 2 gain nothing by it.
        with torch.autocast("cpu", torch.bfloat16, enabled=batch > 8):
            loss = training_loss(model, x.contiguous(memory_format=torch.channels_last), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train(name: str, root: str, seed: int, out: Path) -> None:
    """A BatchNorm network, kept as a state dict."""
    if kept_at(out, name, seed).is_file():
        return
    split = split_of(name, root)
    torch.manual_seed(seed)
    model = network(split).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    started = time.process_time()
    steps = TASKS[name].epochs * len(split.train) // 128
    fit(model, split.train, batch=128, steps=steps, lr=0.15, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept_at(out, name, seed))
    print(f"{name} seed {seed}: {right(model, split.val):.2%} in {time.process_time() - started:.0f} s", flush=True)


class Annealed(nn.Module):
    """BatchNorm's constants first, the new norm in the end, and a straight line between them over some steps."""

    def __init__(self, frozen: nn.Module, norm: nn.Module, steps: int) -> None:
        super().__init__()
        self.frozen, self.norm, self.steps, self.step = frozen, norm, steps, 0

    def forward(self, x: Tensor) -> Tensor:
        share = min(self.step / self.steps, 1.0)
        self.step += self.training
        y = self.norm(x)
        return y if share == 1 else torch.lerp(self.frozen(x), y, share)


def annealed(model: nn.Module, converted: nn.Module, steps: int) -> nn.Module:
    frozen = dict(convert_batchnorm(model, "frozen").named_modules())
    for name, old in model.named_modules():
        if isinstance(old, nn.BatchNorm2d):
            parent, _, key = name.rpartition(".")
            owner = converted.get_submodule(parent)
            setattr(owner, key, Annealed(frozen[name], getattr(owner, key), steps))
    return converted


def fresh(model: nn.Module, to: str) -> nn.Module:
    """As whoever exchanges layers by hand: new norms as they are made."""
    converted = convert_batchnorm(model, to)
    names = {name for name, old in model.named_modules() if isinstance(old, nn.BatchNorm2d)}
    for name, norm in converted.named_modules():
        if name in names:
            norm.reset_parameters()  # pyright: ignore[reportCallIssue]
    return converted


FINE_TUNING = 200  # steps at batch 2
RATES = (5e-4, 5e-5)  # of which the better one counts

ANNEALED = "groups chosen, annealed"

Way = Callable[[nn.Module, str, list[Tensor]], nn.Module]
WAYS: dict[str, Way] = {
    "fresh norms": lambda model, to, images: fresh(model, to),
    "scale and shift copied": lambda model, to, images: convert_batchnorm(model, to),
    "calibrated, 8 groups": lambda model, to, images: convert_batchnorm(
        model, to, calibrate=images, groups=8, offset=0
    ),
    "groups chosen": lambda model, to, images: convert_batchnorm(model, to, calibrate=images, offset=0),
    "constants added": lambda model, to, images: convert_batchnorm(model, to, calibrate=images),
    "and 200 steps without labels": lambda model, to, images: convert_batchnorm(
        model, to, calibrate=images, distill=200
    ),
    ANNEALED: lambda model, to, images: annealed(
        model, convert_batchnorm(model, to, calibrate=images, offset=0), FINE_TUNING // 2
    ),
}
ALL: list[tuple[str, str, Way]] = [
    ("bn", "BatchNorm kept", lambda model, to, images: copy.deepcopy(model)),
    ("bn", "frozen", lambda model, to, images: convert_batchnorm(model, "frozen")),
    ("nf", "normalizer-free", lambda model, to, images: convert_batchnorm(model, to)),
    *((to, way, make) for to in ("gn", "ws+gn") for way, make in WAYS.items()),
]


def convert(name: str, root: str, seed: int, out: Path, *, to: str | None, tune: bool) -> None:
    """Rows of one trained network: accuracy after each way of converting it, and after fine-tuning."""
    ways = [way for way in ALL if to in (None, way[0])]
    path = out / "rows.jsonl"
    done = {key for key, row in read_rows(path).items() if row["fine_tuned"] or not tune}
    split = split_of(name, root)
    model = network(split)
    model.load_state_dict(torch.load(kept_at(out, name, seed), weights_only=True))
    model.eval()
    original = right(model, split.val)
    images = list(plain(split.train, 512).split(2))
    for to, way, make in ways:
        if (name, seed, to, way) in done or (way == ANNEALED and not tune):
            continue
        torch.manual_seed(seed)
        started = time.process_time()
        converted = make(model, to, images)
        row = {"data": name, "seed": seed, "to": to, "way": way, "original": original}
        row["seconds"] = round(time.process_time() - started, 1)
        row["converted"] = right(converted, split.val)
        after: list[float] = []
        for lr in RATES if tune else ():
            tuned = copy.deepcopy(converted)
            fit(tuned, split.train, batch=2, steps=FINE_TUNING, lr=lr, seed=seed)
            after.append(right(tuned, split.val))
        row["fine_tuned"] = after
        append(path, row)
        print(json.dumps(row), flush=True)


def right(model: nn.Module, images: Images) -> float:
    return 1 - evaluate(model, images)[0]


def plain(images: Images, count: int) -> Tensor:
    """The first training images without augmentation."""
    state = images._shift, images._flip
    try:
        images._shift, images._flip = 0, False
        return images.__getitems__(range(count))[0]
    finally:
        images._shift, images._flip = state


def read_rows(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The last row of each network and way."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {(row["data"], row["seed"], row["to"], row["way"]): row for row in rows}


def cells(pairs: list[tuple[float, float]]) -> tuple[str, str]:
    """Mean and standard deviation, and the share of the original's accuracy, in %; with less than 3 seeds how many."""
    if not pairs:
        return "", ""
    values = [value for value, _ in pairs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    few = "" if len(values) >= 3 else f" (n = {len(values)})"
    kept = statistics.mean(value / original for value, original in pairs)
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}{few}", f"{100 * kept:.1f}"


def table(out: Path) -> str:
    """Means over the seeds, in % of the test images, and the share of the original's accuracy that is kept."""
    rows = list(read_rows(out / "rows.jsonl").values())
    lines = []
    for name in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == name]
        seeds = sorted({row["seed"] for row in mine})
        trained = statistics.mean(next(r["original"] for r in mine if r["seed"] == seed) for seed in seeds)
        lines += [
            f"## {name}",
            "",
            f"Trained with BatchNorm: {trained:.1%} (mean of {len(seeds)} seeds).",
            "",
            "| to | | converted | kept | after fine-tuning at batch 2 | kept |",
            "|---|---|---|---|---|---|",
        ]
        for to, way in dict.fromkeys((row["to"], row["way"]) for row in mine):
            group = [row for row in mine if (row["to"], row["way"]) == (to, way)]
            told = [to, way]
            for key in ("converted", "fine_tuned"):
                pairs = [(row[key] if key == "converted" else max(row[key], default=None), row) for row in group]
                told += cells([(value, row["original"]) for value, row in pairs if value is not None])
            lines.append("| " + " | ".join(told) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("train", "convert", "table"))
    parser.add_argument("--data", choices=TASKS)
    parser.add_argument("--root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", choices=sorted({to for to, _, _ in ALL}), help="rows of one scheme alone")
    parser.add_argument("--no-fine-tuning", action="store_true", help="rows of the conversion alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.do == "table":
        print(table(given.out))
        return
    if given.do == "train":
        train(given.data, given.root, given.seed, given.out)
    else:
        convert(given.data, given.root, given.seed, given.out, to=given.to, tune=not given.no_fine_tuning)


if __name__ == "__main__":
    main()
