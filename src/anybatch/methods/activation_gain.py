"""The gain of a nonlinearity, by which its output keeps the variance of a standard normal input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.suggest import unknown

Elementwise = Callable[[Tensor], Tensor]

NONLINEARITIES: dict[str, Callable[[], Elementwise]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "erf": lambda: torch.erf,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "hardshrink": nn.Hardshrink,
    "hardtanh": nn.Hardtanh,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "log_sigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "quick_gelu": lambda: _quick_gelu,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "relu_squared": lambda: _relu_squared,
    "rrelu": lambda: nn.RReLU().eval(),
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "sin": lambda: torch.sin,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
}
"""Nonlinearities by name, as torch makes them without arguments; `_` and capitals in a name do not matter."""

ALIASES = {"linear": "identity", "none": "identity", "swish": "silu", "hswish": "hard_swish", "relu2": "relu_squared"}

RELEASED = {
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "gelu_tanh": 1.7015043497085571,  # the release's GELU is the tanh form
    "glu": 1.8484294414520264,
    "identity": 1.0,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "softplus": 1.9203323125839233,
    "softsign": 2.338853120803833,
    "tanh": 1.5939117670059204,
}
"""The constants of DeepMind's release (deepmind-research, nfnets/base.py), which it estimated from random numbers."""

_NOT_ELEMENTWISE = ("glu", "log_softmax", "softmax")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _known(name: str, table: dict[str, float] | dict[str, Callable[[], Elementwise]]) -> str:
    """The name under which the table holds what this name means."""
    spelled = {_plain(known): known for known in table}
    spelled |= {alias: known for alias, known in ALIASES.items() if known in table}
    if (key := _plain(name)) not in spelled:
        if key in map(_plain, _NOT_ELEMENTWISE):
            raise ValueError(
                f"act={name!r} does not act on each element alone, so that no gain of it can be computed; the release "
                f"has constants for glu and log_softmax: released=True"
            )
        raise unknown("nonlinearity", name, table)
    return spelled[key]


def nonlinearity(act: str | Elementwise) -> Elementwise:
    """The nonlinearity that a name means, new each time; anything else comes back as it is.

    Raises:
        ValueError: If the name is unknown (the nearest are named).
    """
    return NONLINEARITIES[_known(act, NONLINEARITIES)]() if isinstance(act, str) else act


def activation_gain(act: str | Elementwise, *, released: bool = False) -> float:
    """The gain of a nonlinearity g: ``1 / sqrt(Var[g(z)])``, z standard normal.

    ``gain * g`` turns standard normal input into output of variance 1; for ReLU it is ``sqrt(2 / (1 - 1 / pi))``.
    Computed by quadrature in float64, to a relative 1e-9 or better: panels are halved until they settle, wherever g
    has a kink or a jump.

    Args:
        act: A name (``"relu"``, ``"silu"`` or ``"swish"``, ``"gelu"``, ``"gelu_tanh"``, ...; with torch's default
            arguments), a module (taken in evaluation mode, with its present parameters), or any function that acts on
            each element alone and keeps float64.
        released: Give the constant of DeepMind's release instead, by name, to load weights that were trained with it.
            Those were estimated from random numbers and are up to 0.1 % larger. ``"glu"`` and ``"log_softmax"``,
            which are not elementwise, have only these.

    Returns:
        The gain, above 0.

    Raises:
        ValueError: If a name is unknown (the nearest are named) or has no constant in the release; if the function
            does not act on each element alone, is random, loses precision, or is constant or not finite, or if its
            output has no finite variance.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 4, which defines the gain and gives ReLU's; constants of
        the release: deepmind-research, nfnets/base.py.

    >>> round(activation_gain("relu"), 10), round(activation_gain("swish", released=True), 4)
    (1.7128585504, 1.7881)
    """
    if released:
        if not isinstance(act, str):
            raise ValueError(f"the released constants go by name, got act={act!r}; known: {', '.join(RELEASED)}")
        return RELEASED[_known(act, RELEASED)]
    with torch.device("cpu"):  # also where a network is built without values, under torch.device("meta")
        return _named_gain(_known(act, NONLINEARITIES)) if isinstance(act, str) else _gain(act)


@cache
def _named_gain(name: str) -> float:
    return _gain(NONLINEARITIES[name]())


@torch.no_grad()
def _gain(act: Elementwise) -> float:
    made = copy.deepcopy(act).to("cpu", torch.float64).eval() if isinstance(act, nn.Module) else act

    def g(z: Tensor) -> Tensor:
        return made(z.clone())  # it may work in place

    _check_elementwise(g, act)
    scale = math.sqrt(_expected(lambda z: g(z).square(), act))
    mean = _expected(g, act)
    # In two passes: the mean may be far larger than what varies about it.
    variance = _expected(lambda z: (g(z) - mean).square(), act)
    if variance <= (1e-13 * scale) ** 2:
        raise ValueError(f"act={act!r} is constant, so that no gain gives its output a variance of 1")
    return variance**-0.5


