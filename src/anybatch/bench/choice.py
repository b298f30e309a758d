"""What is timed, and how: cases, schemes, networks, sizes and the machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.models import create_model, model_entry
from anybatch.schemes import scheme as parse_scheme
from anybatch.suggest import unknown

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SEED = 0
LAYERS = ("conv", "grouped", "norm", "recompute", "weight_standardize", "agc", "accuracy")
CASES = (*LAYERS, "step", "inference")
"""``conv``: convolution, norm and ReLU; ``grouped``: the same in groups of channels; ``norm``: norm and ReLU; filters
of a whole network; clipping of its gradients; errors at large means; whole training steps; networks in evaluation."""


@dataclass(frozen=True)
class Net:
    """How a network is timed: its images, what it is compared with, and the schemes and batch sizes of default."""

    name: str
    size: int
    classes: int = 1000
    options: tuple[tuple[str, Any], ...] = ()
    baseline: str = ""
    """The network that has BatchNorm; by default the same."""
    schemes: tuple[str, ...] = ()
    """Empty for the network's own."""
    clipped: bool = False
    """Whether it is timed with adaptive gradient clipping too."""
    batch_sizes: tuple[int, ...] = (2,)

    def build(self, spec: str, *, baseline: bool = False) -> nn.Module:
        """With BatchNorm, or as the scheme says; the same weights every time."""
        torch.manual_seed(SEED)
        name = self.baseline or self.name if baseline else self.name
        return create_model(name, spec, num_classes=self.classes, **dict(self.options))


_NETS = (
    Net(
        "resnet18",
        32,
        10,
        (("stem", "cifar"),),
        schemes=("kn(p=0)", "kn", "gn", "ws+gn", "none"),
        batch_sizes=(2, 8, 32),
    ),
    Net("resnet50", 224, schemes=("kn(p=0)", "kn", "gn", "ws+gn", "none"), batch_sizes=(2, 8)),
    Net("knresnet18", 224, baseline="resnet18"),
    Net("nf_resnet50", 224, baseline="resnet50", clipped=True),
    Net("nfnet_f0", 192, clipped=True),
)
NETS = {net.name: net for net in _NETS}


@dataclass(frozen=True)
class Settings:
    """What is timed and how; `settings` fills in what is left open."""

    cases: tuple[str, ...]
    schemes: tuple[str, ...] | None
    models: tuple[str, ...] | None
    batch_sizes: tuple[int, ...] | None
    device: torch.device
    precision: str
    channels_last: bool | None
    modes: tuple[str, ...]
    helpers: bool
    """Whether filters are standardized with compiled passes too."""
    autotune: bool
    """Whether Triton kernels are tuned."""
    repeats: int
    least: float
    threads: int
    quick: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def formats(self, *, layers: bool) -> list[str]:
        """Both for layers on the CPU, else the one in which convolutions are fastest, unless told."""
        if self.channels_last is not None:
            return ["channels_last" if self.channels_last else "contiguous"]
        return ["contiguous", "channels_last"] if layers and not self.gpu else ["channels_last"]

    def sizes(self, default: Sequence[int]) -> Sequence[int]:
        """Batch sizes."""
        return self.batch_sizes or ((2,) if self.quick else (2, 8, 32, 128) if self.gpu else default)

    def nets(self) -> list[Net]:
        """The networks of steps and inference."""
        names = self.models or (("resnet8",) if self.quick else tuple(NETS))
        nets = []
        for name in names:
            entry = model_entry(name)
            net = NETS.get(name) or Net(name, entry.train_size, 10 if entry.size <= 64 else 1000)
            own = (entry.scheme, f"{entry.scheme}+agc") if net.clipped else (entry.scheme,)
            own = ("kn(p=0)", "gn:auto") if self.quick else net.schemes or own
            net = replace(net, schemes=self.schemes or own, batch_sizes=tuple(self.sizes(net.batch_sizes)))
            nets.append(replace(net, size=16, options=()) if self.quick and net.size <= 32 else net)
        return nets

    def autocast(self) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def images(self, batch_size: int, channels: int, size: int, layout: str, dtype: torch.dtype) -> Tensor:
        """Values of standard deviation 1 and mean 1/2, the same every time."""
        generator = torch.Generator().manual_seed(SEED + 1)
        x = torch.randn(batch_size, channels, size, size, generator=generator) + 0.5
        return x.to(self.device, dtype).contiguous(memory_format=FORMATS[layout])

    def placed(self, module: nn.Module, layout: str) -> nn.Module:
        """On the device and in the memory format."""
        return module.to(self.device).to(memory_format=FORMATS[layout])  # pyright: ignore[reportCallIssue] (torch's stub lacks it)


