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
from anybatch.bench.choice import SEED, Net, Settings
from anybatch.bench.timing import Work
from anybatch.convert import fold
from anybatch.dispatch import backend
from anybatch.measure import saved_bytes
from anybatch.schemes import scheme as parse_scheme

_DRAWS = 5
"""Of images, in one of which a network's gradient has to agree. Where a ReLU's input is so near 0 that rounding takes
it to the other side, as happens in some, it is off by up to a hundredth; where it is wrong, it is so in all."""


def _net_check(chosen: Settings, model: nn.Module, mode: str, x: Tensor, labels: Tensor | None = None) -> Checked:
    """Outputs and, with ``labels``, the loss's gradient of all parameters as one vector.

    Of one parameter it says little: in a random network that moves by a hundredth where the input moves by a rounding.
    """
    images, generator = x[:2], torch.Generator().manual_seed(SEED)
    first = found = _one_check(chosen, model, mode, images, labels)
    for _ in range(_DRAWS - 1):
        if found.refusal is None or found.what == "output":
            return found
        images = torch.empty_like(images).copy_(torch.randn(images.shape, generator=generator) + 0.5)
        found = _one_check(chosen, model, mode, images, labels)
    return first if found.refusal else found


def _one_check(chosen: Settings, model: nn.Module, mode: str, x: Tensor, labels: Tensor | None) -> Checked:
    start = without_randomness(copy.deepcopy(model))
    names = ["output", "gradient of the parameters"]

    def passed(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        if labels is None:
            with torch.no_grad():
                return [call(x)]
        out = call(x)
        loss = F.cross_entropy(out if out.dtype == torch.float64 else out.float(), labels[: len(x)])
        wanted = [p for p in net.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, wanted, materialize_grads=True)
        return [out.detach(), torch.cat([g.flatten() for g in found])]

    exact_one = copy.deepcopy(start).double()
    with backend("reference"):
        exact = passed(exact_one, exact_one, x.double())
        del exact_one
        naive_one = copy.deepcopy(start)
        with chosen.autocast():
            naive = passed(naive_one, naive_one, x)
        del naive_one
    with chosen.autocast():
        got = passed(start, in_mode(start, mode), x)
    output = compared(got[:1], naive[:1], exact[:1], names[:1], times=4)
    return output if output.refusal else compared(got, naive, exact, names[: len(got)], times=4)


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

    check = None if baseline or mode == "graph" else partial(_net_check, chosen, model, mode, x, labels)
    saved = None if mode == "graph" else partial(saved_bytes, model, forward)
    return Variant(Work(graphed(run, mode)), check, saved, batch_size)


def inference_cells(chosen: Settings) -> Iterator[Cell]:
    for net in chosen.nets():
        if chosen.schemes is None:  # clipping leaves evaluation as it is
            net = replace(net, schemes=tuple(spec for spec in net.schemes if parse_scheme(spec).clip is None))
        for layout in chosen.formats(layers=False):
            for batch_size in net.batch_sizes:
                about = {"model": net.name, "size": net.size, "batch_size": batch_size, "memory_format": layout}
                made = _net_builds(_inference_variant, chosen, net, batch_size, layout)
                plain = _net_builds(partial(_inference_variant, folds=False), chosen, net, batch_size, layout)
                made |= {(f"{name}, not folded", mode): build for (name, mode), build in plain.items()}
                yield Cell("inference", about, made)


def _inference_variant(
    chosen: Settings,
    net: Net,
    spec: str,
    mode: str,
    batch_size: int,
    layout: str,
    *,
    baseline: bool = False,
    folds: bool = True,
) -> Variant:
    """What is compared with is folded too: a network that serves has nothing to compute anew."""
    model = chosen.placed(net.build(spec, baseline=baseline), layout).eval()
    model = fold(model, inplace=True) if folds else model
    x = chosen.images(batch_size, 3, net.size, layout, torch.float32)
    call = in_mode(model, mode)

    def run() -> None:
        with torch.no_grad(), chosen.autocast():
            call(x)

    check = None if baseline or mode == "graph" else partial(_net_check, chosen, model, mode, x)
    return Variant(Work(graphed(run, mode)), check, images=batch_size)
