"""How a signal's size goes through a network's blocks, and a gradient's back."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anybatch.methods.kn_conv import _KNConv
from anybatch.methods.normalizer_free import NormalizerFreeJoin
from anybatch.methods.residual import Join
from anybatch.probe.asleep import asleep
from anybatch.probe.layers import CONVS, FILTERS, scope_of
from anybatch.probe.result import Finding, Result, Table, few, many
from anybatch.probe.subject import Loss, Mode, Subject, loss_of, probing, seeing, still
from anybatch.scheme import check_number

_BLOCK = re.compile("Block|Bottleneck|InvertedResidual|_DenseLayer|MBConv|Transition")
_SKIPS = ("downsample", "shortcut", "skip", "proj_skip")
APART = 0.25
"""A share by which a variance may miss the expected one."""
SHIFTED = 3
"""A ratio of squared mean and variance from which samples count as alike; that of ReLU's output is 0.5."""
BEFORE = "(before)"
"""The name of what feeds the first block."""
STEEP = 1e3
"""A ratio of gradients, or of variances, between blocks from which they count as exploding or vanishing."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The signal behind one block. Moments are of each channel over samples and positions, averaged over channels."""

    name: str
    squared_mean: float
    """Average channel squared mean."""
    variance: float
    """Average channel variance, biased."""
    residual_variance: float | None
    """Of what the residual branch gives, before stochastic depth and any factor; None where there is no branch."""
    expected: float | None
    """The variance by the bookkeeping of a normalizer-free scheme, whose branches' gains are 1; None for others."""
    expected_at_gain: float | None
    """The same, at the gains that the branches have."""
    gradient: float
    """Norm of the loss's gradient with respect to what the block gives."""
    weight_gradient: float | None
    """Norm of the gradient of the block's parameters; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class SignalPropagation(Result):
    """What `signal_propagation` found."""

    title: ClassVar[str] = "Signal propagation"

    blocks: tuple[Block, ...]
    """In the order in which they are called; the first is what feeds the first residual block, where there is one."""

    def table(self) -> Table:
        head = ("block", "squared mean", "variance", "residual variance", "expected", "at its gains", "gradient")
        rows = tuple(
            (b.name, b.squared_mean, b.variance, b.residual_variance, b.expected, b.expected_at_gain, b.gradient)
            for b in self.blocks
        )
        return Table(
            (*head, "weights' gradient"),
            tuple((*row, b.weight_gradient) for row, b in zip(rows, self.blocks, strict=True)),
        )


def signal_propagation(
    model: nn.Module,
    x: Any,
    labels: Tensor | None = None,
    *,
    blocks: Sequence[str] | None = None,
    mode: Mode = "training",
    gain: float | None = None,
    loss: Loss | None = None,
) -> SignalPropagation:
    """Measure the signal behind each block going forward, and the gradient of the loss going back.

    Squared mean, variance and residual variance are the three statistics of signal propagation plots; for networks
    without normalization the variance that their bookkeeping expects stands beside them. Random layers, such as
    dropout, are in evaluation. The model is unchanged afterwards. Of torchvision's detectors the backbone is probed.

    Args:
        model: Any model that takes one tensor, or one of torchvision's detectors.
        x: (N, *), standard normal as in the sources, or real images.
        labels: (N,) or (N, *), classes; None for a random target.
        blocks: Names of modules, with ``*`` for any letters; None for the residual blocks, or where there are none,
            for convolutions and linear layers.
        mode: ``"training"`` or ``"evaluation"``.
        gain: Give every branch's learnable number this value while measuring: sources measure at 1. None leaves it.
        loss: As of `split_invariance`.

    Raises:
        ValueError: If ``blocks`` names nothing in the model, or the model does not take the samples.

    Source:
        Brock, De and Smith 2021, arXiv:2101.08692, section 3; where the residual variance is taken: its released code.
    """
    if mode not in ("training", "evaluation"):
        raise ValueError(f"mode={mode!r} is neither 'training' nor 'evaluation'")
    if gain is not None:
        check_number("gain", gain)
    with probing(model, x, labels) as subject:
        if gain is not None:
            with torch.no_grad():
                for module in subject.model.modules():
                    if isinstance(module, Join) and isinstance(own := getattr(module, "gain", None), Tensor):
                        own.fill_(gain)
        if mode == "training":
            still(subject, subject.x)
        else:
            subject.set_mode(mode)
        names = _named(subject.model, blocks)
        found = _measured(subject, names, loss)
        sleep = asleep(subject.model)
    return SignalPropagation(blocks=tuple(found), findings=tuple(_findings(found, sleep)))


def _named(model: nn.Module, asked: Sequence[str] | None) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    if asked is not None:
        patterns = [asked] if isinstance(asked, str) else list(asked)
        missing = [p for p in patterns if not fnmatch.filter(names, p)]
        if missing or not patterns:
            raise ValueError(f"blocks={missing or patterns!r} name no module; modules are {few(names, 12)}")
        return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    blocks = [name for name in names if _is_block(model.get_submodule(name))]
    inner = [n for n in blocks if not any(other.startswith(f"{n}.") for other in blocks)]
    found = inner or [name for name in names if isinstance(model.get_submodule(name), FILTERS)]
    if not found:
        raise ValueError(f"{type(model).__name__} holds no blocks, convolutions or linear layers to measure behind")
    return found


def _is_block(module: nn.Module) -> bool:
    """Whether it looks like a block: by a join, by a place for a projection, or by its class's name."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or not any(True for _ in module.children()):
        return False
    joins = any(isinstance(child, Join) for child in module.children())
    named = _BLOCK.search(type(module).__name__) is not None
    return joins or named or any(hasattr(module, skip) for skip in _SKIPS)


