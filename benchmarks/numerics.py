"""The accuracy of every method against float64, beside torch's, torchvision's or timm's own layer: docs/numerics.md.

Values are drawn from N(0, 1) + mean and rounded to the dtype; the exact result is the reference's in float64 for
these rounded values. The error of an output, or of the gradient with respect to the values, is its largest absolute
error over the largest exact value; "fails" stands where a layer cannot take the dtype. The column "parity" is the
difference of both layers in float64 at mean 0, taken likewise: where it is not of order 1e-15, the other layer computes
something else.

    python benchmarks/numerics.py --out docs/numerics.md
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anybatch import layers
from anybatch.dispatch import backend
from anybatch.files import write_file
from anybatch.measure import device_name

NOTES = """
In bfloat16 numbers near 1,000 stand 4 apart, so that some windows of a 1 x 1 KNConv there hold one and the same value
64 times: their deviation is 0, and 1 / sqrt(eps) multiplies what roundings left. Layers with running statistics were
cast to bfloat16 with them, as `model.bfloat16()` does, so that a mean of 1,000 is kept to 4; under autocast they stay
float32. torch's GroupNorm in channels_last takes the variance as a difference of squares on the CPU; our `GroupNorm`
does not call it there.
"""
MEANS = (0, 10, 100, 1000)
ACTIVATIONS = (4, 64, 14, 14)
FILTERS = (64, 32, 3, 3)


@dataclass(frozen=True)
class Compared:
    """Our layer, another library's for the same thing if there is one, and how both are called with the values."""

    name: str
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module] | None = None
    whose: str = ""
    shape: tuple[int, ...] = ACTIVATIONS
    channels_last: bool = False


class OfFilters(nn.Module):
    """A convolution as a function of its filters."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("x", torch.randn(2, FILTERS[1], 8, 8, generator=generator, dtype=torch.float64))

    def forward(self, filters: Tensor) -> Tensor:
        return torch.func.functional_call(self.conv, {"weight": filters}, (self.x,))


def compared() -> list[Compared]:
    """The rows of the table; timm's only where it is installed."""
    from torchvision.ops import FrozenBatchNorm2d

    c = ACTIVATIONS[1]
    conv = {"in_channels": FILTERS[1], "out_channels": FILTERS[0], "kernel_size": 3, "padding": 1, "bias": False}
    made = [
        Compared(
            "FrozenBatchNorm",
            lambda: layers.FrozenBatchNorm(c),
            lambda: FrozenBatchNorm2d(c),
            "torchvision",
        ),
        Compared("BatchNorm, training", lambda: nn.BatchNorm2d(c), lambda: nn.BatchNorm2d(c), "torch"),
        Compared("GroupNorm", lambda: layers.GroupNorm(c), lambda: nn.GroupNorm(32, c), "torch"),
        Compared(
            "GroupNorm, channels_last",
            lambda: layers.GroupNorm(c),
            lambda: nn.GroupNorm(32, c),
            "torch",
            channels_last=True,
        ),
        Compared("LayerNorm", lambda: layers.GroupNorm(c, 1), lambda: nn.GroupNorm(1, c), "torch"),
        Compared(
            "LayerNorm, channels_last",
            lambda: layers.GroupNorm(c, 1),
            lambda: nn.GroupNorm(1, c),
            "torch",
            channels_last=True,
        ),
        Compared(
            "InstanceNorm",
            lambda: layers.GroupNorm(c, group_size=1),
            lambda: nn.InstanceNorm2d(c, affine=True),
            "torch",
        ),
        Compared("PositionalNorm", lambda: layers.PositionalNorm(c)),
        Compared("LocalContextNorm, window 7", lambda: layers.LocalContextNorm2d(c, 7)),
        Compared("Batch-Channel Norm, batch", lambda: layers.BatchChannelNorm2d(c, statistics="batch")),
        Compared("Batch-Channel Norm, estimated", lambda: layers.BatchChannelNorm2d(c)),
        Compared("Batch Renorm", lambda: layers.BatchRenorm2d(c)),
        Compared("KernelNorm 3 x 3", lambda: layers.KernelNorm2d(3, padding=1, p=0)),
        Compared("KNConv 3 x 3", lambda: layers.KNConv2d(c, c, 3, padding=1, p=0)),
        Compared("KNConv 1 x 1", lambda: layers.KNConv2d(c, c, 1, p=0)),
        Compared("FRN + TLU", lambda: layers.FilterResponseNorm2d(c)),
        Compared("EvoNorm-S0", lambda: layers.EvoNormS0(c)),
        Compared("EvoNorm-B0, training", lambda: layers.EvoNormB0(c)),
        Compared("LocalResponseNorm", lambda: layers.LocalResponseNorm(5), lambda: nn.LocalResponseNorm(5), "torch"),
        Compared("DyT", lambda: layers.DynamicTanh(c)),
        Compared("Derf", lambda: layers.DynamicErf(c)),
        Compared("WS, of its filters", lambda: OfFilters(layers.WSConv2d(**conv)), shape=FILTERS),
        Compared("Scaled WS, of its filters", lambda: OfFilters(layers.ScaledWSConv2d(**conv)), shape=FILTERS),
        Compared(
            "Scaled WS, timm's eps",
            lambda: OfFilters(layers.ScaledWSConv2d(**conv, eps=1e-5, eps_rule="add")),
            shape=FILTERS,
        ),
    ]
    if importlib.util.find_spec("timm") is None:
        return made
    import timm.layers as t

    theirs: dict[str, Callable[[], nn.Module]] = {
        "PositionalNorm": lambda: t.LayerNorm2d(c, eps=1e-5),
        "FRN + TLU": lambda: t.FilterResponseNormTlu2d(c, eps=1e-6),
        "EvoNorm-S0": lambda: t.EvoNorm2dS0(c, groups=32),
        "EvoNorm-B0, training": lambda: t.EvoNorm2dB0(c, eps=1e-5),
        "WS, of its filters": lambda: OfFilters(t.StdConv2d(FILTERS[1], FILTERS[0], 3, padding=1, bias=False)),
        "Scaled WS, timm's eps": lambda: OfFilters(
            t.ScaledStdConv2d(FILTERS[1], FILTERS[0], 3, padding=1, bias=False, eps=1e-5)
        ),
    }
    return [
        Compared(row.name, row.ours, theirs[row.name], "timm", row.shape) if row.name in theirs else row for row in made
    ]


