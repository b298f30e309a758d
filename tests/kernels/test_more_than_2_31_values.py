"""Maps of more values than 32 bits count: the kernels in C are as right at the end as at the start."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anybatch.dispatch import Op, explain
from anybatch.functional import group_norm, kn_conv, local_context_norm, positional_norm
from anybatch.kernels.kn_stages import Normalized, Pulled
from anybatch.kernels.native_kn_conv import NativeStages
from anybatch.methods.windows import windows
from helpers import assert_error_within, error

CHANNELS = 64
POSITIONS = (1 << 12, (1 << 13) + 8)
# A convolution to two channels, 1 x 1, which fits into memory beside the map.
WEIGHT = torch.randn(2, CHANNELS, 1, 1, generator=torch.Generator().manual_seed(1))
CALLS: dict[str, tuple[Op, Callable[[torch.dtype], tuple[object, ...]]]] = {
    "group_norm": (group_norm, lambda _: (CHANNELS,)),
    "positional_norm": (positional_norm, lambda _: ()),
    "local_context_norm": (local_context_norm, lambda _: (3, 2)),
    "kn_conv": (kn_conv, lambda dtype: (WEIGHT.to(dtype),)),
}


def _free_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_last_values_are_those_of_a_map_of_their_own(name: str) -> None:
    """Rows repeat, so that statistics of the whole are those of a few rows."""
    gc.collect()
    if _free_bytes() < 20 << 30:
        pytest.skip("less than 20 GiB of memory are free")
    op, others = CALLS[name]
    args = others(torch.float32)
    period = 64
    some = torch.randn(1, CHANNELS, period, POSITIONS[1], generator=torch.Generator().manual_seed(0)) + 3
    x = some.repeat(1, 1, POSITIONS[0] // period, 1)
    assert x.numel() > 1 << 31
    assert explain(op, x, *args)["native"] == "runs"
    with torch.no_grad():
        y = op(x, *args)
        del x
        twice = some.repeat(1, 1, 2, 1)
        expected = op.reference(twice.double(), *others(torch.float64))
        rounding = 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        allowed = 2 * error(op.reference(twice, *args), expected) + rounding
        first = period - 3  # whose windows, and those of the rows behind it, lie within both maps
        for start in (first, POSITIONS[0] - 2 * period - 3):
            for channel in (0, y.shape[1] - 1):
                got, exact = y[:, channel, start : start + period], expected[:, channel, first : first + period]
                assert_error_within(got, exact, allowed, f"rows from {start} of channel {channel}")


@pytest.mark.slow
def test_gradients_through_the_moments_of_a_convolution_reach_the_last_values() -> None:
    """The stage alone: a whole backward holds one map more than this machine's memory may."""
    gc.collect()
    if _free_bytes() < 20 << 30:
        pytest.skip("less than 20 GiB of memory are free")
    at, stages = windows(2, 1, 1, 0, 1, "zeros"), NativeStages()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, CHANNELS, 1, POSITIONS[1], generator=generator).repeat(1, 1, POSITIONS[0], 1)
    assert x.numel() > 1 << 31
    mean, g_var, g_own = torch.randn(3, 1, 1, *POSITIONS, generator=generator)

    def through(rows: slice) -> torch.Tensor:
        of = [t[..., rows, :] for t in (x, mean, g_var, g_own)]
        values, middle, var, own = of if rows == slice(None) else [t.contiguous() for t in of]
        back = Pulled(values, values, var, own, torch.empty(0), None, True)
        done = Normalized(values, middle, middle, None, None)
        return stages.through_moments(torch.zeros_like(values), values, done, back, at, 0.0, None)

    whole = through(slice(None))
    for first in (0, POSITIONS[0] - 2):
        rows = slice(first, first + 2)
        torch.testing.assert_close(whole[..., rows, :], through(rows), rtol=1e-6, atol=1e-6)
