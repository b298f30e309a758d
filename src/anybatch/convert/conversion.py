"""A finished BatchNorm network brought to another scheme, with what it has learned."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import nn

from anybatch.convert.batches import Batch, check_takes, evaluating, taken, together
from anybatch.convert.calibrate import drift, fit_norms, measure_branches
from anybatch.convert.distill import match_outputs
from anybatch.convert.fold import copied, ready
from anybatch.convert.heads import fit_heads
from anybatch.convert.offsets import OFFSET
from anybatch.convert.out_of_place import make_out_of_place, overwrites
from anybatch.convert.places import Place, held
from anybatch.convert.plan import Plan, Planner
from anybatch.convert.private import check_private, make_private
from anybatch.convert.report import ConversionReport, advice
from anybatch.convert.target import Target
from anybatch.methods.group_norm import Groups
from anybatch.scheme import Scheme, check_number

Tell = Callable[[str, int, int], object]
"""Called with the phase, what is done of it and what there is to do."""


@dataclass(frozen=True)
class Learned:
    """What data told."""

    residuals: dict[str, float]
    heads: tuple[str, ...]
    drift: float | None


@overload
def convert_batchnorm(
    model: nn.Module,
    to: str | Scheme = "ws+gn",
    *,
    calibrate: Iterable[Any] | None = None,
    exclude: str | Sequence[str] = (),
    groups: Groups | Mapping[str, int] = "auto",
    dp: bool = False,
    inplace: bool = False,
    distill: int = 0,
    offset: float = OFFSET,
    return_report: Literal[False] = False,
    tell: Tell | None = None,
) -> nn.Module: ...


@overload
def convert_batchnorm(
    model: nn.Module,
    to: str | Scheme = "ws+gn",
    *,
    calibrate: Iterable[Any] | None = None,
    exclude: str | Sequence[str] = (),
    groups: Groups | Mapping[str, int] = "auto",
    dp: bool = False,
    inplace: bool = False,
    distill: int = 0,
    offset: float = OFFSET,
    return_report: Literal[True],
    tell: Tell | None = None,
) -> tuple[nn.Module, ConversionReport]: ...


def convert_batchnorm(
    model: nn.Module,
    to: str | Scheme = "ws+gn",
    *,
    calibrate: Iterable[Any] | None = None,
    exclude: str | Sequence[str] = (),
    groups: Groups | Mapping[str, int] = "auto",
    dp: bool = False,
    inplace: bool = False,
    distill: int = 0,
    offset: float = OFFSET,
    return_report: bool = False,
    tell: Tell | None = None,
) -> nn.Module | tuple[nn.Module, ConversionReport]:
    """Replace every BatchNorm of a trained network by another scheme's norm, and keep what the network computes.

    Any network will do: BatchNorm of torch (1d, 2d, 3d, SyncBatchNorm, frozen by `freeze_batchnorm`), torchvision's
    FrozenBatchNorm2d, timm's BatchNormAct2d, whose activation stays, and ours, wherever they are held. Filters,
    devices, dtypes, modes and the names of all other modules stay.

    - New norms take over scale and shift. That alone loses most of what was learned, since statistics of a sample are
      not those of the population: ``calibrate`` fits scale and shift, norm after norm, to what BatchNorm gave, by least
      squares over a few hundred images, without gradients or labels. Linear layers behind the last norm are then
      fitted in closed form to what they gave, as far as that serves images that they were not fitted on.
    - Convolutions of schemes with Weight Standardization keep their filters: mean and size of each, which
      standardizing takes away, become constants of the layer (``ws(variant=aws)``; of Scaled WS, ``affine=True``). A
      convolution takes part where its output comes to a new norm before it comes to other filters, which is read off a
      trace. Depthwise ones and those of prediction heads, behind which there is no norm, stay plain.
    - ``"frozen"`` makes constants of BatchNorm, which is exact.
    - ``"kn"`` and ``"sws"`` have no norm: the convolution in front takes the place of both, with ``"sws"`` exactly.
      What a KNConv gives must not be overwritten: activations in place and blocks that add in place change as for
      ``dp``.
    - ``"nf"`` makes a residual network normalizer-free, which is exact too: see `anybatch.convert.normalizer_free`.
    - Norms with an activation of their own (``"frn"``, ``"evos0"``) take the ReLU behind BatchNorm in. One that other
      places share, or that ``forward`` calls as a function, also stays behind them.

    Args:
        model: In training or evaluation, on any device. BatchNorm is taken as in evaluation.
        to: A scheme of norms and convolutions, such as ``"gn"``, ``"ws+gn"``, ``"ln"``, ``"in"``, ``"pn"``, ``"lcn"``,
            ``"ws+bcn"``, ``"frn"``, ``"evos0"``, ``"kn"``, ``"sws"``, ``"nf"`` or ``"frozen"``.
        calibrate: Images, as a loader gives them: tensors, alone or in front of labels, which are not looked at; for
            detectors lists of images. At most 512 are taken, once.
        exclude: Names of modules that stay as they are with all they hold.
        groups: Of norms with groups, where the scheme says no number: one number, or ``"auto"`` for the divisor that
            calibration finds best for each layer, and nearest to 32 without calibration. A report's ``groups``, by
            layer, give the same layers again.
        dp: Whether Opacus is to train the network: nothing is in place, and nothing is kept of other samples. Blocks
            whose ``forward`` adds in place, such as torchvision's, become graphs with the same children.
        inplace: Whether to change the network itself, instead of a copy. Parameters that stay are the same objects.
        distill: Steps in which all parameters learn to give the old network's outputs, over the batches of
            ``calibrate`` as they come. No labels.
        offset: Calibration adds constants of so many standard deviations in front of group norms, by biases of
            convolutions whose filters it scales and turns over for that: without them such a norm takes away what each
            sample is like as a whole, which BatchNorm kept. The larger, the more is kept, and the less is normalized;
            0 for none.
        return_report: Whether to tell what was done too.
        tell: Called with the phase, ``"calibrate"``, ``"distill"`` or ``"compare"``, what is done and what there is to
            do.

    Returns:
        The converted network, in the mode of the old one; with ``return_report`` that and a `ConversionReport`. A
        conversion that fails has changed nothing.

    Raises:
        ValueError: If the model has no BatchNorm or a lazy one, or for ``"nf"`` no residual sum, or cannot be copied;
            the scheme cannot be a target, a name to exclude is no module's, calibration has no images or meets values
            that are not finite, ``distill`` has nothing to match since the function stays the same, or ``dp`` leaves a
            layer that depends on other samples.
        ImportError: If ``dp`` is asked for and Opacus is not installed.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> convert_batchnorm(model, "gn")
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): GroupNorm(8, num_groups=4, eps=1e-05, affine=True)
      (2): ReLU()
    )
    """
    target = Target.named(to, groups)
    if isinstance(distill, bool) or not isinstance(distill, int) or distill < 0:
        raise ValueError(f"distill={distill!r} is not a number of steps")
    if distill and calibrate is None:
        raise ValueError("distill needs images: give calibrate= a loader of your batch size, labels are not needed")
    if dp and importlib.util.find_spec("opacus") is None:
        raise ImportError("dp=True needs Opacus: pip install 'anybatch[dp]'")
    check_number("offset", offset)
    old = ready(model)
    before = held(old)
    new = copied(old)
    places = held(new)
    names = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    plan = Planner(new, places, target, names, feeders=bool(offset) and calibrate is not None).made()
    if not plan.replaced:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(plan.left.items())[:3])
        raise ValueError(f"no BatchNorm of the model becomes {target.scheme}: {why or 'it has none'}")
    if distill and not plan.fitted:
        why = "computes what the old network does" if plan.exact else "gives norms without scale and shift"
        raise ValueError(f"distill has nothing to match: {target.scheme} {why}")
    originals = {id(place.module): was.module for place, was in zip(places, before, strict=True)}
    originals[id(new)] = old
    for what in plan.fitted.values():
        what.old = originals[id(what.old)]
    for place in places:
        if id(place.module) in plan.swaps:
            place.put(plan.swaps[id(place.module)])
    if inplace and id(new) in plan.swaps:
        raise ValueError("inplace=True cannot replace the model itself, which is a BatchNorm; take what is returned")
    new = plan.swaps.get(id(new), new)
    told = _learned(old, new, plan, None if calibrate is None else taken(calibrate, old), target, distill, offset, tell)
    report = _report(old, new, plan, target, told)
    kept = any(getattr(layer, "keeps_output", False) for layer in plan.new.values())
    if dp:
        check_private(new)
    if inplace:
        if (dp or kept) and overwrites(old):
            raise ValueError(
                "inplace=True cannot exchange the model's own forward, which overwrites tensors; leave it out"
            )
        _graft(old, before, places, new, plan)
        new = old
    new = make_private(new) if dp else make_out_of_place(new) if kept else new
    made = model if inplace and new is old else new
    return (made, report) if return_report else made


def _learned(
    old: nn.Module,
    new: nn.Module,
    plan: Plan,
    batches: list[Batch] | None,
    target: Target,
    distill: int,
    offset: float,
    tell: Tell | None,
) -> Learned | None:
    """Calibrate a converted network, and distill if that is asked for."""
    if batches is None:
        return None

    def phase(name: str) -> Callable[[int, int], object]:
        return lambda done, of: None if tell is None else tell(name, done, of)

    larger = together(batches)
    with evaluating(old, new):
        check_takes(old, larger[0][:1])
        left = fit_norms(old, new, plan.fitted, larger, choose=target.chooses, offset=offset, tell=phase("calibrate"))
        measure_branches(new, plan, larger)
        norms = [what.old for what in plan.fitted.values()]
        heads = fit_heads(old, new, norms, larger) if norms else []
        if distill:
            match_outputs(old, new, plan.fitted, batches, distill, tell=phase("distill"))
            fit_heads(old, new, norms, larger)
        return Learned(left, tuple(heads), drift(old, new, larger, tell=phase("compare")))


def _report(old: nn.Module, new: nn.Module, plan: Plan, target: Target, learned: Learned | None) -> ConversionReport:
    drift = None if learned is None else learned.drift
    layers = {name: what.layer for name, what in plan.fitted.items() if name not in plan.inside}
    had = old.state_dict().keys()
    return ConversionReport(
        to=target.scheme.name,
        replaced=plan.replaced | {name: repr(layer) for name, layer in layers.items()},
        left=plan.left,
        convolutions=plan.convolutions,
        convolutions_left=plan.convolutions_left,
        branches=plan.branches,
        groups={name: int(n) for name, layer in layers.items() if (n := getattr(layer, "num_groups", None))},
        residuals={} if learned is None else learned.residuals,
        offsets=tuple(name for name, what in plan.fitted.items() if what.offset),
        heads=() if learned is None else learned.heads,
        drift=drift,
        new_parameters=tuple(key for key in new.state_dict() if key not in had),
        advice=advice(
            calibrated=learned is not None,
            exact=plan.exact,
            normalizer_free=target.normalizer_free,
            drift=drift,
            left=len(plan.left),
        ),
    )


@torch.no_grad()
def _graft(old: nn.Module, before: list[Place], places: list[Place], new: nn.Module, plan: Plan) -> None:
    """Bring a converted copy's layers and values into the network itself, whose parameters stay the same objects."""
    own = dict(old.named_parameters())
    for was, place in zip(before, places, strict=True):
        if id(place.module) in plan.swaps:
            was.put(plan.swaps[id(place.module)])
    values = dict(new.named_parameters())
    for name, value in values.items():
        mine = own.get(name)
        owner, _, key = name.rpartition(".")
        if mine is None:
            setattr(old.get_submodule(owner), key, value)
            continue
        if mine.shape != value.shape or mine.dtype != value.dtype:
            continue
        mine.copy_(value)
        mine.requires_grad_(value.requires_grad)
        setattr(old.get_submodule(owner), key, mine)
