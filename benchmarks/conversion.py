"""What a trained BatchNorm network keeps when it is converted: docs/studies/conversion.

A ResNet-18 is trained with BatchNorm at batch 128, converted in each way, and fine-tuned at batch 2. The error is that
of test images, right after the conversion and after the fine-tuning, which has the same images and learning rate for
every way. Trained networks are kept, rows that are there already are not made again.

    python benchmarks/conversion.py train --data fashion-mnist --root data/fashion-mnist --seed 0 --out runs
    python benchmarks/conversion.py convert --data fashion-mnist --root data/fashion-mnist --seed 0 --out runs
    python benchmarks/conversion.py table --out runs
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import anybatch
from anybatch import data
from anybatch.data import Images, Split
from anybatch.recipe import Data
from anybatch.step import training_loss

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
    right = 1 - anybatch.step.evaluate(model, split.val)[0]
    print(f"{name} seed {seed}: {right:.2%} in {time.process_time() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("train", "convert", "table"))
    parser.add_argument("--data", choices=TASKS)
    parser.add_argument("--root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.do == "train":
        train(given.data, given.root, given.seed, given.out)


if __name__ == "__main__":
    main()
