"""The Scheme: how a network normalizes, one slot for each choice, and how schemes add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

# A slot that differs between 1d, 2d and 3d data holds the three classes in that order.
Factory = Callable[..., Any]
PerDims = tuple[Factory, Factory, Factory]

SLOTS = ("conv", "norm", "act", "norm_act", "final", "residual", "init", "clip")


def check_number(name: str, value: Any, *, at_most: float = math.inf) -> None:
    """Raise a `ValueError` unless an option is a finite number of 0 or more."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= at_most or value == math.inf:
        most = "below inf" if at_most == math.inf else f"{at_most:g}"
        raise ValueError(f"{name}={value!r} is not a number from 0 to {most}")


def check_positive(name: str, value: Any) -> None:
    """Raise a `ValueError` unless an option is a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a finite number above 0")


def check_count(name: str, value: Any) -> None:
    """Raise a `ValueError` unless an option is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")


def check_rate(name: str, value: Any) -> None:
    """Raise a `ValueError` unless an option is a probability to drop that leaves something."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not a probability from 0 to below 1; at 1 nothing would be left")


def check_flag(name: str, value: Any) -> None:
    """Raise a `ValueError` unless an option is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither True nor False")


@dataclass(frozen=True)
class Scheme:
    """How a network normalizes. Parts fill slots and add up: ``ws() + gn()``.

    An empty slot means the plain choice (torch's convolution, no norm, in-place ReLU, ``branch + skip``,
    He's initialization, no clipping). Models never look into a scheme: they take their pieces from
    `anybatch.models.blocks.Pieces`.

    Args:
        name: How the scheme is written, as in ``"ws+gn(groups=16)"``.
        conv: Called with the arguments of ``torch.nn.Conv2d``; one factory for all, or one each for 1d, 2d, 3d.
        norm: Called with the number of channels; one factory for all, or one each for 1d, 2d, 3d.
        act: Called with no argument.
        norm_act: A norm with its own activation, called with the number of channels and, where a block has no
            activation behind its norm, ``apply_act=False``; one factory for all, or one each for 1d, 2d, 3d.
        final: A norm in front of the head of pre-activated networks, where convolutions normalize what they take and
            neither ``norm`` nor ``norm_act`` is filled; called with the number of channels; one factory for all, or one
            each for 1d, 2d, 3d.
        residual: Called with the number of residual blocks; returns a function that makes each block's join (see
            `anybatch.methods.residual.Join`), called with whether the block's skip connection is a projection.
        init: Called with the finished model.
        clip: Called with the finished model; returns a function without arguments that clips the gradients, called
            before each step of the optimizer.
        conv_bias: Whether convolutions learn biases though a norm follows, as behind one that does not shift.
        batch_independent: Whether a sample's output and gradient never depend on other samples.
        needs_norm: Whether a network cannot train unless a part fills ``norm`` or ``norm_act`` too.
        sources: Where the method is defined.

    Source:
        Slots are ours; each part names the source of its method.
    """

    name: str
    conv: Factory | PerDims | None = None
    norm: Factory | PerDims | None = None
    act: Factory | None = None
    norm_act: Factory | PerDims | None = None
    final: Factory | PerDims | None = None
    residual: Factory | None = None
    init: Factory | None = None
    clip: Factory | None = None
    conv_bias: bool = False
    batch_independent: bool = True
    needs_norm: bool = False
    sources: tuple[str, ...] = ()

    @property
    def filled(self) -> tuple[str, ...]:
        """The slots this scheme fills, in the order of `SLOTS`."""
        return tuple(slot for slot in SLOTS if getattr(self, slot) is not None)

    def __add__(self, other: Scheme) -> Scheme:
        """Both schemes at once; a `ValueError` names the slot that both fill.

        The sum's name lists the part with the earlier slot first, so ``gn + ws`` is ``ws + gn``.
        """
        if not isinstance(other, Scheme):
            return NotImplemented
        clash = [slot for slot in self.filled if slot in other.filled]
        if clash:
            raise ValueError(f"{self.name!r} and {other.name!r} both fill the slot {clash[0]!r}; keep one of them")
        first, second = sorted((self, other), key=lambda part: [SLOTS.index(slot) for slot in part.filled])
        merged = {slot: getattr(first, slot) or getattr(second, slot) for slot in SLOTS}
        names = [part.name for part in (first, second) if part.filled]
        return Scheme(
            name="+".join(names) or first.name,
            **merged,
            conv_bias=first.conv_bias or second.conv_bias,
            batch_independent=first.batch_independent and second.batch_independent,
            needs_norm=first.needs_norm or second.needs_norm,
            sources=tuple(dict.fromkeys(first.sources + second.sources)),
        )

    def check_complete(self) -> None:
        """Raise a `ValueError` where a part needs a norm behind it and no part is one."""
        if self.needs_norm and not {"norm", "norm_act"} & set(self.filled):
            raise ValueError(f"scheme {self.name!r} needs a norm after its convolutions; write {self.name}+gn, say")

    def __str__(self) -> str:
        return self.name
