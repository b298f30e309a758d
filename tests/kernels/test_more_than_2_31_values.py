"""Maps of more values than 32 bits count: the kernels in C are as right at the end as at the start."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import explain
from anybatch.functional import group_norm, local_context_norm, positional_norm
from helpers import assert_error_within, error

CHANNELS = 64
POSITIONS = (1 << 12, (1 << 13) + 8)
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[object, ...]]] = {
    "group_norm": (group_norm, (CHANNELS,)),
    "positional_norm": (positional_norm, ()),
    "local_context_norm": (local_context_norm, (3, 2)),
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
    op, args = CALLS[name]
    period = 64
    some = torch.randn(1, CHANNELS, period, POSITIONS[1], generator=torch.Generator().manual_seed(0)) + 3
    x = some.repeat(1, 1, POSITIONS[0] // period, 1)
    assert x.numel() > 1 << 31
    assert explain(op, x, *args)["native"] == "runs"
    with torch.no_grad():
        y = op(x, *args)
        del x
        twice = some.repeat(1, 1, 2, 1)
        expected = op.reference(twice.double(), *args)
        rounding = 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        allowed = 2 * error(op.reference(twice, *args), expected) + rounding
        first = period - 3  # whose windows, and those of the rows behind it, lie within both maps
        for start in (first, POSITIONS[0] - 2 * period - 3):
            for channel in (0, CHANNELS - 1):
                got, exact = y[:, channel, start : start + period], expected[:, channel, first : first + period]
                assert_error_within(got, exact, allowed, f"rows from {start} of channel {channel}")
