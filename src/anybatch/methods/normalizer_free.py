"""Networks without normalization: the residual rule that keeps track of the signal's variance, and the whole scheme."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from anybatch.methods.activation_gain import ScaledActivation, activation_gain, nonlinearity
from anybatch.methods.parameters import classifier
from anybatch.methods.residual import Join
from anybatch.methods.scaled_weight_standardization import EpsRule, sws
from anybatch.methods.stochastic_depth import StochasticDepth, check_probability
from anybatch.scheme import Scheme, check_flag, check_number


class NormalizerFreeJoin(Join):
    """``skip + alpha * gain * drop(branch)``, of a branch that takes ``x / beta``.

    beta is the standard deviation that ``x`` is expected to have when training starts, so that the branch takes
    variance 1; the branch keeps it, and what it adds has variance alpha² times the learnable number ``gain`` squared.

    Args:
        alpha: Standard deviation of what a branch adds at gain 1.
        beta: Expected standard deviation of the block's input.
        gain: Where the learnable number starts.
        drop_path: Probability to leave the branch out for a sample in training.
        scale_by_keep: As in `StochasticDepth`.
        transition: Whether the block's skip connection is a projection.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 3; the number, its start at 0 and the order of operations:
        Brock et al. 2021, arXiv:2102.06171, section 3, and its released code.
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        *,
        gain: float = 0.0,
        drop_path: float = 0.0,
        scale_by_keep: bool = False,
        transition: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.transition = transition
        self.post_activated = False
        # Without dimensions, so that a product under autocast keeps the branch's dtype.
        self.gain = nn.Parameter(torch.tensor(float(gain)))
        self.drop = StochasticDepth(drop_path, scale_by_keep=scale_by_keep) if drop_path else None

    def prepare(self, x: Tensor) -> Tensor:
        return x if self.beta == 1 else x * (1 / self.beta)

    def forward(self, branch: Tensor, skip: Tensor) -> Tensor:
        if self.drop is not None:
            branch = self.drop(branch)
        return skip + (self.alpha * self.gain) * branch

    def activation(self, act: nn.Module) -> nn.Module:
        """The activation, with its gain only behind a projection: other skips have passed a gained one already."""
        self.post_activated = True
        return act.act if isinstance(act, ScaledActivation) and not self.transition else act  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta:.6g}, transition={self.transition}"


class NormalizerFreeRule:
    """Makes the joins of one network, one after another, and keeps the variance expected between blocks.

    Pre-activated blocks, as published: v is 1 behind the stem. A block divides by ``beta = sqrt(v)``. The skip of a
    block whose skip is a projection takes what its branch takes, so that it has variance 1 again: there v is set to 1.
    Then the branch adds: ``v + alpha²``.

    Post-activated blocks are our own case; the sources have none. Each block ends in the activation g of the
    sum, through which the skip connection passes again and again. With the gain gamma of the paper there, it would grow
    by gamma in each block, so only activations behind a stem or a projection, where the sum is normal, have it: there x
    is ``gamma * g(s)``, s normal of variance ``1 + alpha²`` (1 behind the stem). From block to block it then is
    ``g(x + alpha * z)``, z standard normal: for ReLU a random walk that is reflected at 0. Its variance does not grow
    by alpha²: half of x starts at 0, whence it can only rise, which makes x less varied before the steps add up. At
    alpha 0.2, with 1 at the start, it is 0.97, 0.96 and 0.95 after one, two and three blocks, 0.96 after nine and 1.04
    after 18, where ``v + alpha²`` would give 1.72. `Spread` computes this walk's variance for any g, and beta is its
    root. The filters' zero mean removes the mean of x, which is the same in all channels.

    Both hold for gain 1, infinitely wide layers and independent inputs, and for padding as if it were none; at the
    start, with gain 0, the variance in a stage stays as it begins. The published networks keep to the nominal variance
    all the same, which their authors found to train more stably.

    Args:
        blocks: Number of residual blocks.
        alpha: Standard deviation of what a branch adds at gain 1.
        act: The activation, by name.
        act_gain: Its gain.
        skip_gain: Where each join's learnable number starts.
        drop_path: Rate of stochastic depth; block i of n, from 0, drops with probability ``drop_path * i / n``.
        scale_by_keep: As in `StochasticDepth`.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 3; rates of stochastic depth: the released code of
        arXiv:2102.06171.

    >>> rule = NormalizerFreeRule(3)
    >>> [round(rule(transition).beta ** 2, 2) for transition in (True, False, True)]
    [1.0, 1.04, 1.08]
    """

    def __init__(
        self,
        blocks: int,
        *,
        alpha: float = 0.2,
        act: str = "relu",
        act_gain: float | None = None,
        skip_gain: float = 0.0,
        drop_path: float = 0.0,
        scale_by_keep: bool = False,
    ) -> None:
        self.blocks = blocks
        self.alpha = alpha
        self.act = act
        self.act_gain = activation_gain(act) if act_gain is None else act_gain
        self.skip_gain = skip_gain
        self.drop_path = drop_path
        self.scale_by_keep = scale_by_keep
        self.variance = 1.0
        """Expected of the next block's input."""
        self._made = 0
        self._last: NormalizerFreeJoin | None = None
        self._spread: Spread | None = None

    def __call__(self, transition: bool) -> NormalizerFreeJoin:
        if self._made >= self.blocks:
            raise ValueError(f"the rule was told of {self.blocks} residual blocks, and is asked for another join")
        self._count_last()
        join = NormalizerFreeJoin(
            self.alpha,
            math.sqrt(self.variance),
            gain=self.skip_gain,
            drop_path=self.drop_path * self._made / self.blocks,
            scale_by_keep=self.scale_by_keep,
            transition=transition,
        )
        self._made += 1
        self._last = join
        return join

    def _count_last(self) -> None:
        """Bring the variance behind the last join, which knows by now what stands behind it."""
        last = self._last
        if last is None:
            return
        if not last.post_activated:
            self.variance = (1.0 if last.transition else self.variance) + self.alpha**2
            return
        g = nonlinearity(self.act)
        g = g.double().eval() if isinstance(g, nn.Module) else g
        if last.transition:
            self._spread = Spread.normal(lambda s: self.act_gain * g(s), math.sqrt(1 + self.alpha**2))
        else:
            before = self._spread or Spread.normal(lambda s: self.act_gain * g(s), 1.0)  # behind the stem
            self._spread = before.step(g, self.alpha)
        self.variance = self._spread.variance


