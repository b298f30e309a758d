"""Time and memory of a whole training step under each scheme, as ratios to BatchNorm's.

Each repeat times every scheme once, in an order drawn anew, and the medians of the per-repeat ratios are told: other
load on the machine then falls on all alike. Before anything is timed, each scheme's fast paths are checked against the
references. Needs torch alone.

    python benchmarks/steps.py --model resnet18 --size 32 --batch-sizes 2,8 --schemes bn,gn,ws+gn
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from anybatch.dispatch import backend
from anybatch.measure import device_name, saved_bytes
from anybatch.models import create_model


def make_step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def seconds(step: Callable[[], None], least: float) -> float:
    """Time of one step, over as many as fill ``least`` seconds."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < least or count < 2:
        step()
        count += 1
    return spent / count


def check(model: torch.nn.Module, x: torch.Tensor) -> None:
    """The fast paths agree with the references in this model."""
    with torch.no_grad():
        fast = model(x)
        with backend("reference"):
            exact = model(x)
    torch.testing.assert_close(fast, exact, rtol=1e-3, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--stem", default="cifar")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--schemes", default="bn,gn,ln,in,ws+gn,none")
    parser.add_argument("--batch-sizes", default="2,8")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--least", type=float, default=0.3, help="seconds of each measurement")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    schemes = args.schemes.split(",")
    for batch_size in map(int, args.batch_sizes.split(",")):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            x = torch.randn(batch_size, 3, args.size, args.size, device=args.device).to(memory_format=memory_format)
            y = torch.randint(0, 10, (batch_size,), device=args.device)
            steps, memory = {}, {}
            for scheme in dict.fromkeys(["bn", *schemes]):
                model = create_model(args.model, scheme, num_classes=10, stem=args.stem).to(args.device)
                model = model.to(memory_format=memory_format)
                check(model, x)
                memory[scheme] = saved_bytes(model, partial(model, x))
                steps[scheme] = make_step(model, x, y)
                steps[scheme]()
            ratios: dict[str, list[float]] = {scheme: [] for scheme in steps}
            for _ in range(args.repeats):
                order = random.sample(list(steps), len(steps))
                spent = {scheme: seconds(steps[scheme], args.least) for scheme in order}
                for scheme, value in spent.items():
                    ratios[scheme].append(value / spent["bn"])
            for scheme in schemes:
                row = {
                    "device": device_name(x.device),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "model": args.model,
                    "size": args.size,
                    "batch_size": batch_size,
                    "memory_format": str(memory_format).removeprefix("torch."),
                    "scheme": scheme,
                    "time_to_bn": round(statistics.median(ratios[scheme]), 3),
                    "time_quartiles": [round(q, 3) for q in statistics.quantiles(ratios[scheme], n=4)[::2]],
                    "saved_to_bn": round(memory[scheme] / memory["bn"], 3),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
