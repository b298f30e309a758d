"""What a network that gives maps changes where an image is cut into tiles, layer by layer and in its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anybatch.probe.asleep import asleep
from anybatch.probe.layers import CONVS, layers, scope_of
from anybatch.probe.result import Cell, Finding, Result, Table, few, many
from anybatch.probe.subject import Subject, probing, seeing, tensors_in

Reach = Literal["local", "global"]
LEAST = 6
"""Positions along a side that a tile's map needs to be shown."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer, given the middle of its own input in place of all of it."""

    name: str
    kind: str
    norm: bool
    reach: Reach
    """Global where positions in the middle change too."""
    border: int
    """Positions from the edge within which its output changes; for a global layer, to the middle."""
    changed: float
    """The share of positions that change."""
    error: float
    """Root mean square of the change in the middle, over that of the output."""


@dataclass(frozen=True, kw_only=True)
class TileConsistency(Result):
    """What `tile_consistency` found."""

    title: ClassVar[str] = "Tiles against the whole image"

    size: tuple[int, int]
    """Of the whole image."""
    tile: tuple[int, int]
    """Of its part, which is cut from the middle."""
    output: str
    """The layer whose map is compared: the last one, where the model's own output is no map."""
    stride: float
    """Pixels of the image from one position of that map to the next."""
    error_map: Tensor
    """(H, W), root mean square over samples and channels of what cutting changes, over that of the whole output."""
    profile: tuple[float, ...]
    """Mean error by distance from the edge, in positions; the last is the middle."""
    layers: tuple[Layer, ...]
    """Layers that use more than one position, in the order in which they are called."""

    def table(self) -> Table:
        head = ("layer", "kind", "reach", "border", "changed", "error in the middle")
        rows: list[tuple[Cell, ...]] = [
            (x.name, x.kind, x.reach, x.border, x.changed, x.error)
            for x in self.layers
            if x.norm or x.reach == "global"
        ]
        return Table(head, tuple(rows))


