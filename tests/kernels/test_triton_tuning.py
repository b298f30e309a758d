"""All ways to launch Triton kernels are right, and of them the fastest is taken, once; times are made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch import kernels
from anybatch.dispatch import autotuned
from anybatch.kernels import (
    triton_channel_plans,
    triton_common,
    triton_kn_conv,
    triton_positional_norm,
    triton_tuning,
    triton_weight_standardize,
)
from anybatch.kernels.triton_common import Plan
from anybatch.kernels.triton_tuning import FIXED, RULE, SPACES, Tuned, Way
from kernels import test_triton_channel_norm as channel
from kernels import test_triton_kn_conv as kn
from kernels import test_triton_positional_norm as positional
from kernels import test_triton_weight_standardize as ws
from kernels.common import DEVICE, assert_errs_little, gradient, images, needs_triton, passed

pytestmark = needs_triton

PLANNING = (triton_channel_plans, triton_kn_conv, triton_positional_norm, triton_weight_standardize)


@pytest.fixture(autouse=True)
def _all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, and not in TF32 as a GPU does by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def forget_plans() -> None:
    for module in PLANNING:
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


class Clock:
    """Tells made-up times of plans, which it runs or not."""

    def __init__(self) -> None:
        self.of: Callable[[Plan], float] = lambda plan: 1.0
        self.runs = False
        self.timed: list[Plan] = []

    def __call__(self, run: partial[None]) -> float:
        plan = run.func
        assert isinstance(plan, Plan)
        self.timed.append(plan)
        if self.runs:
            run()
        return self.of(plan)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    """Tuning is on, as on a GPU of its own kind that has tuned nothing yet."""
    made = Clock()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tuning, "INTERPRETED", False)
    monkeypatch.setattr(triton_tuning, "_device", lambda: "a GPU")
    monkeypatch.setattr(triton_tuning, "_found", {})
    monkeypatch.setattr(triton_tuning, "_milliseconds", made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget_plans()
    with autotuned():
        yield made
    forget_plans()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """KNConv's programs read so little at once that ways differ in a small map."""
    monkeypatch.setattr(triton_kn_conv, "_TILE", 512)


# What is right in any way: by name, what asserts it, and the kernels that it launches in ways that differ.


def norm_in_steps(monkeypatch: pytest.MonkeyPatch, way: str, *, last: bool) -> None:
    monkeypatch.setattr(triton_channel_plans, "_WHOLE", 0)
    x = images((2, 4, 40, 41), torch.float32, last=last, mean=10.0)
    assert_errs_little(channel.WAYS[way](x), x, gradient(x))


def norm_held_whole(_: pytest.MonkeyPatch, way: str, *, last: bool) -> None:
    x = images((2, 16, 17, 9), torch.float32, last=last)
    assert_errs_little(channel.WAYS[way](x, "silu"), x, gradient(x))


def norm_of_positions(_: pytest.MonkeyPatch, *, last: bool) -> None:
    x = images((1, 300, 5, 4), torch.float32, last=last, mean=10.0)
    assert_errs_little(positional.positional(x), x, gradient(x))


def convolution(_: pytest.MonkeyPatch, way: str, *, last: bool) -> None:
    kn.assert_errs_little("3x3 halved" if way == "dropped" else "3x3", way, torch.float32, last=last)


def filters(_: pytest.MonkeyPatch, *, together: bool) -> None:
    some = [ws.made(name) for name in ("odd", "rows at 16 bytes", "long rows", "scaled")]
    ws.assert_errs_little(some, "auto" if together else "triton", together=together)


_STEPS = {"moments", "applied", "gradient_sums", "combined"}
_WHOLE = {"whole_groups", "through_whole_groups"}
_KN = {"pixel_moments", "normalized", "through_moments"}
WORK: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "group norm": (partial(norm_in_steps, way="group", last=False), _STEPS),
    "batch-channel norm, channels last": (partial(norm_in_steps, way="batch", last=True), _STEPS),
    "filter response norm, channels last": (partial(norm_in_steps, way="response", last=True), _STEPS),
    "whole group norm": (partial(norm_held_whole, way="group", last=False), _WHOLE),
    "whole batch-channel norm, channels last": (partial(norm_held_whole, way="batch", last=True), _WHOLE),
    "positional norm": (partial(norm_of_positions, last=False), {"normalized"}),
    "positional norm, channels last": (partial(norm_of_positions, last=True), {"normalized", "pulled"}),
    "KNConv, added": (partial(convolution, way="all", last=False), _KN),
    "KNConv, channels last": (partial(convolution, way="joined", last=True), {*_KN, "pulled"}),
    "KNConv, dropout, channels last": (partial(convolution, way="dropped", last=True), {*_KN, "pulled"}),
    "filters": (partial(filters, together=False), {"standardize_filters", "pull_filters"}),
    "all filters": (partial(filters, together=True), {"standardize_all", "pull_all"}),
}
MOST = max(map(len, SPACES.values()))


