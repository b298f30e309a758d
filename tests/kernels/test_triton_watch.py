"""That the watch of Triton's interpreter sees each of the faults that it is there for, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anybatch.kernels.triton_common import INTERPRETED
from watch import WatchedError, watched

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")


@triton.jit
def doubled(x_ptr, y_ptr, size, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size if MASKED else at >= 0
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=mask), mask=mask)


@triton.jit
def added_to_all(y_ptr, SAME: tl.constexpr):
    tl.store(y_ptr + (0 if SAME else tl.program_id(0)), 1.0)


@triton.jit
def turned_round(x_ptr, size):
    tl.store(x_ptr + size - 1 - tl.program_id(0), tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def read_back(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))
    tl.store(x_ptr + at, tl.load(y_ptr + BLOCK - 1 - at))


@triton.jit
def stored_twice(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK))


@triton.jit
def read_far_away(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr + (1 << 40)))


@triton.jit
def read_in_twos(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr.to(tl.pointer_type(tl.int64))))


@triton.jit
def written_by_address(addresses_ptr):
    tl.store(tl.load(addresses_ptr).to(tl.pointer_type(tl.float32)), 1.0)


def test_what_is_right_passes() -> None:
    x = torch.arange(20.0)
    with watched():
        y = torch.empty(20)
        doubled[(3,)](x, y, 20, 8, True)
        doubled[(3,)](x, x, 20, 8, True)  # each program its own part
        strided = torch.zeros(4, 2)[:, 0]
        added_to_all[(1,)](strided, True)
    assert torch.equal(y, torch.arange(20.0) * 2)
    assert torch.equal(x, y)


def padded(size: int) -> torch.Tensor:
    """Of a longer one, so that what lies behind it is there."""
    return torch.zeros(64)[:size]


FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "read outside": ("reads 4 places outside", lambda: doubled[(3,)](padded(20), padded(24), 0, 8, False)),
    "write outside": ("writes 4 places outside", lambda: doubled[(3,)](padded(24), padded(20), 0, 8, False)),
    "write to gaps": (
        "writes 4 places outside",
        lambda: doubled[(1,)](padded(8), torch.zeros(8, 2)[:4, 0], 8, 8, True),
    ),
    "read of gaps": (
        "reads 4 places outside",
        lambda: doubled[(1,)](torch.zeros(6)[::5].expand(3, 2), padded(8), 6, 8, True),
    ),
    "read far away": ("reads 1 places outside", lambda: read_far_away[(1,)](padded(4))),
    "read of no tensor": ("reads 8 places outside", lambda: doubled[(1,)](torch.empty(0), padded(8), 8, 8, True)),
    "read beyond": ("reads 1 places outside", lambda: read_in_twos[(1,)](padded(1), torch.zeros(1, dtype=torch.int64))),
    "odd place": ("at a multiple", lambda: read_in_twos[(1,)](padded(4)[1:3], torch.zeros(1, dtype=torch.int64))),
    "two writers": ("two programs write to one place", lambda: added_to_all[(2,)](padded(2), True)),
    "read of others'": ("reads what another writes", lambda: turned_round[(4,)](padded(4), 4)),
    "read of its own": ("reads what it has written", lambda: read_back[(1,)](padded(4), padded(4), 4)),
    "twice in a store": ("to a place more than once", lambda: stored_twice[(1,)](padded(8), 8)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault: str) -> None:
    told, launch = FAULTS[fault]
    with watched(), pytest.raises(WatchedError, match=told):
        launch()


def test_a_table_of_addresses_may_lead_anywhere_that_a_tensor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(1)
    addresses = torch.tensor([y.data_ptr()])
    with watched(), pytest.raises(WatchedError, match="writes 1 places outside"):
        written_by_address[(1,)](addresses)
    monkeypatch.setattr("watch.BY_ADDRESS", {"written_by_address"})
    with watched():
        written_by_address[(1,)](addresses)
    assert y == 1