class _Branch:
    """What a block's residual branch gives, seen while the block runs."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self.block, self.name = block, name
        self.given: Tensor | None = None
        self.join: Join | None = next((m for m in block.children() if isinstance(m, Join)), None)
        skips = tuple(f"{skip}." for skip in _SKIPS)
        self.layers = [
            inner
            for inner, m in block.named_modules()
            if inner and (scope_of(m) is not None or isinstance(m, FILTERS)) and not f"{inner}.".startswith(skips)
            if not isinstance(m, Join)
        ]

    @property
    def watched(self) -> list[str]:
        if self.join is None or self.join.inside:
            inner = self.layers
        else:
            inner = [n for n, m in self.block.named_modules() if m is self.join]
        return [f"{self.name}.{n}" for n in inner]

    @torch.no_grad()
    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Join):
            self.given = args[0].detach().clone()
        elif isinstance(module, _KNConv) and len(args) > 1:  # which adds the skip connection itself
            kept, module.activation = module.activation, "none"
            self.given = module.forward(args[0].detach())
            module.activation = kept
        elif isinstance(output, Tensor) and self.join is None:
            self.given = output.detach().clone()


def _measured(subject: Subject, names: list[str], loss: Loss | None) -> list[Block]:
    model = subject.model
    branches = {name: _Branch(model.get_submodule(name), name) for name in names}
    branches = {name: b for name, b in branches.items() if _is_block(b.block)}
    kept: dict[str, tuple[Tensor, float, float]] = {}
    first: list[tuple[Tensor, float, float]] = []

    def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not (first or kept) and name in branches and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            first.append((args[0], *_moments(args[0], module)))

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and output.requires_grad:
            kept[name] = (output, *_moments(output, module))

    def inside(name: str, *call: Any) -> None:
        owner = next(owner for owner in branches if name.startswith(f"{owner}."))
        branches[owner].see(name, *call)

    watched = [inner for branch in branches.values() for inner in branch.watched]
    with seeing(model, names, leave, before=enter), seeing(model, watched, inside):
        value = loss_of(subject, subject.run(subject.x), subject.labels, loss)
    if not kept:
        raise ValueError(f"none of {few(names)} gives a tensor with a gradient; name others in blocks=")
    if first:
        kept = {BEFORE: first[0], **kept}
    weights = {name: [p for p in _module(model, name).parameters() if p.requires_grad] for name in kept}
    asked = [tensor for tensor, _, _ in kept.values()] + [p for ps in weights.values() for p in ps]
    grads = iter(torch.autograd.grad(value, asked, allow_unused=True))
    back = {name: _norm([next(grads)]) for name in kept}
    found, expected, at_gain = [], None, None
    for name, (tensor, squared_mean, variance) in kept.items():
        branch = branches.get(name)
        own = [next(grads) for _ in weights[name]]
        if branch is not None and isinstance(branch.join, NormalizerFreeJoin):
            expected, at_gain = _expected(branch.join, 1.0 if at_gain is None else at_gain)
        given = None if branch is None else branch.given
        same = given is not None and given.shape == tensor.shape
        residual = _moments(given, branch.block)[1] if same and given is not None and branch is not None else None
        found.append(
            Block(
                name=name,
                squared_mean=squared_mean,
                variance=variance,
                residual_variance=residual,
                expected=expected,
                expected_at_gain=at_gain,
                gradient=back[name],
                weight_gradient=_norm(own) if own else None,
            )
        )
    return found


def _module(model: nn.Module, name: str) -> nn.Module:
    return nn.Module() if name == BEFORE else model.get_submodule(name)


def _expected(join: NormalizerFreeJoin, at_gain: float) -> tuple[float | None, float | None]:
    """The variance behind a join: at gain 1, as it is counted, and at the gain that it has."""
    if join.post_activated:
        return None, None  # a reflected random walk, which keeps near 1
    gain = 1.0 if join.gain is None else join.gain.item()
    nominal = 1.0 if join.transition else join.beta**2
    return nominal + join.alpha**2, (1.0 if join.transition else at_gain) + (join.alpha * gain) ** 2


@torch.no_grad()
def _moments(t: Tensor, module: nn.Module) -> tuple[float, float]:
    """Average channel squared mean and variance, in float64, of what a module gives or takes."""
    wide, channels = t.detach().double(), _channels(t, module)
    dims = tuple(d for d in range(wide.dim()) if d != channels)
    var, mean = torch.var_mean(wide, dims, correction=0)
    return float(mean.square().mean()), float(var.mean())


def _channels(t: Tensor, module: nn.Module) -> int:
    """The dimension of channels: 1, or the last of tokens (N, L, C) and maps (N, H, W, C), as layers inside tell."""
    inner = list(module.modules())
    if t.dim() < 3 or any(isinstance(m, CONVS) and t.shape[1] in (m.in_channels, m.out_channels) for m in inner):
        return 1
    widths = {m.out_features for m in inner if isinstance(m, nn.Linear)}
    widths |= {m.normalized_shape[-1] for m in inner if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    return t.dim() - 1 if t.shape[-1] in widths else 1


def _norm(grads: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))


def _findings(found: list[Block], sleep: list[Finding]) -> list[Finding]:
    told = []
    variances = [b.variance for b in found]
    if not all(map(math.isfinite, [*variances, *(b.gradient for b in found)])):
        return [
            Finding(
                "fault",
                "The signal, or its gradient, is not finite.",
                "start from a smaller learning rate, or from weights and inputs that are finite.",
            )
        ]
    rise = max(variances) / max(min(variances), 1e-300)
    if rise > STEEP:
        what = "grows" if variances.index(max(variances)) > variances.index(min(variances)) else "falls"
        told.append(
            Finding(
                "fault",
                f"The signal's variance {what} by {rise:.2g} between blocks, from {variances[0]:.2g} to "
                f"{variances[-1]:.2g}.",
                "take a scheme that keeps it: a norm, or nf with its bookkeeping in place of plain sums.",
            )
        )
    else:
        told.append(
            Finding("good", f"The signal's variance stays between {min(variances):.2g} and {max(variances):.2g}.")
        )
    gradients = [b.gradient for b in found if b.gradient > 0]
    if not gradients:
        told.append(
            Finding("fault", "No gradient reaches a block.", "see whether the classifier starts at 0, or is detached.")
        )
    elif max(gradients) / min(gradients) > STEEP:
        told.append(
            Finding(
                "fault",
                f"Gradients differ by {max(gradients) / min(gradients):.2g} between blocks.",
                "add a norm, shorten branches by a SkipInit number, or clip gradients (nf+agc).",
            )
        )
    else:
        told.append(
            Finding("good", f"Gradients differ by {max(gradients) / min(gradients):.2g} between blocks at most.")
        )
    shifted = [b for b in found if b.name != BEFORE and b.squared_mean > SHIFTED * max(b.variance, 1e-12)]
    if shifted:
        told.append(
            Finding(
                "warning",
                f"Squared means of channels are over {SHIFTED} times their variance behind "
                f"{many(len(shifted), 'block')} ({few([b.name for b in shifted])}): all samples look alike there.",
                "standardize filters (ws, or sws in nf networks), which cancels a common mean.",
            )
        )
    known = [(b, b.expected_at_gain) for b in found if b.expected_at_gain is not None]
    missed = [b for b, v in known if abs(b.variance / v - 1) > APART]
    if missed:
        told.append(
            Finding(
                "warning",
                f"The variance behind {len(missed)} of {many(len(known), 'block')} is over {100 * APART:.0f} % off "
                f"what the bookkeeping expects ({few([b.name for b in missed])}), so that branches take a signal of "
                f"another size than 1.",
                "measure on inputs of mean 0 and variance 1; padding of small maps takes variance, and so do pooled "
                "shortcuts, to which pool_gain=2 gives it back on noise.",
            )
        )
    elif known:
        told.append(Finding("good", "The variance is what the bookkeeping expects, block by block."))
    moved = [b for b, v in known if b.expected is not None and abs(b.expected - v) > 0.02]
    if moved and not sleep:
        told.append(
            Finding(
                "note", "Branches' gains are not 1, so that the variance is not the nominal one; gain=1 measures at 1."
            )
        )
    return [*told, *sleep]