def _check_elementwise(g: Elementwise, act: Elementwise) -> None:
    """Raise a `ValueError` unless g keeps shape and float64, and gives an element the same alone and among others."""
    x = torch.linspace(-3, 3, 2 * 6 * 4 * 4, dtype=torch.float64).reshape(2, 6, 4, 4)
    some = x[1:, 1:4, ::2, 1:2]
    try:
        y, y_some = g(x), g(some)
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"act={act!r} does not take one tensor of any shape: {error}") from None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"act={act!r} does not act on each element alone: it turns {tuple(x.shape)} into {got}")
    if y.dtype != torch.float64:
        raise ValueError(f"act={act!r} turns float64 into {y.dtype}, too coarse to compute its gain")
    if not torch.allclose(y[1:, 1:4, ::2, 1:2], y_some, rtol=1e-12, atol=1e-12, equal_nan=True):
        raise ValueError(f"act={act!r} does not act on each element alone, or is random")


# Clenshaw and Curtis's rule: it looks at both ends of a panel, so that a kink or jump near an end is not overlooked.
_INTERVALS = 16
_REACH = 14.0  # the normal density there is 1e-43
_PANELS = 112  # edges at all multiples of a quarter
_TOLERANCE = 1e-13
_HALVINGS = 60


@cache
def _rule() -> tuple[Tensor, Tensor]:
    """Points and weights on [-1, 1]."""
    n = _INTERVALS
    k = torch.arange(n + 1, dtype=torch.float64)
    j = torch.arange(1, n // 2 + 1, dtype=torch.float64)
    b = torch.where(j == n // 2, 1.0, 2.0).double()
    weights = 1 - (b / (4 * j**2 - 1) * torch.cos(2 * math.pi / n * k[:, None] * j)).sum(1)
    weights = weights * torch.where((k == 0) | (k == n), 1.0, 2.0) / n
    return torch.cos(math.pi / n * k), weights


def _expected(f: Elementwise, act: Elementwise) -> float:
    """The mean of f(z), z standard normal."""
    points, weights = _rule()

    def integrals(middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        """Over each panel, of f times the density and of its absolute value."""
        z = middle[:, None] + half[:, None] * points
        y = f(z.flatten()).reshape(z.shape) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        if not y.isfinite().all():
            where = z[~y.isfinite()][0].item()
            raise ValueError(f"act={act!r} is not finite at {where:.4g}")
        return half * (y @ weights), half * (y.abs() @ weights)

    edges = torch.linspace(-_REACH, _REACH, _PANELS + 1, dtype=torch.float64)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    value, size = integrals(middle, half)
    total = size.sum().item()
    if total > 0 and (size[0] + size[-1]).item() > 1e-10 * total:
        raise ValueError(f"act={act!r} grows so fast that its output has no finite variance")
    settled = 0.0
    for _ in range(_HALVINGS):
        middle, half = torch.cat((middle - half / 2, middle + half / 2)), torch.cat((half, half)) / 2
        finer = integrals(middle, half)[0]
        left, right = finer.chunk(2)
        rough = (left + right - value).abs() > _TOLERANCE * total
        settled += (left + right)[~rough].sum().item()
        if not rough.any():
            return settled
        if rough.sum() > 4096:
            break
        rough = rough.repeat(2)
        middle, half, value = middle[rough], half[rough], finer[rough]
    raise ValueError(f"act={act!r} is too rough, or computes too coarsely, to integrate")


class ScaledActivation(nn.Module):
    """A nonlinearity times its gain: ``gain * act(x)``, variance 1 for standard normal input.

    Never in place, since in a pre-activated block the skip connection needs the input too: a module that works in
    place is copied and set not to.

    Args:
        act: As in `anybatch.functional.activation_gain`.
        gain: The factor; None for the gain of ``act``.
        released: Whether that is the constant of DeepMind's release, for ``act`` given by name.

    Shape:
        Any, kept.

    Raises:
        ValueError: As `anybatch.functional.activation_gain` does.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 4. The paper multiplies the filter, the release the
        activation; we follow the release, so that the stem's convolution, before which there is no activation, is
        not scaled.

    >>> ScaledActivation("silu")
    ScaledActivation(
      gain=1.7871872221004417
      (act): SiLU()
    )
    """

    def __init__(self, act: str | Elementwise = "relu", *, gain: float | None = None, released: bool = False) -> None:
        super().__init__()
        self.gain = activation_gain(act, released=released) if gain is None else gain
        made = nonlinearity(act)
        if getattr(made, "inplace", False):
            made = copy.deepcopy(made)
            made.inplace = False  # pyright: ignore[reportFunctionMemberAccess]
        self.act = made

    def forward(self, x: Tensor) -> Tensor:
        if type(self.act) is nn.ReLU and self.gain > 0:
            # The same to the last bit, and ReLU keeps for backward the very tensor that the next layer keeps.
            return self.act(self.gain * x)
        return self.gain * self.act(x)

    def extra_repr(self) -> str:
        name = "" if isinstance(self.act, nn.Module) else f"act={getattr(self.act, '__name__', self.act)}, "
        return f"{name}gain={self.gain}"
