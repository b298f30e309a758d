"""The Scheme: slots, sums and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from anybatch.scheme import SLOTS, Scheme
from anybatch.schemes import scheme

WS = Scheme("ws", conv=nn.Conv2d, needs_norm=True, sources=("a", "b"))
GN = Scheme("gn", norm=nn.Identity, sources=("b", "c"))
BN = Scheme("bn", norm=nn.BatchNorm2d, batch_independent=False)
FRN = Scheme("frn", norm_act=nn.Identity)
NONE = Scheme("none")


def test_slots_are_fields() -> None:
    assert set(SLOTS) <= {field.name for field in dataclasses.fields(Scheme)}
    for slot in SLOTS:
        assert Scheme("x", **{slot: nn.Identity}).filled == (slot,)  # pyright: ignore[reportArgumentType]
    assert NONE.filled == ()


def test_a_sum_fills_the_slots_of_both() -> None:
    both = WS + GN
    assert both.filled == ("conv", "norm")
    assert (both.conv, both.norm) == (nn.Conv2d, nn.Identity)
    assert both.sources == ("a", "b", "c")
    assert both.needs_norm


def test_the_earlier_slot_stands_first_in_the_name() -> None:
    assert (WS + GN).name == (GN + WS).name == "ws+gn"
    assert str(GN + WS) == "ws+gn"
    clip = Scheme("agc", clip=nn.Identity)
    assert {(a + b + c).name for a, b, c in [(WS, GN, clip), (clip, GN, WS), (GN, clip, WS)]} == {"ws+gn+agc"}


def test_nothing_added_changes_nothing() -> None:
    for both in (GN + NONE, NONE + GN):
        assert (both.name, both.filled, both.norm) == ("gn", ("norm",), nn.Identity)
    assert (NONE + NONE).name == "none"


def test_one_part_bound_to_the_batch_binds_the_sum() -> None:
    assert (WS + GN).batch_independent
    assert not (WS + BN).batch_independent
    assert not (BN + WS).batch_independent


@pytest.mark.parametrize(("one", "other", "slot"), [(GN, BN, "norm"), (BN, GN, "norm"), (WS, WS, "conv")])
def test_two_parts_in_one_slot_are_refused(one: Scheme, other: Scheme, slot: str) -> None:
    message = f"'{one.name}' and '{other.name}' both fill the slot '{slot}'; keep one of them"
    with pytest.raises(ValueError, match=message):
        one + other


def test_what_is_no_scheme_cannot_be_added() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        GN + "ws"  # pyright: ignore[reportOperatorIssue]


def test_schemes_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GN.name = "x"  # pyright: ignore[reportAttributeAccessIssue]
    GN + WS
    assert GN.filled == ("norm",)


def test_a_part_that_needs_a_norm_says_so() -> None:
    with pytest.raises(ValueError, match=r"scheme 'ws' needs a norm after its convolutions; write ws\+gn, say"):
        WS.check_complete()
    for complete in (WS + GN, WS + FRN, GN, NONE):
        complete.check_complete()


def test_parts_claim_and_name_what_they_are() -> None:
    made = scheme("ws+gn")
    assert made.batch_independent
    assert {"arXiv:1903.10520", "arXiv:1803.08494"} <= set(made.sources)
