"""SkipInit: each residual branch ends in one learnable number that starts at 0."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from anybatch.methods.residual import Join, alike
from anybatch.scheme import Scheme, check_number


class SkipInitJoin(Join):
    """``skip + gain * branch`` with one learnable number.

    At the start batch normalization shrinks a branch against its skip connection by about the root of the depth; a gain
    of 0, or of at most ``1 / sqrt(depth)``, does the same without it.

    Args:
        gain: Where the number starts.

    Source:
        De and Smith 2020, arXiv:2002.10444, section 3.
    """

    def __init__(self, gain: float = 0.0) -> None:
        super().__init__()
        # Without dimensions, so that a product under autocast keeps the branch's dtype.
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def combine(self, branch: Tensor, skip: Tensor) -> Tensor:
        return skip + self.gain * branch


def skipinit(*, gain: float = 0.0) -> Scheme:
    """SkipInit: plain convolutions with biases, each residual branch times a learnable number that starts at 0.

    The release starts the classifier at 0 too; here it starts as the network has it.
    """
    check_number("gain", gain)
    return Scheme(
        name="skipinit", residual=partial(alike, join=partial(SkipInitJoin, gain)), sources=("arXiv:2002.10444",)
    )