class Spread:
    """How the values of a signal are distributed: a mass on each point of a grid.

    Args:
        mass: For each point of `POINTS`; the sum is 1.
    """

    SPACING = 1 / 32
    POINTS = torch.arange(-8 * 32, 24 * 32 + 1, dtype=torch.float64) / 32  # exact in float64, 0 among them
    # The middles of 64 slices of the normal distribution that are equally likely, at variance 1.
    NORMAL = torch.special.ndtri((torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    NORMAL = NORMAL / NORMAL.square().mean().sqrt()

    def __init__(self, mass: Tensor) -> None:
        self.mass = mass

    @classmethod
    @torch.no_grad()
    def normal(cls, g: Callable[[Tensor], Tensor], std: float) -> Spread:
        """Of ``g(s)``, s normal with mean 0."""
        slices = 4096
        s = std * torch.special.ndtri((torch.arange(slices, dtype=torch.float64) + 0.5) / slices)
        return cls(cls._deposit(g(s), torch.full_like(s, 1 / slices)))

    @torch.no_grad()
    def step(self, g: Callable[[Tensor], Tensor], alpha: float) -> Spread:
        """Of ``g(x + alpha * z)``, z standard normal."""
        values = g(self.POINTS[:, None] + alpha * self.NORMAL)
        return Spread(
            self._deposit(values.flatten(), (self.mass[:, None] / len(self.NORMAL)).expand_as(values).flatten())
        )

    @classmethod
    def _deposit(cls, values: Tensor, mass: Tensor) -> Tensor:
        """Masses at values between points are shared by both, so that their mean stays."""
        place = ((values - cls.POINTS[0]) / cls.SPACING).clamp(0, len(cls.POINTS) - 1.001)
        left = place.long()
        share = place - left
        on_grid = torch.zeros_like(cls.POINTS)
        return on_grid.index_add(0, left, mass * (1 - share)).index_add(0, left + 1, mass * share)

    @property
    def variance(self) -> float:
        mean = (self.mass * self.POINTS).sum()
        return (self.mass * (self.POINTS - mean).square()).sum().item()


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
    skip_gain: float = 0.0,
    drop_path: float = 0.0,
    scale_by_keep: bool = False,
    released: bool = False,
    eps_rule: EpsRule = "max",
) -> Scheme:
    """Networks without normalization: Scaled WS, activations times their gain, branches scaled by alpha and beta.

    Args:
        alpha: Standard deviation of what a branch adds to the signal at skip gain 1.
        act: The activation, by name.
        skip_gain: Where the learnable number of each branch starts; differentially private training starts it at 1.
        drop_path: Rate of stochastic depth in the last block; it grows from 0 in the first.
        scale_by_keep: Whether stochastic depth divides by the probability to keep, as timm does and the release not.
        released: Whether gains of activations are the constants of DeepMind's release, to load its weights.
        eps_rule: Of Scaled WS: ``"add"`` (with its eps 1e-5) to load timm's weights.
    """
    check_number("alpha", alpha)
    check_number("skip_gain", skip_gain)
    check_probability("drop_path", drop_path)
    check_flag("scale_by_keep", scale_by_keep)
    check_flag("released", released)
    gain = activation_gain(act, released=released)
    return Scheme(
        name="nf",
        conv=sws(eps=1e-5 if eps_rule == "add" else 1e-4, eps_rule=eps_rule).conv,
        act=partial(ScaledActivation, act, gain=gain),
        residual=partial(
            NormalizerFreeRule,
            alpha=alpha,
            act=act,
            act_gain=gain,
            skip_gain=skip_gain,
            drop_path=drop_path,
            scale_by_keep=scale_by_keep,
        ),
        init=normalizer_free_init,
        sources=("arXiv:2101.08692", "arXiv:2102.06171"),
    )
