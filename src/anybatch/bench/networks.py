"""Whole training steps, and networks in evaluation, which are folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.bench.cell import Cell, Checked, Variant, compared, graphed, in_mode, without_randomness
from anybatch.bench.choice import Net, Settings
from anybatch.bench.timing import Work
from anybatch.convert import fold
from anybatch.dispatch import backend
from anybatch.measure import saved_bytes
from anybatch.schemes import scheme as parse_scheme


def _net_check(chosen: Settings, model: nn.Module, mode: str, x: Tensor) -> Checked:
    """Outputs alone: gradients of a whole random network move by a hundredth where its input moves by a rounding."""
    start = without_randomness(copy.deepcopy(model))
    x = x[:2]
    exact_one = copy.deepcopy(start).double()
    with torch.no_grad(), backend("reference"):
        exact = exact_one(x.double())
        del exact_one
        with chosen.autocast():
            naive = copy.deepcopy(start)(x)
    with torch.no_grad(), chosen.autocast():
        got = in_mode(start, mode)(x)
    return compared([got], [naive], [exact], ["output"], times=4)


def step_cells(chosen: Settings) -> Iterator[Cell]:
    for net in chosen.nets():
        for layout in chosen.formats(layers=False):
            for batch_size in net.batch_sizes:
                about = {"model": net.name, "size": net.size, "batch_size": batch_size, "memory_format": layout}
                yield Cell("step", about, _net_builds(step_variant, chosen, net, batch_size, layout), peaks=True)


def _net_builds(
    build: Callable[..., Variant], chosen: Settings, net: Net, batch_size: int, layout: str
) -> dict[tuple[str, str], Callable[[], Variant]]:
    made: dict[tuple[str, str], Callable[[], Variant]] = {}
    for mode in chosen.modes:
        made["bn", mode] = partial(build, chosen, net, "bn", mode, batch_size, layout, baseline=True)
        for spec in net.schemes:
            if spec != "bn" or net.baseline:
                name = f"{net.name} {spec}" if spec == "bn" else spec
                made[name, mode] = partial(build, chosen, net, spec, mode, batch_size, layout)
    return made


def step_variant(
    chosen: Settings,
    net: Net,
    spec: str,
    mode: str,
    batch_size: int,
    layout: str,
    *,
    baseline: bool = False,
    optimizer: bool = True,
) -> Variant:
    model = chosen.placed(net.build(spec, baseline=baseline), layout)
    x = chosen.images(batch_size, 3, net.size, layout, torch.float32)
    labels = torch.arange(batch_size, device=chosen.device) % net.classes
    clip = parse_scheme(spec).clip
    clips = None if clip is None else clip(model)
    # A rate of 0 is the same work, and weights that stay keep times and values alike.
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    call = in_mode(model, mode)

    def forward() -> Tensor:
        with chosen.autocast():
            return F.cross_entropy(call(x).float(), labels)

    def run() -> None:
        sgd.zero_grad(set_to_none=True)
        forward().backward()
        if clips is not None:
            clips()
        if optimizer:
            sgd.step()

    check = None if baseline or mode == "graph" else partial(_net_check, chosen, model, mode, x)
    saved = None if mode == "graph" else partial(saved_bytes, model, forward)
    return Variant(Work(graphed(run, mode)), check, saved, batch_size)


def inference_cells(chosen: Settings) -> Iterator[Cell]:
    for net in chosen.nets():
        if chosen.schemes is None:  # clipping leaves evaluation as it is
            net = replace(net, schemes=tuple(spec for spec in net.schemes if parse_scheme(spec).clip is None))
        for layout in chosen.formats(layers=False):
            for batch_size in net.batch_sizes:
                about = {"model": net.name, "size": net.size, "batch_size": batch_size, "memory_format": layout}
                yield Cell("inference", about, _net_builds(_inference_variant, chosen, net, batch_size, layout))


def _inference_variant(
    chosen: Settings, net: Net, spec: str, mode: str, batch_size: int, layout: str, *, baseline: bool = False
) -> Variant:
    # The baseline too: a network that serves has nothing to compute anew.
    model = fold(chosen.placed(net.build(spec, baseline=baseline), layout).eval(), inplace=True)
    x = chosen.images(batch_size, 3, net.size, layout, torch.float32)
    call = in_mode(model, mode)

    def run() -> None:
        with torch.no_grad(), chosen.autocast():
            call(x)

    check = None if baseline or mode == "graph" else partial(_net_check, chosen, model, mode, x)
    return Variant(Work(graphed(run, mode)), check, images=batch_size)
