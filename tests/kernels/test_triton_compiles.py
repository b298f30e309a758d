"""Triton compiles the kernels for GPUs, of which none is needed: its interpreter, in which they run, takes more."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch import layers
from anybatch.dispatch import backend
from anybatch.kernels import triton_common, triton_tuning
from anybatch.kernels.triton_common import INTERPRETED, Plan
from anybatch.kernels.triton_kn_conv import TritonStages
from anybatch.methods.batch_norm import channel_moments
from anybatch.methods.filters import standardize_together
from anybatch.methods.windows import windows
from anybatch.optim import adaptive_clip_grad_
from kernels.common import in_format

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="no Triton, or its interpreter in its place"
)

THREADS_OF_A_WARP = 32
REGISTERS = 65536
"""Of a processor, all of which one program may take."""
FEW = 32
"""Bytes of a thread that may lie in memory for want of registers."""


class Compiling:
    """Compiles what plans would launch, once for all that Triton would take the same code for."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[str, int, Any]] = {}
        self.names: set[str] = set()
        self.compiles = True

    def __call__(self, plan: Plan, *tensors: Tensor | None) -> None:
        self.names.add(triton_tuning.name_of(plan.kernel))
        if not self.compiles:
            return
        code = plan.kernel.warmup(*tensors, *plan.numbers, grid=plan.grid, num_warps=plan.warps)
        self.made[code.hash] = (triton_tuning.name_of(plan.kernel), plan.warps, code)


@pytest.fixture(params=[90, pytest.param(80, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)])
def compiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiling]:
    """Within this test kernels take tensors of the CPU, and Triton has a GPU of a compute capability, it thinks."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = SimpleNamespace(
        get_current_device=lambda: 1000 + request.param,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", request.param, THREADS_OF_A_WARP),
    )
    made = Compiling()
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(triton_common, "INTERPRETED", True)
    monkeypatch.setattr(Plan, "__call__", lambda plan, *tensors: made(plan, *tensors))
    with backend("triton"):
        yield made


def used(code: Any) -> dict[str, int]:
    """Registers of a thread, and bytes that it keeps elsewhere for want of them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code.asm["cubin"])
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}


def run(layer: Any, x: Tensor, *more: Tensor) -> None:
    y = layer(x, *more)
    y.backward(torch.ones_like(y))


def convolutions(x: Tensor) -> None:
    """The stages around convolutions, which are not run."""
    stages, wide = TritonStages(), {"dtype": torch.float32}
    for p, size, groups, residual in (
        (0.0, 1, 1, None),
        (0.05, 3, 1, torch.zeros_like(x)),
        (0.05, 3, 32, None),
        (0.0, 3, x.shape[1], torch.zeros_like(x)),
    ):
        at, seed, plain = windows(2, size, padding=size // 2), torch.tensor(0) if p else None, groups > 1
        weight, bias = torch.zeros(x.shape[1], 2, size, size, **wide), torch.zeros(x.shape[1], **wide)
        pixels, filters = stages.pixels(x, p, seed, plain), stages.filters(weight, x.dtype)
        own = stages.group_means(x, at, groups, x) if plain else None
        done = stages.normalized(torch.empty_like(x), pixels, filters, own, bias, residual, at, p, 1e-5, True)
        back = stages.pulled(torch.empty_like(x), done, filters.total, own, bias, residual, at, True)
        stages.through_filters(filters.convolved, back.total, weight.dtype)
        stages.through_moments(torch.empty_like(x), x, done, back, at, p, seed)


def norms(kind: Callable[[int], Any]) -> Callable[[Tensor], None]:
    def of(x: Tensor) -> None:
        layer = kind(x.shape[1])
        layer.take_activation(nn.ReLU() if x.dtype == torch.float32 else nn.GELU())
        run(layer, x)

    return of


def responses(x: Tensor) -> None:
    run(layers.FilterResponseNorm2d(x.shape[1], learnable_eps=x.dtype == torch.float32), x)


def filters(x: Tensor) -> None:
    c = x.shape[1]
    for kind in (layers.WSConv2d, layers.ScaledWSConv2d):
        some = [kind(c, 8, 3).to(x.dtype), kind(8, c, 1).to(x.dtype)]
        for made in ([layer.standardized() for layer in some], standardize_together(some)):
            torch.autograd.backward(made, [torch.ones_like(w) for w in made])


def gradients(x: Tensor) -> None:
    layer = nn.Conv2d(x.shape[1], 8, 3, dtype=x.dtype)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    adaptive_clip_grad_(layer.parameters())


def moments(x: Tensor) -> None:
    channel_moments(x.detach())


RUN: dict[str, Callable[[Tensor], None]] = {
    "kn": convolutions,
    "gn": norms(layers.GroupNorm),
    "bcn": norms(layers.BatchChannelNorm2d),
    "pn": norms(layers.PositionalNorm),
    "frn": responses,
    "lcn": norms(lambda c: layers.LocalContextNorm2d(c, 3)),
    "ws": filters,
    "agc": gradients,
    "shared statistics": moments,
}
SHAPES = [(2, 64, 40, 41), (2, 2048, 7, 7)]


@pytest.mark.parametrize("name", RUN)
def test_a_gpu_has_registers_for_what_triton_compiles(name: str, compiling: Compiling) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape, last in itertools.product(SHAPES, (False, True)):
            RUN[name](in_format(torch.zeros(shape, dtype=dtype), last).requires_grad_())
    assert compiling.made
    for kernel, warps, code in compiling.made.values():
        takes = used(code)
        assert takes["REG"] * warps * THREADS_OF_A_WARP <= REGISTERS, kernel
        assert takes["STACK"] + takes["LOCAL"] <= FEW, f"{kernel} keeps in memory what registers do not hold: {takes}"


def test_all_kernels_are_compiled(compiling: Compiling) -> None:
    x = in_format(torch.zeros(2, 64, 40, 41), True).requires_grad_()
    compiling.compiles = False
    for each in RUN.values():
        each(x)
        each(torch.zeros(2, 64, 3, 3).requires_grad_())
    assert set(compiling.names) == {*triton_tuning.SPACES, *triton_tuning.FIXED}
