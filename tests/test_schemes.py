"""How a scheme is written: our spelling, other libraries' spellings, and errors that name what would do."""

from __future__ import annotations

import random
from typing import Any

import pytest
from torch import nn

import anybatch
from anybatch.models.blocks import Pieces
from anybatch.schemes import ALIASES, OPTION_ALIASES, PARTS, scheme

SPELLINGS = [
    ("bn", "bn"),
    ("BN", "bn"),
    ("  gn ", "gn"),
    ("gn()", "gn"),
    ("gn:32", "gn"),
    ("gn(groups=32)", "gn"),
    ("gn(eps=1e-5)", "gn"),
    ("gn(group_size=None)", "gn"),
    ("gn:16", "gn(groups=16)"),
    ("gn:auto", "gn(groups=auto)"),
    ("gn(groups=auto)", "gn(groups=auto)"),
    ("gn(groups='auto')", "gn(groups=auto)"),
    ('gn( groups = "auto" )', "gn(groups=auto)"),
    ("gn(num_groups=8)", "gn(groups=8)"),
    ("gn/8", "gn(group_size=8)"),
    ("gn(channels_per_group=8)", "gn(group_size=8)"),
    ("gn(groups=16,eps=1e-3)", "gn(groups=16,eps=0.001)"),
    ("gn(groups=16, eps=.001,)", "gn(groups=16,eps=0.001)"),
    ("ws+gn", "ws+gn"),
    ("gn+ws", "ws+gn"),
    ("WS + GN:16", "ws+gn(groups=16)"),
    ("gn(groups=16)+ws(eps=1e-4)", "ws(eps=0.0001)+gn(groups=16)"),
    ("gn(eps=1e+1)+ws", "ws+gn(eps=10.0)"),
    ("none", "none"),
    ("none+gn", "gn"),
    ("in", "in"),
    ("ws+ln", "ws+ln"),
    ("bn(momentum=0.01)", "bn(momentum=0.01)"),
    ("GroupNorm", "gn"),
    ("batchnorm2d", "bn"),
    ("InstanceNorm3d", "in"),
    ("layer", "ln"),
    ("Identity", "none"),
    ("SyncBN", "syncbn"),
    ("FrozenBN", "frozenbn"),
    ("ConvWS+BCNorm", "ws+bcn"),
    ("bcn:16", "bcn(groups=16)"),
    ("BatchRenorm2d", "brn"),
    ("ConvWS+GN", "ws+gn"),
]


@pytest.mark.parametrize(("text", "name"), SPELLINGS)
def test_name_is_canonical_and_reads_back(text: str, name: str) -> None:
    made = scheme(text)
    assert made.name == name
    assert scheme(made.name).name == name


def test_name_does_not_depend_on_the_order_of_options() -> None:
    assert scheme("gn(eps=1e-3,groups=16)").name == scheme("gn(groups=16,eps=1e-3)").name


def norm_of(made: anybatch.Scheme, channels: int = 64) -> nn.Module:
    return Pieces(made).norm(channels)


@pytest.mark.parametrize(("text", "name"), SPELLINGS)
def test_the_name_builds_the_same_layers(text: str, name: str) -> None:
    made, again = scheme(text), scheme(name)
    assert made.filled == again.filled
    assert made.batch_independent == again.batch_independent
    assert repr(norm_of(made)) == repr(norm_of(again)) if made.norm else True
    if made.conv:
        assert repr(Pieces(made).conv(4, 4, 3)) == repr(Pieces(again).conv(4, 4, 3))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"type": "GN", "num_groups": 32}, "gn"),
        ({"type": "GN", "num_groups": 16, "eps": 1e-3}, "gn(groups=16,eps=0.001)"),
        ({"type": "BN"}, "bn"),
        ({"type": "BN2d", "momentum": 0.01}, "bn(momentum=0.01)"),
        ({"type": "IN"}, "in"),
        (("group", {"num_groups": 8}), "gn(groups=8)"),
        (("batch", {}), "bn"),
        (("instance", {"eps": 1e-3}), "in(eps=0.001)"),
        (("layer", {}), "ln"),
    ],
    ids=str,
)
def test_other_libraries_settings(spec: Any, name: str) -> None:
    before = repr(spec)
    assert scheme(spec).name == name
    assert repr(spec) == before, "the setting was changed"


def test_options_reach_the_layers() -> None:
    assert repr(norm_of(scheme("gn:16"))) == "GroupNorm(64, num_groups=16, eps=1e-05, affine=True)"
    assert repr(norm_of(scheme("gn/8"), 48)) == "GroupNorm(48, num_groups=6, eps=1e-05, affine=True)"
    assert repr(norm_of(scheme({"type": "GN", "num_groups": 4, "eps": 0.5}))).startswith(
        "GroupNorm(64, num_groups=4, eps=0.5"
    )


