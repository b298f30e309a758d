"""Of the ways to launch a Triton kernel the fastest is taken, once and where it may be timed; times are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import autotuned
from anybatch.kernels import triton_common, triton_tuning
from anybatch.kernels.triton_common import Plan
from anybatch.kernels.triton_tuning import RULE, SPACES, Tuned, Way
from kernels import test_triton_channel_norm as channel
from kernels.common import DEVICE, gradient, images, needs_triton, passed
from kernels.conftest import Clock

pytestmark = needs_triton


class Added:
    """Columns of (R, S) added up by one program each, whose rows at once and warps are tuned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SPACES, "triton_pieces.added_up", (RULE, Way(0.5, 1), Way(2, 2)))
        self.partial = torch.arange(70.0, device=DEVICE).view(35, 2)

    def tuned(self, *about: Any) -> Tuned:
        def plan(way: Way) -> Plan:
            kernel = triton_common.pieces().added_up
            return Plan(kernel, (1,), (35, 2, way.of_values(16), 2), way.of_warps(4))

        return Tuned(plan, about)

    def is_right(self, tuned: Tuned) -> bool:
        sums = torch.full((2,), torch.nan, device=DEVICE)
        tuned(self.partial, sums)
        return torch.equal(sums, self.partial.sum(0))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Added:
    return Added(monkeypatch)


def rows_at_once(plans: list[Plan]) -> list[int]:
    return [plan.numbers[2] for plan in plans]


def launches(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are launched from here on."""
    found: list[Plan] = []
    launch = Plan.__call__

    def noted(plan: Plan, *tensors: Tensor | None) -> None:
        found.append(plan)
        launch(plan, *tensors)

    monkeypatch.setattr(Plan, "__call__", noted)
    return found


@pytest.mark.parametrize("fastest", [8, 16, 32])
def test_the_fastest_is_timed_once_and_kept(
    fastest: int, added: Added, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.of = lambda plan: 1.0 if plan.numbers[2] == fastest else 2.0
    tuned = added.tuned(1)
    assert added.is_right(tuned)
    assert rows_at_once(clock.timed) == [16, 8, 32] * 2
    launched = launches(monkeypatch)
    assert added.is_right(tuned)
    assert added.is_right(added.tuned(1))  # of another batch, say
    triton_tuning._found.clear()  # as another process
    assert added.is_right(added.tuned(1))
    assert rows_at_once(launched) == [fastest] * 3
    assert len(clock.timed) == 6
    assert added.is_right(added.tuned(2))
    assert len(clock.timed) == 12


def test_of_equal_times_the_rule_and_of_rounds_the_faster_decide(added: Added, clock: Clock) -> None:
    assert added.is_right(added.tuned(1))
    assert set(triton_tuning._found.values()) == {RULE}
    times = iter([5.0, 4.0, 4.5, 3.0, 4.0, 4.0])  # the rule's first is that of a GPU that was idle
    clock.of = lambda _: next(times)
    assert added.is_right(added.tuned(2))
    assert list(triton_tuning._found.values()) == [RULE, RULE]


def test_what_this_gpu_cannot_run_is_left_out(added: Added, clock: Clock) -> None:
    from triton.runtime.errors import OutOfResources, PTXASError

    def times(plan: Plan) -> float:
        if plan.numbers[2] == 32:
            raise OutOfResources(300_000, 230_000, "shared memory")
        if plan.numbers[2] == 16:
            raise PTXASError("too many registers")
        return 9.0

    clock.of = times
    assert added.is_right(added.tuned())
    assert list(triton_tuning._found.values()) == [Way(0.5, 1)]


def test_without_room_to_time_anything_the_rule_serves_until_there_is(added: Added, clock: Clock) -> None:
    def times(plan: Plan) -> float:
        raise torch.OutOfMemoryError("no memory")

    clock.of = times
    tuned = added.tuned()
    assert added.is_right(tuned)
    assert not triton_tuning._found
    clock.of = lambda plan: 1.0 / plan.numbers[2]
    assert added.is_right(tuned)
    assert list(triton_tuning._found.values()) == [Way(2, 2)]


def test_other_errors_are_told(added: Added, clock: Clock) -> None:
    def times(plan: Plan) -> float:
        raise RuntimeError("an illegal address")

    clock.of = times
    with pytest.raises(RuntimeError, match="an illegal address"):
        added.is_right(added.tuned())


def test_nothing_is_timed_while_a_graph_is_captured(
    added: Added, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.of = lambda plan: 1.0 / plan.numbers[2]
    tuned = added.tuned()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launched = launches(monkeypatch)
    assert added.is_right(tuned)
    assert rows_at_once(launched) == [16]
    assert not clock.timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert added.is_right(tuned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launched.clear()
    assert added.is_right(tuned)
    assert rows_at_once(launched) == [32]  # what was found before serves in a graph too


def test_nothing_is_timed_unless_told_nor_in_the_interpreter(
    added: Added, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with autotuned(False):
        assert added.is_right(added.tuned())
    monkeypatch.setattr(triton_tuning, "INTERPRETED", True)
    assert added.is_right(added.tuned())
    assert not clock.timed


def test_a_file_that_was_cut_short_is_made_anew(added: Added, clock: Clock, tmp_path: Path) -> None:
    clock.of = lambda plan: 1.0 / plan.numbers[2]
    assert added.is_right(added.tuned())
    (file,) = tmp_path.glob("*/way.json")
    assert json.loads(file.read_text())["way"] == {"tile": 2, "warps": 2}
    for damaged in ("", '{"way": {"tile": 2', '{"way": {"tiles": 2}}', "[]"):
        file.write_text(damaged)
        triton_tuning._found.clear()
        clock.timed.clear()
        assert added.is_right(added.tuned())
        assert len(clock.timed) == 6
        assert json.loads(file.read_text())["way"] == {"tile": 2, "warps": 2}


def test_copies_lie_in_memory_likewise_and_one_given_twice_stays_one() -> None:
    x = torch.arange(24.0, device=DEVICE).view(4, 6)[:, ::2]
    other = torch.zeros(3, device=DEVICE)
    first, second, third, none = triton_tuning._copied((x, x, other, None), (0, 3))
    assert first is second
    assert third is other
    assert none is None
    assert first is not None
    assert torch.equal(first, x)
    assert first.stride() == x.stride()
    assert first.data_ptr() != x.data_ptr()


def test_sizes_are_classed_by_powers_of_two(clock: Clock) -> None:
    for size, more in ((17, True), (24, False), (33, True)):
        clock.timed.clear()
        x = images((1, 8, size, 16), torch.float32)
        passed("triton", channel.response(x), x, gradient(x))
        assert bool(clock.timed) == more, size
