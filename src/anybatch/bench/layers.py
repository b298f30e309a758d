"""Blocks of convolution, norm and ReLU, norms by themselves, and their errors at large means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.bench.cell import Cell, Checked, Variant, compared, graphed, in_mode, without_randomness
from anybatch.bench.choice import FORMATS, PRECISIONS, SEED, Settings
from anybatch.bench.timing import Work
from anybatch.dispatch import backend
from anybatch.measure import saved_bytes
from anybatch.methods.recomputed import Recomputed
from anybatch.models.blocks import Pieces
from anybatch.schemes import scheme as parse_scheme

SHAPES = (
    (64, 64, 56, 3),
    (64, 64, 56, 1),
    (64, 256, 56, 1),
    (256, 64, 56, 1),
    (128, 128, 28, 3),
    (512, 128, 28, 1),
    (256, 256, 14, 3),
    (1024, 256, 14, 1),
    (256, 1024, 14, 1),
    (512, 512, 7, 3),
    (512, 2048, 7, 1),
)
"""Channels in and out, map size and kernel of ResNet-50's convolutions at 224 pixels."""
GROUPED = (
    (128, 128, 56, 3, 32),
    (256, 256, 28, 3, 32),
    (512, 512, 14, 3, 32),
    (1024, 1024, 7, 3, 32),
    (96, 96, 56, 7, 96),
    (384, 384, 14, 7, 384),
)
"""The same and the groups of convolutions of ResNeXt-50 (32 x 4d) and ConvNeXt-T."""
MAPS = ((64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
"""Channels and size of the maps behind them."""


def _block(spec: str, channels: int, out: int, kernel: int, groups: int = 1) -> nn.Module:
    pieces = Pieces(parse_scheme(spec))
    conv = pieces.conv(channels, out, kernel, groups=groups)
    return nn.Sequential(conv, *pieces.norm_act(out, behind=conv))


def _norm(spec: str, channels: int) -> nn.Module:
    return nn.Sequential(*Pieces(parse_scheme(spec)).norm_act(channels))


def conv_cells(chosen: Settings) -> Iterator[Cell]:
    shapes = ((32, 32, 6, 3), (64, 32, 6, 1)) if chosen.quick else SHAPES
    yield from _block_cells("conv", chosen, [(*shape, 1) for shape in shapes])


def grouped_cells(chosen: Settings) -> Iterator[Cell]:
    yield from _block_cells("grouped", chosen, [(32, 32, 6, 3, 8)] if chosen.quick else GROUPED)


def _block_cells(case: str, chosen: Settings, shapes: Sequence[tuple[int, int, int, int, int]]) -> Iterator[Cell]:
    for batch_size in chosen.sizes((2, 8)):
        for layout in chosen.formats(layers=True):
            for channels, out, size, kernel, groups in shapes:
                about = f"{channels}-{out} {kernel}x{kernel} at {size}"
                yield _layer_cell(
                    case,
                    chosen,
                    {"shape": about if groups == 1 else f"{about}, {groups} groups"},
                    partial(_block, channels=channels, out=out, kernel=kernel, groups=groups),
                    chosen.schemes or ("kn(p=0)", "kn"),
                    (batch_size, channels, size, layout),
                )


def norm_cells(chosen: Settings) -> Iterator[Cell]:
    maps = ((32, 6),) if chosen.quick else MAPS
    for batch_size in chosen.sizes((2, 8)):
        for layout in chosen.formats(layers=True):
            for channels, size in maps:
                given = chosen.schemes or ("gn", "ln", "bcn", "pn", "frn", f"lcn(window={max(3, size // 2 | 1)})")
                parsed = [parse_scheme(spec) for spec in given]
                specs = [one.name for one in parsed if one.norm is not None or one.norm_act is not None]
                if specs:
                    about = {"shape": f"{channels} at {size}"}
                    place = (batch_size, channels, size, layout)
                    yield _layer_cell("norm", chosen, about, partial(_norm, channels=channels), specs, place)


def _chain(spec: str, channels: int, kernel: int) -> nn.Module:
    """Four times norm, activation and convolution: plain for the baseline, elsewhere recomputed."""
    pieces = Pieces(parse_scheme(spec))
    layers: list[nn.Module] = []
    for _ in range(4):
        some = (*pieces.norm_act(channels), pieces.conv(channels, channels, kernel))
        layers += some if spec == "bn" else [Recomputed(*some)]
    return nn.Sequential(*layers)


def recompute_cells(chosen: Settings) -> Iterator[Cell]:
    shapes = ((32, 6, 3),) if chosen.quick else ((64, 56, 3), (64, 56, 1), (128, 28, 3), (256, 14, 3))
    for batch_size in chosen.sizes((2, 8)):
        for layout in chosen.formats(layers=True):
            for channels, size, kernel in shapes:
                about = {"shape": f"4 of {channels} {kernel}x{kernel} at {size}"}
                place = (batch_size, channels, size, layout)
                make = partial(_chain, channels=channels, kernel=kernel)
                specs = chosen.schemes or ("gn", "bcn")
                yield _layer_cell("recompute", chosen, about, make, specs, place, deep=True)


def _layer_cell(
    case: str,
    chosen: Settings,
    about: dict[str, Any],
    make: Callable[[str], nn.Module],
    specs: Sequence[str],
    place: tuple[int, int, int, str],
    *,
    deep: bool = False,
) -> Cell:
    batch_size, channels, size, layout = place
    x = partial(chosen.images, batch_size, channels, size, layout, PRECISIONS[chosen.precision])
    facts = {**about, "batch_size": batch_size, "memory_format": layout}
    build: dict[tuple[str, str], Callable[[], Variant]] = {}
    for mode in chosen.modes:
        for spec in dict.fromkeys(("bn", *specs)):
            build[spec, mode] = partial(_layer_variant, chosen, make, spec, mode, x, layout, deep)
    return Cell(case, facts, build)


def _layer_variant(
    chosen: Settings,
    make: Callable[[str], nn.Module],
    spec: str,
    mode: str,
    images: Callable[[], Tensor],
    layout: str,
    deep: bool,
) -> Variant:
    torch.manual_seed(SEED)
    module = make(spec)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:  # scales and shifts that start at 1 and 0 would hide mistakes
                p += 0.1 * torch.randn(p.shape)
    module = chosen.placed(module, layout)
    x = images().requires_grad_()
    inputs = [x, *module.parameters()]
    with torch.no_grad(), chosen.autocast():
        y = copy.deepcopy(module)(x)
    generator = torch.Generator().manual_seed(SEED + 2)
    gradient = torch.randn(y.shape, generator=generator).to(y).contiguous(memory_format=FORMATS[layout])
    call = in_mode(module, mode)

    def forward() -> Tensor:
        with chosen.autocast():
            return call(x)

    def run() -> None:
        torch.autograd.grad(forward(), inputs, gradient)

    def check() -> Checked:
        start = without_randomness(copy.deepcopy(module)) if mode == "compiled" else module

        def passed(one: nn.Module, value: Tensor, mode: str = "eager") -> tuple[list[Tensor], Tensor]:
            torch.manual_seed(SEED + 3)
            given = value.detach().requires_grad_()
            return [given, *one.parameters()], in_mode(one, mode)(given)

        with backend("reference"):
            of_exact, exact_y = passed(copy.deepcopy(start).double(), x.double())
            with chosen.autocast():
                of_naive, naive_y = passed(copy.deepcopy(start), x)
        with chosen.autocast():
            of_got, got_y = passed(copy.deepcopy(start), x, mode)
        # A ReLU's input next to 0 may round to its other side, on which the gradient is another.
        alike = ((exact_y > 0) == (naive_y > 0)) & ((exact_y > 0) == (got_y > 0))

        def pulled(inputs: list[Tensor], out: Tensor) -> list[Tensor]:
            return [out.detach(), *torch.autograd.grad(out, inputs, (gradient * alike).to(out.dtype))]

        with backend("reference"):
            exact, naive = pulled(of_exact, exact_y), pulled(of_naive, naive_y)
        got = pulled(of_got, got_y)
        names = ["output", "gradient of x", *(f"gradient of {name}" for name, _ in module.named_parameters())]
        if deep:  # behind several ReLUs roundings decide on which side of 0 some values are, and gradients jump
            got, naive, exact, names = got[:1], naive[:1], exact[:1], names[:1]
        return compared(got, naive, exact, names)

    ours = spec != "bn" and mode != "graph"
    saved = None if mode == "graph" else partial(saved_bytes, module, forward)
    return Variant(Work(graphed(run, mode)), check if ours else None, saved, x.shape[0])


def accuracy_cells(chosen: Settings) -> Iterator[Cell]:
    channels, size = (32, 6) if chosen.quick else (64, 14)
    for mean in (1e3, 1e4):
        values = {
            "kn": partial(_scale_error_of_kn, chosen, channels, size, mean),
            "gn": partial(_scale_error_of_gn, chosen, channels, size, mean),
        }
        yield Cell("accuracy", {"what": "1/std, float32", "mean": mean}, {}, values)
    values = {"kn": partial(_bfloat16_error, chosen, channels, size, 10.0)}
    yield Cell("accuracy", {"what": "output, bfloat16", "mean": 10.0}, {}, values)


def _both(chosen: Settings, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        got = module(x).double()
        with backend("reference"):
            return got, copy.deepcopy(module).double()(x.double())


def _scale_error_of_kn(chosen: Settings, channels: int, size: int, mean: float) -> float:
    """Filters that subtract neighboring channels at one pixel leave the convolution exact and 1/std to err."""
    conv = Pieces(parse_scheme("kn(p=0)")).conv(channels, channels, 3, bias=False).to(chosen.device)
    weight: Any = conv.weight
    with torch.no_grad():
        weight.zero_()
        for o in range(channels):
            weight[o, o, 1, 1], weight[o, (o + 1) % channels, 1, 1] = 1.0, -1.0
    x = chosen.images(2, channels, size, "contiguous", torch.float32) + mean
    got, exact = (y[..., 1:-1, 1:-1] for y in _both(chosen, conv, x))
    return ((got * exact).sum(1) / exact.square().sum(1) - 1).abs().max().item()


def _scale_error_of_gn(chosen: Settings, channels: int, size: int, mean: float) -> float:
    """Within a group the exact values have mean 0, so that along them only 1/std errs."""
    norm = Pieces(parse_scheme("gn:auto")).norm(channels).to(chosen.device)
    x = chosen.images(2, channels, size, "contiguous", torch.float32) + mean
    got, exact = (y.reshape(2, 32, -1) for y in _both(chosen, norm, x))
    return ((got * exact).sum(2) / exact.square().sum(2) - 1).abs().max().item()


def _bfloat16_error(chosen: Settings, channels: int, size: int, mean: float) -> float:
    torch.manual_seed(SEED)
    conv = Pieces(parse_scheme("kn(p=0)")).conv(channels, channels, 3).to(chosen.device, torch.bfloat16)
    x = chosen.images(2, channels, size, "channels_last", torch.float32) + mean
    got, exact = _both(chosen, conv, x.bfloat16())
    return (torch.linalg.vector_norm(got - exact) / torch.linalg.vector_norm(exact)).item()
