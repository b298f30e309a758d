"""Tuning as on a GPU, with times that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from anybatch.dispatch import autotuned
from anybatch.kernels import (
    triton_channel_plans,
    triton_kn_conv,
    triton_local_context_norm,
    triton_positional_norm,
    triton_tuning,
    triton_weight_standardize,
)
from anybatch.kernels.triton_common import Plan

PLANNING = (
    triton_channel_plans,
    triton_kn_conv,
    triton_local_context_norm,
    triton_positional_norm,
    triton_weight_standardize,
)


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