def tile_consistency(model: nn.Module, x: Any, *, tile: int | None = None) -> TileConsistency:
    """Compare a network on an image with the same network on a tile of it, in evaluation.

    A tile's edge is padded, and what is near it changes: that is the border, which tiled inference leaves out by
    letting tiles overlap. What changes far from the edge too comes from layers that take statistics, or means, of the
    whole map. Each layer is judged for itself: it gets the middle of its own input. The model is unchanged afterwards.
    Of torchvision's detectors the backbone is probed.

    Args:
        model: Any model that takes images, volumes or clips; the last two dimensions are cut. One that gives no map is
            compared by the last map inside.
        x: (N, *, H, W).
        tile: Pixels along a tile's side, less than those of ``x``; None for half.

    Raises:
        ValueError: If ``x`` has no two dimensions to cut, the tile is no part of it, or no map is found in the model
            that has at least 6 positions along a tile's side.
    """
    with probing(model, x) as subject, torch.no_grad():
        x = subject.x
        if x.dim() < 4:
            raise ValueError(f"x must be (N, *, H, W), which can be cut into tiles, got shape {tuple(x.shape)}")
        H, W = x.shape[-2:]
        sides = (H // 2, W // 2) if tile is None else (tile, tile)
        if min(sides) < 1 or sides[0] >= H or sides[1] >= W:
            raise ValueError(f"tile must be a whole number from 1 to {min(H, W) - 1}, got {tile!r}")
        subject.set_mode("evaluation")
        maps, found = _survey(subject)
        place, error, stride = _compared(subject, maps, sides)
        if place:  # what follows pools for a head
            order = [name for name, _ in maps]
            found = [layer for layer in found if order.index(layer.name) <= order.index(place)]
    profile = _profile(error)
    return TileConsistency(
        size=(H, W),
        tile=sides,
        output=place or "(the output)",
        stride=stride,
        error_map=error,
        profile=profile,
        layers=tuple(found),
        findings=tuple(_findings(found, profile, stride, max(sides[0] - len(error) * stride, 0.0), asleep(model))),
    )


def _survey(subject: Subject) -> tuple[list[tuple[str, torch.Size]], list[Layer]]:
    """The maps that layers give to the whole image, in order, and what cutting does to each layer."""
    maps: list[tuple[str, torch.Size]] = []
    found: dict[str, Layer] = {}
    taken: dict[str, tuple[Any, ...]] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        taken[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)  # some overwrite it

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        args = taken.pop(name)
        if not isinstance(output, Tensor) or output.dim() < 4:
            return
        maps.append((name, output.shape))
        if name not in found and args and isinstance(args[0], Tensor) and args[0].dim() == output.dim():
            layer = _judged(name, module, args, output)
            if layer is not None:
                found[name] = layer

    with seeing(subject.model, [name for name, _ in layers(subject.model)], see, before=before):
        output = subject.run(subject.x)
    for t in tensors_in(output):
        if t.dim() >= 4 and min(t.shape[-2:]) > 1:
            maps.append(("", t.shape))
            break
    return maps, list(found.values())


def _judged(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Layer | None:
    """The layer on the middle of its input; None for small maps, and where nothing changes but in layers of one."""
    x = args[0]
    cut, back = [], []
    for given, made in zip(x.shape[-2:], output.shape[-2:], strict=True):
        # Starts and sizes that the layer's stride, or its upsampling, divides.
        step = max(round(given / made), 1)
        size = given // 2 // (2 * step) * 2 * step
        start = (given - size) // 2 // step * step
        if size < 4 * step or size < 4:
            return _of_everything(name, module, x, output)
        cut.append((start, size))
        back.append((round(start * made / given), round(size * made / given)))
    arguments = [_cut(a, cut) if isinstance(a, Tensor) and a.shape[-2:] == x.shape[-2:] else a for a in args]
    if any(isinstance(a, Tensor) and a.shape[-2:] == output.shape[-2:] != x.shape[-2:] for a in args[1:]):
        arguments = [arguments[0], *(_cut(a, back) if isinstance(a, Tensor) else a for a in args[1:])]
    try:
        made = module.forward(*arguments)
    except (RuntimeError, ValueError):  # made for maps of one size
        return None
    if made.shape[:-2] != output.shape[:-2]:  # other dimensions than the last two are those of the map
        return None
    error, _ = _laid(made, output, cut, x.shape[-2:])
    if min(error.shape) < 3:
        return None
    limit = 1e-12 if output.dtype == torch.float64 else 1e-5 if output.dtype == torch.float32 else 5e-3
    rings = _rings(error, torch.amax)
    touched = [i for i, value in enumerate(rings) if value > limit]
    if not touched and scope_of(module) is None:
        return None
    # A wide window may reach all of a tile, and yet is finite.
    everywhere = touched == list(range(len(rings))) and not isinstance(module, CONVS)
    return Layer(
        name=name,
        kind=type(module).__name__,
        norm=scope_of(module) is not None,
        reach="global" if everywhere else "local",
        border=touched[-1] + 1 if touched else 0,
        changed=float((error > limit).double().mean()),
        error=float(rings[-1]),
    )


def _of_everything(name: str, module: nn.Module, x: Tensor, output: Tensor) -> Layer | None:
    """Pooling of the whole map to few positions, whose output is not a map but depends on the tile."""
    pools = isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool3d))
    if not pools or math.prod(output.shape[-2:]) >= math.prod(x.shape[-2:]):
        return None
    return Layer(
        name=name, kind=type(module).__name__, norm=False, reach="global", border=0, changed=1.0, error=math.nan
    )


def _cut(t: Tensor, cut: list[tuple[int, int]]) -> Tensor:
    (top, height), (left, width) = cut
    return t[..., top : top + height, left : left + width]


def _laid(
    made: Tensor, whole: Tensor, cut: list[tuple[int, int]], full: Sequence[int]
) -> tuple[Tensor, tuple[float, float]]:
    """A tile's map laid on the whole one: what differs, and how far apart positions are in the layer's input.

    Positions are as far apart as the sizes of both maps tell, or, where convolutions without padding or padding of its
    own change those by a constant, as their difference tells: whichever lets more agree.
    """
    sizes = list(zip(cut, full, made.shape[-2:], whole.shape[-2:], strict=True))
    ways = [[of / all_of for _, of, _, all_of in sizes]]
    if all(all_of > m for _, _, m, all_of in sizes):
        ways.append([(of - side) / (all_of - m) for (_, side), of, m, all_of in sizes])
    found = []
    for strides in ways:
        begin = [round(start / stride) for ((start, _), *_), stride in zip(sizes, strides, strict=True)]
        common = [min(m, all_of - b) for (_, _, m, all_of), b in zip(sizes, begin, strict=True)]
        part = _cut(whole, list(zip(begin, common, strict=True)))
        found.append((_error(made[..., : common[0], : common[1]], part), (strides[0], strides[1])))
    return min(found, key=lambda pair: float(pair[0].mean()))


def _error(made: Tensor, whole: Tensor) -> Tensor:
    """(H, W): root mean square of the difference over all other dimensions, over that of the whole."""
    a, b = made.double(), whole.double()
    size = b.square().mean().sqrt().clamp_min(1e-300)
    return ((a - b).square().flatten(0, -3).mean(0).sqrt() / size).cpu()


