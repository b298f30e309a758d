"""The time Python takes for layers whose Triton kernels are launched, beside BatchNorm and ReLU: no GPU is needed.

In eager mode a GPU waits for whoever launches, until a step is large. Here launches and convolutions are left out, all
else is as on a GPU: checks, plans, tensors, autograd. A chain of layers runs forward and backward over a map so small
that BatchNorm's own time is that of its calls too. Microseconds for one layer, medians of interleaved rounds, and the
ratio to BatchNorm and ReLU in the same round.

    python benchmarks/host.py
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from anybatch import layers
from anybatch.dispatch import backend
from anybatch.kernels import fused_kn_conv, triton_common
from anybatch.measure import device_name
from anybatch.methods.windows import Windows

CHANNELS, SIZE, DEPTH = 64, 4, 20


def with_relu(layer: Any) -> nn.Module:
    return layer if layer.take_activation(nn.ReLU()) else nn.Sequential(layer, nn.ReLU())


MADE: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)),
    "kn(p=0)": lambda: with_relu(layers.KNConv2d(CHANNELS, CHANNELS, 3, padding=1, p=0)),
    "kn": lambda: with_relu(layers.KNConv2d(CHANNELS, CHANNELS, 3, padding=1)),
    "kn(groups=32)": lambda: with_relu(layers.KNConv2d(CHANNELS, CHANNELS, 3, padding=1, groups=32)),
    "gn": lambda: with_relu(layers.GroupNorm(CHANNELS)),
    "bcn": lambda: with_relu(layers.BatchChannelNorm2d(CHANNELS)),
    "pn": lambda: with_relu(layers.PositionalNorm(CHANNELS)),
    "frn": lambda: layers.FilterResponseNorm2d(CHANNELS),
    "lcn": lambda: with_relu(layers.LocalContextNorm2d(CHANNELS, 3)),
}


def convolved(x: Tensor, filters: Tensor, at: Windows, _: int) -> Tensor:
    """Of windows that are as many as positions."""
    return torch.empty_like(x)


def convolution_backward(_: Tensor, x: Tensor, filters: Tensor, *__: Any) -> tuple[Tensor, Tensor, None]:
    return torch.empty_like(x), torch.empty_like(filters), None


def launched(*_: Any) -> None:
    """What Triton compiled, computing nothing."""


def launch(plan: triton_common.Plan, *tensors: Tensor | None) -> None:
    plan.ready.setdefault(0, launched)
    plan.launch(*tensors)


def as_on_a_gpu() -> contextlib.ExitStack:
    """Within this context Triton's kernels take tensors of the CPU, and plans launch as if they had their code."""
    stack = contextlib.ExitStack()
    stack.enter_context(backend("triton"))
    for where, name, value in (
        (triton_common, "INTERPRETED", True),
        (triton_common.Plan, "__call__", launch),
        (torch.cuda, "current_device", lambda: 0),
        (fused_kn_conv, "convolve", convolved),
        (fused_kn_conv, "convolution_backward", convolution_backward),
    ):
        stack.enter_context(mock.patch.object(where, name, value))
    return stack


def timed(make: Callable[[], nn.Module], dtype: torch.dtype) -> Callable[[], float]:
    chain = nn.Sequential(*(make() for _ in range(DEPTH))).to(memory_format=torch.channels_last)  # pyright: ignore
    x = torch.randn(2, CHANNELS, SIZE, SIZE).to(dtype, memory_format=torch.channels_last)
    g = torch.ones_like(x)

    def run() -> float:
        for p in chain.parameters():
            p.grad = None
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = chain(x)
        y.backward(g)
        return (time.process_time() - start) / DEPTH * 1e6

    for _ in range(5):
        run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, help="rounds, each of which times every layer once")
    parser.add_argument("--float32", action="store_true", help="in place of bfloat16 under autocast")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {args.repeats}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.float32 if args.float32 else torch.bfloat16
    with as_on_a_gpu():
        runs = {name: timed(make, dtype) for name, make in MADE.items()}
        rounds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name in random.sample(list(runs), len(runs)):
                rounds[name].append(runs[name]())
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}")
    for name, times in rounds.items():
        ratio = statistics.median(a / b for a, b in zip(times, rounds["bn"], strict=True))
        print(f"{name:13} {statistics.median(times):6.0f} us  {ratio:5.2f}")


if __name__ == "__main__":
    main()
