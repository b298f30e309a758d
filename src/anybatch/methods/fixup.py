"""Fixup: an initialization, and a few single numbers, that train residual networks without normalization."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.methods.parameters import classifier
from anybatch.methods.residual import Join, alike
from anybatch.scheme import Scheme


class _FixupConv(nn.modules.conv._ConvNd):
    bias_in: nn.Parameter | None
    bias_out: nn.Parameter | None

    def __init__(self, *args: Any, bias: bool = True, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, device=device, dtype=dtype, **kwargs)  # pyright: ignore[reportCallIssue]
        for name in ("bias_in", "bias_out"):
            # Without dimensions, so that a sum under autocast keeps the dtype of what it is added to.
            number = nn.Parameter(torch.zeros((), device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, number)

    def reset_parameters(self) -> None:
        """The filter as torch draws it, both numbers 0."""
        super().reset_parameters()
        for name in ("bias_in", "bias_out"):
            if isinstance(number := getattr(self, name, None), nn.Parameter):  # torch's constructor comes before them
                nn.init.zeros_(number)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.bias_in is None else input + self.bias_in
        y = self._conv_forward(x, self.weight, None)  # pyright: ignore[reportAttributeAccessIssue]
        return y if self.bias_out is None else y + self.bias_out

    def extra_repr(self) -> str:
        return super().extra_repr() if self.bias_in is None else super().extra_repr().replace(", bias=False", "")


_DOC = """A convolution with one number added before it and one behind it: torch's ``{base}`` and its arguments.

    ``y = conv(x + bias_in, W) + bias_out``, both numbers first 0; padding is added behind the first. There is no bias
    for each channel; ``bias=False`` leaves the two numbers out.

    Shape:
        As ``torch.nn.{base}``.

    Source:
        Zhang, Dauphin and Ma 2019, "Fixup Initialization", arXiv:1901.09321, section 4, rule 3.
    """


class FixupConv1d(_FixupConv, nn.Conv1d):
    __doc__ = _DOC.format(base="Conv1d")


class FixupConv2d(_FixupConv, nn.Conv2d):
    __doc__ = _DOC.format(base="Conv2d")


class FixupConv3d(_FixupConv, nn.Conv3d):
    __doc__ = _DOC.format(base="Conv3d")


class FixupJoin(Join):
    """``skip + scale * branch`` with one learnable number, first 1.

    Source:
        Zhang, Dauphin and Ma 2019, arXiv:1901.09321, section 4, rule 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def combine(self, branch: Tensor, skip: Tensor) -> Tensor:
        return skip + self.scale * branch


@torch.no_grad()
def fixup_init(model: nn.Module) -> None:
    """He's initialization, with the branches' convolutions scaled down by depth, their last and the classifier 0.

    Of L branches with m convolutions each: weights normal with variance 2 / fan-out, times ``L^(-1 / (2m - 2))`` in all
    convolutions of a branch but the last, which starts at 0. So does the classifier, with its bias. A branch is what a
    block with a join holds, in the order of its modules, without ``downsample``, the projection of its skip connection.

    Source:
        Zhang, Dauphin and Ma 2019, arXiv:1901.09321, section 4, rules 1 and 2; fan-out: its released code.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    blocks = [m for m in model.modules() if any(isinstance(child, FixupJoin) for child in m.children())]
    for block in blocks:
        branch = [
            m
            for name, m in block.named_modules()
            if isinstance(m, nn.modules.conv._ConvNd) and name.split(".")[0] != "downsample"
        ]
        for conv in branch[:-1]:
            conv.weight.mul_(len(blocks) ** (-1 / (2 * len(branch) - 2)))
        nn.init.zeros_(branch[-1].weight)
    if (name := classifier(model)) is not None:
        last = model.get_submodule(name)
        for p in last.parameters():
            nn.init.zeros_(p)


def fixup() -> Scheme:
    """Fixup: numbers before and behind convolutions and in each branch, and an initialization scaled by depth.

    As in the paper, post-activated blocks have a number before each convolution and each activation and one factor a
    branch. We differ in three places, none of which changes what a network can compute: the number behind a branch's
    last convolution stands before the factor and not behind it; the one before the classifier, which has a bias for
    each class, is left out; a projection has its own numbers, where the released networks share the branch's first.
    In pre-activated blocks, which the paper does not treat, the number before a block's first activation is the one
    that the stem and the branches before have added to the skip connection.
    """
    return Scheme(
        name="fixup",
        conv=(FixupConv1d, FixupConv2d, FixupConv3d),
        residual=partial(alike, join=FixupJoin),
        init=fixup_init,
        sources=("arXiv:1901.09321",),
    )
