"""The one table of part names, and how a scheme is written: ``"ws+gn(groups=16)"``."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from anybatch import kernels as kernels  # attaches the fast paths to the references
from anybatch.methods.adaptive_gradient_clipping import agc
from anybatch.methods.batch_channel_norm import bcn
from anybatch.methods.batch_norm import bn, frozenbn, syncbn
from anybatch.methods.batch_renorm import brn
from anybatch.methods.derf import derf
from anybatch.methods.dynamic_tanh import dyt
from anybatch.methods.evo_norm import evob0, evos0
from anybatch.methods.filter_response_norm import frn
from anybatch.methods.fixup import fixup
from anybatch.methods.group_norm import gn, in_, ln
from anybatch.methods.kn_conv import kn
from anybatch.methods.local_context_norm import lcn
from anybatch.methods.local_response_norm import lrn
from anybatch.methods.normalizer_free import nf
from anybatch.methods.positional_norm import pn
from anybatch.methods.scaled_weight_standardization import sws
from anybatch.methods.skip_init import skipinit
from anybatch.methods.weight_standardization import ws
from anybatch.scheme import Scheme
from anybatch.suggest import unknown


def none() -> Scheme:
    """No normalization: plain convolutions with biases, the control of every comparison."""
    return Scheme(name="none")


PARTS: dict[str, Callable[..., Scheme]] = {
    "agc": agc,
    "bcn": bcn,
    "bn": bn,
    "brn": brn,
    "derf": derf,
    "dyt": dyt,
    "evob0": evob0,
    "evos0": evos0,
    "fixup": fixup,
    "frn": frn,
    "frozenbn": frozenbn,
    "gn": gn,
    "in": in_,
    "kn": kn,
    "lcn": lcn,
    "ln": ln,
    "lrn": lrn,
    "nf": nf,
    "none": none,
    "pn": pn,
    "skipinit": skipinit,
    "sws": sws,
    "syncbn": syncbn,
    "ws": ws,
}

# What people type in torch, timm, mmcv, detectron2 and MONAI, in lower case.
ALIASES: dict[str, str] = {
    "adaptivegradientclipping": "agc",
    "batch": "bn",
    "batchchannelnorm": "bcn",
    "batchchannelnorm1d": "bcn",
    "batchchannelnorm2d": "bcn",
    "batchchannelnorm3d": "bcn",
    "batchnorm": "bn",
    "batchnorm1d": "bn",
    "batchnorm2d": "bn",
    "batchnorm3d": "bn",
    "batchrenorm": "brn",
    "batchrenorm1d": "brn",
    "batchrenorm2d": "brn",
    "batchrenorm3d": "brn",
    "batchrenormalization": "brn",
    "bcnorm": "bcn",
    "bn1d": "bn",
    "bn2d": "bn",
    "bn3d": "bn",
    "convws": "ws",
    "dynamic_erf": "derf",
    "dynamic_tanh": "dyt",
    "dynamicerf": "derf",
    "dynamictanh": "dyt",
    "evonorm2db0": "evob0",
    "evonorm2ds0": "evos0",
    "evonormb0": "evob0",
    "evonorms0": "evos0",
    "filterresponsenorm": "frn",
    "filterresponsenorm1d": "frn",
    "filterresponsenorm2d": "frn",
    "filterresponsenorm3d": "frn",
    "filterresponsenormtlu2d": "frn",
    "frn_tlu": "frn",
    "frozen": "frozenbn",
    "frozenbatchnorm": "frozenbn",
    "frozenbatchnorm2d": "frozenbn",
    "group": "gn",
    "groupnorm": "gn",
    "identity": "none",
    "in1d": "in",
    "in2d": "in",
    "in3d": "in",
    "instance": "in",
    "instancenorm": "in",
    "instancenorm1d": "in",
    "instancenorm2d": "in",
    "instancenorm3d": "in",
    "kernelnorm": "kn",
    "knconv": "kn",
    "knconv2d": "kn",
    "layer": "ln",
    "layernorm": "ln",
    "layernorm2d": "pn",
    "ln2d": "pn",
    "localcontextnorm": "lcn",
    "localcontextnorm1d": "lcn",
    "localcontextnorm2d": "lcn",
    "localcontextnorm3d": "lcn",
    "localresponsenorm": "lrn",
    "naivesyncbn": "syncbn",
    "nfnet": "nf",
    "normalizer_free": "nf",
    "normalizerfree": "nf",
    "pono": "pn",
    "positionalnorm": "pn",
    "scaledstdconv2d": "sws",
    "stdconv2d": "ws",
    "syncbatch": "syncbn",
    "syncbatchnorm": "syncbn",
    "weightstandardization": "ws",
}

# Arguments as other libraries name them.
OPTION_ALIASES = {"num_groups": "groups", "channels_per_group": "group_size"}

_PART = re.compile(r"(?P<name>[A-Za-z_]\w*)\s*(?:\((?P<options>[^()]*)\)|:(?P<groups>\w+)|/(?P<size>\d+))?")


def scheme(spec: str | Scheme | Mapping[str, Any] | tuple[str, Mapping[str, Any]]) -> Scheme:
    """The scheme that a text names, or that another library's setting means.

    Args:
        spec: Parts with their options joined by ``+`` (``"ws+gn(groups=16)"``, ``"gn:16"`` for 16 groups, ``"gn/8"``
            for 8 channels a group), a name used elsewhere (``"GN"``, ``"groupnorm"``), a mapping as in mmcv
            (``{"type": "GN", "num_groups": 32}``), a pair as in MONAI (``("group", {"num_groups": 8})``),
            or a Scheme, which comes back as it is.

    Returns:
        The sum of the parts. Its name is a text that gives the same scheme again.

    Raises:
        ValueError: If a part or an option is unknown (the nearest known ones are named), or two parts fill one slot.

    >>> scheme("GN:16+ws").name
    'ws+gn(groups=16)'
    >>> scheme({"type": "GN", "num_groups": 16}).name
    'gn(groups=16)'
    """
    if isinstance(spec, Scheme):
        return spec
    if isinstance(spec, Mapping):
        options = dict(spec)
        if not isinstance(name := options.pop("type", None), str):
            raise ValueError(
                f"a scheme written as a mapping needs a 'type', as in {{'type': 'GN'}}; got {dict(spec)!r}"
            )
        return _part(name, options, repr(dict(spec)))
    if isinstance(spec, tuple):
        if len(spec) != 2 or not isinstance(spec[0], str) or not isinstance(spec[1], Mapping):
            raise ValueError(f"a scheme written as a pair is (name, options), got {spec!r}")
        return _part(spec[0], dict(spec[1]), repr(spec))
    if not isinstance(spec, str):
        raise TypeError(f"a scheme is a text such as 'ws+gn', a mapping, a pair or a Scheme, got {type(spec).__name__}")
    parts = [_parse_part(text.strip(), spec) for text in re.split(r"\+(?![^()]*\))", spec)]
    return functools.reduce(operator.add, parts)


def _parse_part(text: str, spec: str) -> Scheme:
    match = _PART.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read {text!r} in scheme {spec!r}; write parts as in ws+gn(groups=16)")
    options: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in (match["options"] or "").split(","))):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals:
            raise ValueError(f"cannot read the option {item!r} in scheme {spec!r}; write name=value")
        if key in options:
            raise ValueError(f"option {key!r} stands twice in scheme {spec!r}")
        options[key] = _literal(value)
    if match["groups"]:
        options["groups"] = _literal(match["groups"])
    if match["size"]:
        options["group_size"] = int(match["size"])
    return _part(match["name"], options, spec)


def _literal(text: str) -> Any:
    """A Python number or word; a word needs no quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _part(name: str, options: dict[str, Any], spec: str) -> Scheme:
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in PARTS:
        raise unknown("part", name, PARTS, where=f" in scheme {spec!r}")
    given, options = options, {}
    for option, value in given.items():
        if (own := OPTION_ALIASES.get(option, option)) in options:
            raise ValueError(f"option {own!r} stands twice in scheme {spec!r}")
        options[own] = value
    known = inspect.signature(PARTS[key]).parameters
    for option in map(str, options):
        if option not in known:
            raise unknown(f"option of {key}", option, known, where=f" in scheme {spec!r}")
    try:
        made = PARTS[key](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scheme {spec!r}: {error}") from None
    told = {
        option: options[option] for option in known if option in options and options[option] != known[option].default
    }
    written = ",".join(f"{option}={value}" for option, value in told.items())
    return dataclasses.replace(made, name=f"{key}({written})" if written else key)
