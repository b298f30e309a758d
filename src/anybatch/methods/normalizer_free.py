"""Networks without normalization: the residual rule that keeps track of the signal's variance, and the whole scheme."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from anybatch.methods.activation_gain import ScaledActivation, activation_gain
from anybatch.methods.parameters import classifier
from anybatch.methods.residual import Join
from anybatch.methods.scaled_weight_standardization import EpsRule, sws
from anybatch.scheme import Scheme, check_flag, check_number


class NormalizerFreeJoin(Join):
    """``skip + alpha * gain * drop(branch)``, of a branch that takes ``x / beta``.

    beta is the standard deviation that ``x`` is expected to have when training starts, so that the branch takes
    variance 1; the branch keeps it, and what it adds has variance alpha² times the learnable number ``gain`` squared.
    Stochastic depth does not scale what it keeps, as in the released code.

    Args:
        alpha: Standard deviation of what a branch adds at gain 1.
        beta: Expected standard deviation of the block's input.
        gain: Where the learnable number starts; None for none, which is 1 for good.
        transition: Whether the block's skip connection is a projection.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 3; the number, its start at 0 and the order of operations:
        Brock et al. 2021, arXiv:2102.06171, section 3, and its released code.
    """

    scale_by_keep: ClassVar[bool] = False

    def __init__(self, alpha: float, beta: float, *, gain: float | None = 0.0, transition: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.transition = transition
        self.post_activated = False
        # Without dimensions, so that a product under autocast keeps the branch's dtype.
        self.gain = None if gain is None else nn.Parameter(torch.tensor(float(gain)))

    def prepare(self, x: Tensor) -> Tensor:
        return x if self.beta == 1 else x * (1 / self.beta)

    def combine(self, branch: Tensor, skip: Tensor) -> Tensor:
        return skip + (self.alpha if self.gain is None else self.alpha * self.gain) * branch

    def activation(self, act: nn.Module) -> nn.Module:
        """The activation, with its gain only behind a projection: other skips have passed a gained one already.

        Raises:
            ValueError: If it is not ReLU, the only one that changes nothing where the skip has passed it already.
        """
        plain = act.act if isinstance(act, ScaledActivation) else act
        if not isinstance(plain, nn.ReLU):
            raise ValueError(
                f"{type(plain).__name__} behind a residual block would shrink the skip connection again and again; "
                f"take act=relu, or a network of pre-activated blocks such as preact_resnet50"
            )
        self.post_activated = True
        return act.act if isinstance(act, ScaledActivation) and not self.transition else act  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta:.6g}, transition={self.transition}"


class BranchScale(nn.Module):
    """``alpha * gain * x`` at the end of a residual branch, where a network's own code adds the skip connection.

    What `NormalizerFreeJoin` does to its branch.

    Args:
        alpha: Standard deviation of what a branch of variance 1 adds at gain 1.
        gain: Where the learnable number starts; None for none, which is 1 for good.
    """

    def __init__(self, alpha: float, gain: float | None) -> None:
        super().__init__()
        self.alpha = alpha
        self.gain = None if gain is None else nn.Parameter(torch.tensor(float(gain)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.alpha if self.gain is None else self.alpha * self.gain) * x

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, learned={self.gain is not None}"


class NormalizerFreeRule:
    """Makes the joins of one network, one after another, and keeps the variance expected between blocks.

    Pre-activated blocks, as published: v is 1 behind the stem. A block divides by ``beta = sqrt(v)``. The skip of a
    block whose skip is a projection takes what its branch takes, so that it has variance 1 again: there v is set to 1.
    Then the branch adds: ``v + alpha²``.

    Post-activated blocks are our own case; the sources have none. Each block ends in the activation g of the sum,
    through which the skip connection passes again and again. With its gain there the signal would grow by the gain in
    each block, so only activations behind a stem or a projection have it, where the sum is normal. From block to block
    x then is ``g(x + alpha * z)``, z standard normal: for ReLU a random walk that is reflected at 0, whose variance
    stays near 1 where ``v + alpha²`` would grow: for alpha 0.2 it is 0.97, 0.95, 0.96 and 1.04 after 1, 3, 9 and 18
    blocks, where the nominal one would be 1.72. So beta is 1 there. The filters' zero mean removes the mean of x.
    Activations that shrink what passes them would let the signal fall, beta 1 or not (behind 9 blocks its variance is
    0.82 for GELU, 0.28 for SiLU, 0.16 for tanh), and are refused there.

    Both hold for gain 1, infinitely wide layers and independent inputs, and for padding as if it were none; at gain 0
    the variance in a stage stays as it begins. The published networks start at gain 0 and keep to the nominal variance
    all the same, which their authors found to train more stably.

    Args:
        blocks: Number of residual blocks.
        alpha: Standard deviation of what a branch adds at gain 1.
        skip_gain: Where each join's learnable number starts.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 3.

    >>> rule = NormalizerFreeRule(3)
    >>> [round(rule(transition).beta ** 2, 2) for transition in (True, False, True)]
    [1.0, 1.04, 1.08]
    """

    def __init__(self, blocks: int, *, alpha: float = 0.2, skip_gain: float | None = 1.0) -> None:
        self.blocks = blocks
        self.alpha = alpha
        self.skip_gain = skip_gain
        self.variance = 1.0
        """Expected of the next block's input."""
        self._made = 0
        self._last: NormalizerFreeJoin | None = None

    def __call__(self, transition: bool) -> NormalizerFreeJoin:
        if self._made >= self.blocks:
            raise ValueError(f"the rule was told of {self.blocks} residual blocks, and is asked for another join")
        self._count_last()
        join = NormalizerFreeJoin(self.alpha, math.sqrt(self.variance), gain=self.skip_gain, transition=transition)
        self._made += 1
        self._last = join
        return join

    def _count_last(self) -> None:
        """Bring the variance behind the last join, which knows by now what stands behind it."""
        if self._last is not None and not self._last.post_activated:
            self.variance = (1.0 if self._last.transition else self.variance) + self.alpha**2