@pytest.mark.usefixtures("small_tiles", "clock")
@pytest.mark.parametrize("number", range(MOST))
@pytest.mark.parametrize("name", WORK)
def test_every_way_is_right(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiles in Triton's interpreter, which has no warps; of both on a GPU."""
    work, tuned = WORK[name]
    differ: dict[str, bool] = {}

    def chosen(launch: Tuned, _: Any) -> Way:
        ways = SPACES[launch.kernel.__name__]
        way = ways[min(number, len(ways) - 1)]
        plan = launch.make(way)
        differs = (plan.grid, plan.numbers, plan.warps) != (launch.rule.grid, launch.rule.numbers, launch.rule.warps)
        differ[launch.kernel.__name__] = differs or differ.get(launch.kernel.__name__, False)
        return way

    monkeypatch.setattr(Tuned, "_way", chosen)
    work(monkeypatch)
    assert {kernel for kernel in tuned if differ[kernel]} == (tuned if number else set())


def test_every_kernel_is_tuned_or_said_not_to_be_worth_it_and_every_tuned_one_is_tested() -> None:
    """A kernel is what Triton compiles and no other such function calls."""
    folder = Path(kernels.__file__).parent
    texts = [text for file in folder.glob("triton_*.py") if "@triton.jit" in (text := file.read_text("utf-8"))]
    compiled = {name for text in texts for name in re.findall(r"@triton\.jit\ndef (\w+)\(", text)}
    called = {name for text in texts for name in re.findall(r"(?<!def )\b(\w+)\(", text)}
    assert compiled - called == set(SPACES) | set(FIXED)
    assert set(SPACES).isdisjoint(FIXED)
    assert set(SPACES) == set().union(*(tuned for _, tuned in WORK.values()))
    for ways in SPACES.values():
        assert ways[0] == RULE
        assert 1 < len(set(ways)) == len(ways) <= 6


class Added:
    """Columns of (R, S) added up by one program each, whose rows at once and warps are tuned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SPACES, "added_up", (RULE, Way(0.5, 1), Way(2, 2)))
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


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["KNConv, channels last", "KNConv, dropout, channels last", "all filters"])
def test_what_is_overwritten_is_right_behind_many_timed_runs(
    name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.of, clock.runs = lambda plan: 1.0 / len(clock.timed), True  # the last is the fastest
    WORK[name][0](monkeypatch)
    assert {plan.kernel.__name__ for plan in clock.timed} >= WORK[name][1]
    assert any(way != RULE for way in triton_tuning._found.values())


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


@pytest.mark.parametrize("whole", [False, True])
def test_the_batch_has_no_say(whole: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch of three chose holds for one sample, which is the same to the last bit."""
    if not whole:
        monkeypatch.setattr(triton_channel_plans, "_WHOLE", 0)
    clock.of = lambda plan: 1.0 / len(clock.timed)  # the last is the fastest
    x = images((3, 4, 40, 41) if not whole else (3, 16, 17, 9), torch.float32, last=True)
    g = gradient(x)
    for called in (channel.group(x), positional.positional(x)):
        together = passed("triton", called, x, g)
        count = len(clock.timed)
        assert count > 0
        alone = passed("triton", called, x[:1], g[:1])
        assert len(clock.timed) == count
        for name in ("output", "gradient 0"):
            assert torch.equal(alone[name], together[name][:1]), name


def test_sizes_are_classed_by_powers_of_two(clock: Clock) -> None:
    for size, more in ((17, True), (24, False), (33, True)):
        clock.timed.clear()
        x = images((1, 8, size, 16), torch.float32)
        passed("triton", channel.response(x), x, gradient(x))
        assert bool(clock.timed) == more, size