def _rings(error: Tensor, of: Callable[[Tensor], Tensor]) -> list[float]:
    """By distance from the edge, in positions."""
    H, W = error.shape
    rows, columns = torch.arange(H), torch.arange(W)
    distance = torch.minimum(
        torch.minimum(rows, H - 1 - rows)[:, None], torch.minimum(columns, W - 1 - columns)[None, :]
    )
    return [float(of(error[distance == d])) for d in range(int(distance.max()) + 1)]


def _profile(error: Tensor) -> tuple[float, ...]:
    return tuple(_rings(error, torch.mean))


def _compared(
    subject: Subject, maps: list[tuple[str, torch.Size]], sides: tuple[int, int]
) -> tuple[str, Tensor, float]:
    """The last map that is large enough, on the whole image and on a tile."""
    H, W = subject.x.shape[-2:]
    large = [
        (name, shape)
        for name, shape in maps
        if all(of * side // full >= LEAST for of, side, full in zip(shape[-2:], sides, (H, W), strict=True))
    ]
    if not large:
        raise ValueError(
            f"no map in the model has {LEAST} positions along the side of a tile of {sides[0]} x {sides[1]} pixels; "
            f"give larger images"
        )
    name, _ = large[-1]
    # Tiles begin where every stride in front of the map does, the largest being that of the smallest map there.
    last = max(i for i, (of, _) in enumerate(maps) if of == name)
    deepest = max(2 ** round(math.log2(H / s[-2])) for _, s in maps[: last + 1] if s[-2] > 1)
    step = min(max(deepest, 1), H - sides[0], W - sides[1])
    top, left = (max((full - side) // 2 // step, 1) * step for full, side in zip((H, W), sides, strict=True))
    whole = _map_of(subject, name, subject.x)
    made = _map_of(subject, name, subject.x[..., top : top + sides[0], left : left + sides[1]])
    error, (stride, _) = _laid(made, whole, [(top, sides[0]), (left, sides[1])], (H, W))
    return name, error, stride


def _map_of(subject: Subject, name: str, x: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def see(_: str, module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output.clone())

    with seeing(subject.model, [name] if name else [], see):
        output = subject.run(x)
    return kept[-1] if name else next(t for t in tensors_in(output) if t.dim() >= 4 and min(t.shape[-2:]) > 1)


def _findings(
    found: list[Layer], profile: tuple[float, ...], stride: float, lost: float, sleep: list[Finding]
) -> list[Finding]:
    """Of ``lost`` pixels fewer than the tile has there is no output, where convolutions do not pad."""
    told = []
    norms = [x for x in found if x.reach == "global" and x.norm]
    others = [x for x in found if x.reach == "global" and not x.norm]
    middle = profile[-1]
    if norms:
        kinds = ", ".join(sorted({x.kind for x in norms}))
        told.append(
            Finding(
                "warning",
                f"{many(len(norms), 'norm')} ({kinds}) change every position when the image is cut, by up to "
                f"{max(x.error for x in norms):.2g} of the output's size in the middle of a tile: predictions depend "
                f"on how large tiles are, and overlapping them does not help.",
                "for tiled inference prefer schemes whose statistics are local: kn, pn, or lcn with a window smaller "
                "than the maps; frozen BatchNorm is local too.",
            )
        )
    elif any(x.norm for x in found):
        border = max(x.border for x in found if x.norm)
        within = f" but within {many(border, 'position')} of a tile's edge" if border else ""
        told.append(Finding("good", f"Every norm is local: cutting an image changes nothing that one gives{within}."))
    if others:
        told.append(
            Finding(
                "warning",
                f"{few([x.name for x in others])} take all positions of a map together, so that they change with the "
                f"tile.",
                "leave squeeze-excite and image pooling out of networks for tiles, or pool over windows of one size.",
            )
        )
    edge = f"by {profile[0]:.2g} at the edge and {middle:.2g} in the middle"
    if middle <= 1e-5:
        reach = next((i for i in range(len(profile)) if max(profile[i:]) <= 1e-5), len(profile))
        text = "A tile gives exactly what the whole image gives there."
        if reach:
            within = f"{many(reach, 'position')} ({reach * stride:.0f} pixels)"
            text = f"The output changes only within {within} of a tile's edge."
        fix = f"let tiles overlap by {2 * reach * stride + lost:.0f} pixels, and they agree with the whole."
        told.append(Finding("note", text) if sleep else Finding("good", text, fix))
    elif not norms and not others:
        told.append(
            Finding(
                "note",
                f"The output changes {edge}: no layer is global, and padding at the tile's edge reaches as far as the "
                f"receptive field, here the whole tile.",
                "take larger tiles, and let them overlap by the receptive field where results must agree.",
            )
        )
    else:
        told.append(Finding("note", f"The output changes {edge}, relative to its size."))
    return [*told, *sleep]