@torch.no_grad()
def normalizer_free_init(model: nn.Module) -> None:
    """Convolutions and linear layers normal with variance 1 / fan-in, the classifier 0.01² instead; their biases 0.

    Scaled Weight Standardization removes the filters' size and mean anyway; transposed convolutions stay as they are.

    Source:
        Brock et al. 2021, arXiv:2102.06171, appendix C, and its released code.
    """
    last = classifier(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.modules.conv._ConvNd) and not module.transposed):
            nn.init.normal_(module.weight, std=0.01 if name == last else module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def nf(
    alpha: float = 0.2,
    act: str = "relu",
    *,
    skip_gain: float | None = 1.0,
    released: bool = False,
    fold_gain: bool = False,
    eps_rule: EpsRule = "max",
) -> Scheme:
    """Networks without normalization: Scaled WS, activations times their gain, branches scaled by alpha and beta.

    Args:
        alpha: Standard deviation of what a branch adds to the signal at skip gain 1.
        act: The activation, by name.
        skip_gain: Where the learnable number of each branch starts. The published networks start it at 0, and have it
            in their own scheme; for short runs and small learning rates, in which AGC hardly lets a number leave 0,
            and in differentially private training it starts at 1. None for no such number, as in most of timm's.
        released: Whether gains of activations are the constants of DeepMind's release, to load its weights.
        fold_gain: Whether the gain multiplies every filter, the stem's too, in place of the activations, to load timm's
            weights of all but the ``dm_nfnet`` networks.
        eps_rule: Of Scaled WS: ``"add"`` (with its eps 1e-5) to load timm's weights.
    """
    check_number("alpha", alpha)
    if skip_gain is not None:
        check_number("skip_gain", skip_gain)
    check_flag("released", released)
    check_flag("fold_gain", fold_gain)
    gain = activation_gain(act, released=released)
    return Scheme(
        name="nf",
        conv=sws(gamma=gain if fold_gain else 1.0, eps=1e-5 if eps_rule == "add" else 1e-4, eps_rule=eps_rule).conv,
        act=partial(ScaledActivation, act, gain=1.0 if fold_gain else gain),
        residual=partial(NormalizerFreeRule, alpha=alpha, skip_gain=skip_gain),
        init=normalizer_free_init,
        sources=("arXiv:2101.08692", "arXiv:2102.06171"),
    )