def settings(
    *,
    cases: Sequence[str] = (),
    schemes: Sequence[str] = (),
    models: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    device: str | None = None,
    precision: str | None = None,
    channels_last: bool | None = None,
    compile: bool = False,
    autotune: bool = False,
    repeats: int | None = None,
    threads: int = 1,
    quick: bool = False,
) -> Settings:
    """`Settings` with defaults for the device.

    Args:
        cases: Of `CASES`, or ``"layers"`` for all that are no whole networks; all by default.
        schemes: For blocks, norms, steps and inference; by default those of the target table.
        models: Networks of steps and inference.
        batch_sizes: By default 2 and 8 (for small images 32 too), on a GPU 2 to 128.
        device: ``"cpu"`` or ``"cuda"``; a GPU where there is one.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``; bfloat16 on a GPU, else float32.
        channels_last: One memory format for all; by default both for layers on the CPU, else channels_last.
        compile: Time everything compiled by ``torch.compile`` as well.
        autotune: Launch Triton kernels in the fastest of a few ways, which are timed first; on CUDA.
        repeats: Rounds; 9, and 2 if ``quick``.
        threads: Of the CPU. One is timed by processor time, more by the wall's.
        quick: Tiny shapes, to see that everything works; such times mean nothing.

    Raises:
        ValueError: If a name is unknown (the nearest are named), a number is out of range, there is no such device, or
            kernels are to be tuned on one that has none.
    """
    chosen: list[str] = []
    for case in cases or CASES:
        if case != "layers" and case not in CASES:
            raise unknown("case", case, [*CASES, "layers"])
        chosen += LAYERS if case == "layers" else [case]
    for name in models:
        model_entry(name)
    for name, number in [("batch_sizes", min(batch_sizes, default=1)), ("repeats", repeats or 1), ("threads", threads)]:
        if number < 1 or (name == "repeats" and repeats == 0):
            raise ValueError(f"{name} must be 1 or more, got {number if number < 1 else repeats}")
    if threads > (most := os.cpu_count() or 1):
        raise ValueError(f"threads={threads} are more than this machine has processors; take 1 to {most}")
    if max(batch_sizes, default=1) >= 2**31:
        raise ValueError(f"batch_sizes must be below 2^31, got {max(batch_sizes)}")
    gpu = torch.cuda.is_available()
    if device is not None and device.partition(":")[0] not in (("cpu", "cuda") if gpu else ("cpu",)):
        raise ValueError(f"device={device!r} is none that can be timed here; take cpu{' or cuda' if gpu else ''}")
    where = torch.device(device or ("cuda" if gpu else "cpu"))
    if autotune and where.type != "cuda":
        raise ValueError(f"autotune tunes Triton kernels, which run on CUDA; device={where.type!r} has none to tune")
    if precision is None:
        precision = "bf16-mixed" if where.type == "cuda" else "32-true"
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    return Settings(
        cases=tuple(dict.fromkeys(chosen)),
        schemes=tuple(parse_scheme(spec).name for spec in schemes) or None,
        models=tuple(models) or None,
        batch_sizes=tuple(batch_sizes) or None,
        device=where,
        precision=precision,
        channels_last=channels_last,
        modes=("eager", *(["graph"] if where.type == "cuda" else []), *(["compiled"] if compile else [])),
        helpers=where.type == "cpu",
        autotune=autotune,
        repeats=repeats or (2 if quick else 9),
        least=0.0 if quick else 0.05,
        threads=threads,
        quick=quick,
    )
