"""All ways to launch Triton kernels are right, also behind runs that timed them; times are made up."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from anybatch import kernels
from anybatch.kernels import triton_channel_plans, triton_kn_conv, triton_tuning
from anybatch.kernels.triton_tuning import FIXED, RULE, SPACES, Tuned, Way, name_of
from kernels import test_triton_channel_norm as channel
from kernels import test_triton_kn_conv as kn
from kernels import test_triton_local_context_norm as local
from kernels import test_triton_positional_norm as positional
from kernels import test_triton_weight_standardize as ws
from kernels.common import assert_errs_little, gradient, images, needs_triton, passed
from kernels.conftest import Clock

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, and not in TF32 as a GPU does by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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


def norm_of_windows(_: pytest.MonkeyPatch, *, last: bool) -> None:
    x = images((2, 6, 9, 7), torch.float32, last=last, mean=10.0)
    assert_errs_little(local.local(x), x, gradient(x))


def convolution(_: pytest.MonkeyPatch, way: str, *, last: bool) -> None:
    kn.assert_errs_little("3x3 halved" if way == "dropped" else "3x3", way, torch.float32, last=last)


def convolution_in_groups(_: pytest.MonkeyPatch, *, last: bool) -> None:
    kn.assert_errs_little("groups", "dropped", torch.float32, last=last)


def filters(_: pytest.MonkeyPatch, *, together: bool) -> None:
    some = [ws.made(name) for name in ("odd", "rows at 16 bytes", "long rows", "scaled")]
    ws.assert_errs_little(some, "auto" if together else "triton", together=together)


def of(file: str, *names: str) -> set[str]:
    return {f"triton_{file}_kernels.{name}" for name in names}


_STEPS = of("channel", "moments", "applied", "gradient_sums", "combined")
_WHOLE = of("group", "whole_groups", "through_whole_groups")
_POSITIONAL = of("positional", "normalized")
_LOCAL = of("local_context", "pixel_moments", "normalized", "pulled", "combined")
_KN = of("kn", "pixel_moments", "normalized", "through_moments")
WORK: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "group norm": (partial(norm_in_steps, way="group", last=False), _STEPS),
    "batch-channel norm, channels last": (partial(norm_in_steps, way="batch", last=True), _STEPS),
    "filter response norm, channels last": (partial(norm_in_steps, way="response", last=True), _STEPS),
    "whole group norm": (partial(norm_held_whole, way="group", last=False), _WHOLE),
    "whole batch-channel norm, channels last": (partial(norm_held_whole, way="batch", last=True), _WHOLE),
    "positional norm": (partial(norm_of_positions, last=False), _POSITIONAL),
    "positional norm, channels last": (partial(norm_of_positions, last=True), _POSITIONAL | of("positional", "pulled")),
    "local context norm": (partial(norm_of_windows, last=False), _LOCAL),
    "local context norm, channels last": (partial(norm_of_windows, last=True), _LOCAL),
    "KNConv, added": (partial(convolution, way="all", last=False), _KN),
    "KNConv, channels last": (partial(convolution, way="joined", last=True), _KN | of("kn", "pulled")),
    "KNConv, dropout, channels last": (partial(convolution, way="dropped", last=True), _KN | of("kn", "pulled")),
    "KNConv in groups, channels last": (
        partial(convolution_in_groups, last=True),
        _KN | of("kn", "group_means", "pulled"),
    ),
    "filters": (partial(filters, together=False), of("parameter", "standardize_filters", "pull_filters")),
    "all filters": (partial(filters, together=True), of("parameter", "standardize_all", "pull_all")),
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
        ways = SPACES[launch.name]
        way = ways[min(number, len(ways) - 1)]
        plan = launch.make(way)
        differs = (plan.grid, plan.numbers, plan.warps) != (launch.rule.grid, launch.rule.numbers, launch.rule.warps)
        differ[launch.name] = differs or differ.get(launch.name, False)
        return way

    monkeypatch.setattr(Tuned, "_way", chosen)
    work(monkeypatch)
    assert {kernel for kernel in tuned if differ[kernel]} == (tuned if number else set())


def test_every_kernel_is_tuned_or_said_not_to_be_worth_it_and_every_tuned_one_is_tested() -> None:
    """A kernel is what Triton compiles and no other such function calls."""
    folder = Path(kernels.__file__).parent
    texts = {
        file.stem: text for file in folder.glob("triton_*.py") if "@triton.jit" in (text := file.read_text("utf-8"))
    }
    called = {name for text in texts.values() for name in re.findall(r"(?<!def )\b(\w+)\(", text)}
    launched = {
        f"{file}.{name}"
        for file, text in texts.items()
        for name in re.findall(r"@triton\.jit\ndef (\w+)\(", text)
        if name not in called
    }
    assert launched == set(SPACES) | set(FIXED)
    assert set(SPACES).isdisjoint(FIXED)
    assert set(SPACES) == set().union(*(tuned for _, tuned in WORK.values()))
    for ways in SPACES.values():
        assert ways[0] == RULE
        assert 1 < len(set(ways)) == len(ways) <= 6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["KNConv, channels last", "KNConv, dropout, channels last", "all filters"])
def test_what_is_overwritten_is_right_behind_many_timed_runs(
    name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.of, clock.runs = lambda plan: 1.0 / len(clock.timed), True  # the last is the fastest
    WORK[name][0](monkeypatch)
    assert {name_of(plan.kernel) for plan in clock.timed} >= WORK[name][1]
    assert any(way != RULE for way in triton_tuning._found.values())


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