def test_a_scheme_comes_back_as_it_is() -> None:
    made = scheme("ws+gn")
    assert scheme(made) is made
    assert anybatch.scheme(made) is made


def test_every_alias_leads_to_a_part() -> None:
    for alias, part in ALIASES.items():
        assert alias == alias.lower()
        assert scheme(alias).name == scheme(part).name
    assert not set(ALIASES) & set(PARTS)
    assert set(OPTION_ALIASES.values()) <= {"groups", "group_size"}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_has_its_own_name(name: str) -> None:
    assert scheme(name).name == name
    assert PARTS[name]().name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gm", r"unknown part 'gm' in scheme 'gm'; did you mean gn\?"),
        ("ws+grupnorm", r"unknown part 'grupnorm' in scheme 'ws\+grupnorm'.*Known: .*\bbn, .*\bgn, .*\bws"),
        ("gn(group=8)", r"unknown option of gn 'group' in scheme 'gn\(group=8\)'; did you mean group_size or groups"),
        ("bn:16", r"unknown option of bn 'groups' in scheme 'bn:16'.*Known: eps, momentum"),
        ("bn+gn", "'bn' and 'gn' both fill the slot 'norm'"),
        ("ws+gn+ws", r"'ws\+gn' and 'ws' both fill the slot 'conv'"),
        ("", "cannot read '' in scheme ''"),
        ("gn+", r"cannot read '' in scheme 'gn\+'; write parts as in ws\+gn\(groups=16\)"),
        ("gn(groups)", r"cannot read the option 'groups' in scheme 'gn\(groups\)'; write name=value"),
        ("gn(groups=16", r"cannot read 'gn\(groups=16'"),
        ("gn 16", "cannot read 'gn 16'"),
        ("gn(num_groups=8,groups=16)", "option 'groups' stands twice in scheme"),
        ("gn(group_size=True)", "group_size must be a whole number of 1 or more, got True"),
        ("gn(eps=1e999)", "eps=inf is not a number from 0 to below inf"),
        ("ws(variant=3)", "unknown variant of weight standardization 3"),
        ("ws(variant=None)", "unknown variant of weight standardization None"),
        ("fixup(x=1)", "unknown option of fixup 'x' in scheme .* Known: none"),
        ("gn:0", "scheme 'gn:0': groups=0 is neither a number above 0 nor 'auto'"),
        ({"num_groups": 8}, r"needs a 'type', as in \{'type': 'GN'\}; got \{'num_groups': 8\}"),
        ({"type": 3}, "needs a 'type'"),
        ({"type": "SyncXN"}, "unknown part 'SyncXN'"),
        ({"type": "GN", "groups": "some"}, "groups='some' is neither"),
        (("gn",), r"a scheme written as a pair is \(name, options\), got \('gn',\)"),
        (("gn", 8), r"a scheme written as a pair is \(name, options\)"),
    ],
    ids=str,
)
def test_errors_say_what_was_wrong_and_what_would_do(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme(spec)


@pytest.mark.parametrize("spec", [None, 3, 1.5, b"gn", {1}], ids=str)
def test_other_types_are_refused(spec: Any) -> None:
    with pytest.raises(TypeError, match="a scheme is a text such as 'ws\\+gn', a mapping, a pair or a Scheme, got"):
        scheme(spec)


def test_garbage_is_a_value_error_or_a_scheme_that_reads_back() -> None:
    rng = random.Random(0)
    pieces = [
        *("gn", "ws", "bn", "ln", "in", "none", "gm", "groups", "eps", "auto", "group_size", "momentum"),
        *"+:/()=,.-_ \t'\"[]{}\\#@é٣0123456789",
        *("+", "(", ")", "=", "16", "1e-3", "\0", "\n", "nan", "None", "True"),
    ]
    read = 0
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 7)))
        try:
            made = scheme(text)
        except ValueError:
            continue
        read += 1
        assert scheme(made.name).name == made.name, text
    assert read > 50  # the pieces do make schemes too


@pytest.mark.parametrize(
    "text",
    [
        "gn(groups={[]:1})",
        "gn(eps=" + "-" * 20_000 + "1)",
        "gn(eps=abc)",
        "gn(eps=-1)",
        "gn(eps=nan)",
        "sws(eps=None)",
        "bn(momentum=fast)",
        "gn(groups=True)",
        "gn(groups=8,groups=16)",
        "gn(groups=8,group_size=4)",
    ],
)
def test_bad_values_are_value_errors(text: str) -> None:
    with pytest.raises(ValueError, match="scheme"):
        scheme(text)