def forward_and_gradient(layer: nn.Module, values: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of a fixed weighted sum of it with respect to the values."""
    values = values.detach().requires_grad_()
    y = layer(values)
    generator = torch.Generator().manual_seed(2)
    along = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    (gradient,) = torch.autograd.grad(y, values, along)
    return y.detach().double(), gradient.double()


def relative(got: Tensor, exact: Tensor) -> float:
    """The largest absolute error over the largest exact value; no number counts as infinite."""
    worst = (got - exact).abs().nan_to_num(nan=torch.inf).max().item()
    return worst / exact.abs().max().item() if worst else 0.0


def measure(row: Compared, mean: float, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """The errors of output and gradient: ours, theirs, and theirs in float64 (the parity)."""
    torch.manual_seed(0)
    ours = row.ours()
    values = (torch.randn(row.shape, dtype=torch.float64) + mean).to(dtype)
    if row.channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    with backend("reference"):
        exact = forward_and_gradient(copy.deepcopy(ours).double(), values.double())
    found = {"ours": forward_and_gradient(ours.to(dtype), values)}
    if row.theirs is not None:
        torch.manual_seed(0)
        theirs = row.theirs()
        known = theirs.state_dict()
        given = {name: value.view_as(known[name]) for name, value in ours.state_dict().items() if name in known}
        theirs.load_state_dict(given, strict=False)
        found["parity"] = forward_and_gradient(copy.deepcopy(theirs).double(), values.double())
        with contextlib.suppress(NotImplementedError):
            found["theirs"] = forward_and_gradient(theirs.to(dtype), values)
    return {who: (relative(result[0], exact[0]), relative(result[1], exact[1])) for who, result in found.items()}


def table(rows: list[Compared], dtype: torch.dtype, which: int) -> list[str]:
    """One table: a line for our layer and, below it, one for the other library's."""
    lines = ["| method | " + " | ".join(f"mean {mean:,}" for mean in MEANS) + " | parity |", "|---" * 6 + "|"]
    for row in rows:
        found = [measure(row, mean, dtype) for mean in MEANS]
        told = " | ".join(f"{errors['ours'][which]:.0e}" for errors in found)
        lines.append(f"| {row.name} | {told} | |")
        if row.theirs is not None:
            told = " | ".join(f"{errors['theirs'][which]:.0e}" if "theirs" in errors else "fails" for errors in found)
            lines.append(f"| &nbsp; {row.whose} | {told} | {found[0]['parity'][which]:.0e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/numerics.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that sums have one order
    rows = compared()
    packages = [name for name in ("torch", "torchvision", "timm") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in packages)
    text = [
        "# Numerics",
        "",
        f"Made by `make numerics` on {device_name(torch.device('cpu'))} with {versions}.",
        "",
        " ".join((__doc__ or "").split("\n\n")[1].split()),
    ]
    for what, which in (("output", 0), ("gradient with respect to the values", 1)):
        for dtype in (torch.float32, torch.bfloat16):
            text += ["", f"## Error of the {what}, {str(dtype).removeprefix('torch.')}", "", *table(rows, dtype, which)]
    text += ["", "## Notes", "", " ".join(NOTES.split())]
    write_file(args.out, ("\n".join(text) + "\n").encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
