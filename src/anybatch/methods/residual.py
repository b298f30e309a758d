"""How a residual branch meets its skip connection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from anybatch.methods.common import TakesActivation


def alike(blocks: int, *, join: Callable[[], Join]) -> Callable[[bool], Join]:
    """The rule of a network whose joins are all alike, whatever their number and place: each is what ``join`` makes."""
    return partial(_any_place, join=join)


def _any_place(transition: bool, *, join: Callable[[], Join]) -> Join:
    return join()


class Join(nn.Module):
    """``branch + skip``, the plain join. The joins of residual rules derive from this one.

    A block asks its join three times: `prepare` for what its branch and its projection take, `forward` where the two
    meet, and once, when it is built, `activation` for what stands behind the join. Rules override `combine`.
    """

    scale_by_keep: ClassVar[bool] = True
    """Whether stochastic depth in front of this join scales what it keeps; see `StochasticDepth`."""

    def __init__(self) -> None:
        super().__init__()
        self.drop: nn.Module | None = None
        """Stochastic depth of the branch, which the network sets where it has it."""

        self.inside = False
        """Whether the branch's last convolution adds the skip connection itself."""

    def prepare(self, x: Tensor) -> Tensor:
        """What the branch takes, and the projection of a block that has one, in place of ``x``."""
        return x

    def forward(self, branch: Tensor, skip: Tensor) -> Tensor:
        return self.combine(branch if self.drop is None else self.drop(branch), skip)

    def move_inside(self, conv: nn.Module) -> bool:
        """Leave the sum to the branch's last convolution, if this is a plain join and the convolution can add."""
        plain = type(self) is Join and self.drop is None
        self.inside = plain and isinstance(conv, TakesActivation) and conv.takes_residual
        return self.inside

    def end(self, h: Tensor, skip: Tensor, conv: nn.Module, norm: nn.Module | None = None) -> Tensor:
        """What the branch's last convolution and the norm behind it make of ``h``, joined with the skip connection."""
        if self.inside:
            if self.drop is not None or not isinstance(norm, (nn.Identity, type(None))):
                raise RuntimeError(
                    "the branch's last convolution adds the skip connection itself: neither norm nor stochastic depth "
                    "can stand between; build the network with another scheme in place of exchanging its layers"
                )
            return conv(h, skip)
        h = conv(h)
        return self(h if norm is None else norm(h), skip)

    def combine(self, branch: Tensor, skip: Tensor) -> Tensor:
        """The sum, of a branch that stochastic depth has passed."""
        return branch + skip

    def activation(self, act: nn.Module) -> nn.Module:
        """The activation behind the join, through which the skip connection passes from block to block."""
        return act
