"""Adaptive gradient clipping: a unit's gradient is at most a small part of the unit's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch.dispatch import op
from anybatch.methods.optimizer_around import OptimizerAround
from anybatch.methods.parameters import Place, bare, classifier, is_vector, matched, places
from anybatch.methods.sam import SAM
from anybatch.scheme import Scheme, check_positive
from anybatch.suggest import unknown

Exclude = Literal["auto"] | str | Iterable[str]

LEAST_NORM = 1e-6  # of a gradient by which is divided, as released


@dataclass(frozen=True)
class Clipped:
    """What one call clipped. Numbers are tensors on the gradients' device, so that looking at this waits for nothing.

    With sharded parameters it tells of this process's shards.

    Args:
        names: Of the parameters that had a gradient.
        sizes: Units in each.
        ratios: For each unit, parameter after parameter, ``|G| / max(|W|, eps)`` before clipping.
        over: For each unit, whether it was clipped.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ratios: Tensor
    over: Tensor

    @property
    def units(self) -> int:
        """How many units there are."""
        return sum(self.sizes)

    @property
    def clipped(self) -> Tensor:
        """How many of them were clipped, int64."""
        return self.over.sum()

    @property
    def largest(self) -> Tensor:
        """The largest ratio of a gradient to its weights before clipping, to compare with ``clip_factor``."""
        return self.ratios.max() if len(self.ratios) else self.ratios.new_zeros(())

    def by_name(self) -> dict[str, tuple[int, int, float]]:
        """For each parameter: its units, how many were clipped, and the largest ratio. Waits for the device."""
        over, ratios = self.over.cpu().split(self.sizes), self.ratios.cpu().split(self.sizes)
        return {
            name: (size, int(o.sum()), float(r.max()) if size else 0.0)
            for name, size, o, r in zip(self.names, self.sizes, over, ratios, strict=True)
        }


@dataclass(frozen=True)
class Units:
    """A parameter and how its units lie in it.

    ``groups`` is 0 for a vector; for filters with outputs in dimension 0, None; else, for a transposed convolution's
    (I, O / groups, *), the number of its groups.
    """

    name: str
    parameter: Tensor
    groups: int | None

    @classmethod
    def at(cls, place: Place) -> Units:
        module, p = place.module, place.parameter
        if place.key == "weight" and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and p.dim() < 2:
            raise ValueError(
                f"{place.name} of a {type(module).__name__} has shape {tuple(p.shape)}: its filters were flattened "
                f"into shards that no longer hold whole units; shard with fully_shard (FSDP2), which keeps them"
            )
        if is_vector(p, module):
            return cls(place.name, p, 0)
        if place.key == "weight" and isinstance(module, nn.modules.conv._ConvTransposeNd):
            return cls(place.name, p, module.groups)
        return cls(place.name, p, None)

    @property
    def count(self) -> int:
        """How many units this process has."""
        p = local(self.parameter)
        return len(p) if self.groups is None else self.groups * p.shape[1] if self.groups else 1

    @property
    def summed(self) -> tuple[int, ...]:
        """The dimensions, of what `view` gives, over which a unit's norm is taken."""
        if self.groups is None:
            return tuple(range(1, self.parameter.dim()))
        return (1, *range(3, self.parameter.dim() + 1))

    def view(self, t: Tensor) -> Tensor:
        """The parameter's or gradient's own memory; a transposed filter as (G, I / G, O / G, *)."""
        return t.unflatten(0, (self.groups, -1)) if self.groups else t

    def across(self) -> list[Any]:
        """The process groups among which units of a sharded parameter are split."""
        if _plain(self.parameter):
            return []
        sharding = getattr(self.parameter, "placements", ())
        whole = {None: 0, 0: None}.get(self.groups, 1)
        split = [i for i, how in enumerate(sharding) if how.is_shard() and how.dim != whole]
        if self.groups and self.groups > 1 and any(how.is_shard(0) for how in sharding):
            raise ValueError(
                f"{self.name}, a transposed convolution's filter with {self.groups} groups, is sharded across its "
                f"groups, which this clipping cannot take; exclude it, or do not shard it"
            )
        mesh = getattr(self.parameter, "device_mesh", None)
        return [] if mesh is None else [mesh.get_group(i) for i in split]


def _plain(t: Tensor) -> bool:
    """Whether it is none of the tensors that may be sharded, of which to ask takes microseconds each."""
    return type(t) is Tensor or type(t) is nn.Parameter


def local(t: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; others as they are."""
    return t if _plain(t) or not hasattr(t, "to_local") else t.to_local()  # pyright: ignore[reportAttributeAccessIssue]


def _unit_norms(units: list[Units], tensors: list[Tensor], wide: torch.dtype) -> list[Tensor]:
    """For each tensor the norms of its units, (units,), in the wide type."""
    norms: list[Tensor | None] = [
        None if u.groups == 0 else torch.linalg.vector_norm(u.view(t), dim=u.summed, dtype=wide).flatten()
        for u, t in zip(units, tensors, strict=True)
    ]
    vectors = [t for u, t in zip(units, tensors, strict=True) if u.groups == 0]
    of_vectors = iter(torch._foreach_norm(vectors, dtype=wide) if vectors else ())  # pyright: ignore[reportPrivateImportUsage]
    return [next(of_vectors).reshape(1) if norm is None else norm for norm in norms]


def _sum_across(units: list[Units], norms: list[list[Tensor]]) -> None:
    """Replace norms of units that are split among processes by the norms of the whole; one message a process group."""
    by_group: dict[Any, list[int]] = {}
    for i, u in enumerate(units):
        for group in u.across():
            by_group.setdefault(group, []).append(i)
    for group, members in by_group.items():
        parts = [some[i] for some in norms for i in members]
        squares = torch.cat(parts).square()
        torch.distributed.all_reduce(squares, group=group)
        whole = iter(squares.sqrt().split([len(part) for part in parts]))
        for some in norms:
            for i in members:
                some[i] = next(whole)


@torch.no_grad()
def _clip(units: list[Units], clip_factor: float, eps: float, grad_scale: Tensor | None = None) -> Clipped:
    """Clip the gradients of these parameters, which are ``grad_scale`` times too large."""
    moved = [(u, u.parameter.grad) for u in units if u.parameter.grad is not None]
    if not moved:
        shown = ", ".join(u.name for u in units[:3]) + (", ..." if len(units) > 3 else "")
        raise ValueError(
            f"none of the {len(units)} parameters ({shown}) has a gradient to clip; call it after backward() and "
            f"before the optimizer's step"
        )
    for u, grad in moved:
        if grad.layout is not torch.strided:
            raise ValueError(f"the gradient of {u.name} is sparse, which has no whole units; exclude {u.name}")
        if not _plain(grad) and any(how.is_partial() for how in getattr(grad, "placements", ())):
            raise ValueError(f"the gradient of {u.name} is not yet summed over processes; clip it after that")
    kinds: dict[tuple[torch.device, torch.dtype], list[Units]] = {}
    for u, _ in moved:
        p = u.parameter
        wide = torch.float32 if p.dtype == torch.float32 else torch.promote_types(p.dtype, torch.float32)
        kinds.setdefault((p.device, wide), []).append(u)
    found = [clip_alike(some, clip_factor, eps, grad_scale, wide) for (_, wide), some in kinds.items()]
    if len(found) == 1:
        return found[0]
    home = found[0].ratios
    return Clipped(
        tuple(name for part in found for name in part.names),
        tuple(size for part in found for size in part.sizes),
        torch.cat([part.ratios.to(home) for part in found]),
        torch.cat([part.over.to(home.device) for part in found]),
    )


@op
def clip_alike(
    units: list[Units], clip_factor: float, eps: float, grad_scale: Tensor | None, wide: torch.dtype
) -> Clipped:
    """Clip the gradients of parameters of one device and one wide type, which are ``grad_scale`` times too large."""
    grads = [local(u.parameter.grad) for u in units]  # pyright: ignore[reportArgumentType]
    norms = [_unit_norms(units, [local(u.parameter) for u in units], wide), _unit_norms(units, grads, wide)]
    _sum_across(units, norms)
    sizes = [len(norm) for norm in norms[0]]
    weights, gradients = (torch.cat(some) for some in norms)
    if grad_scale is not None:
        gradients = gradients / grad_scale.to(gradients)
    floored = weights.clamp_min(eps)
    most = clip_factor * floored
    # What is not finite stays so: a factor of 0 would turn an infinite gradient's finite neighbors into 0.
    over = (gradients > most) & (gradients < torch.inf)
    factors = torch.where(over, most / gradients.clamp_min(LEAST_NORM), 1.0)
    parts = list(zip(units, grads, factors.split(sizes), strict=True))
    if factors.device.type == "cpu":  # elsewhere looking would wait for the device
        so_far = torch.cat((torch.zeros(1, dtype=torch.int64), over.cumsum(0)))
        at_ends = [0, *so_far[torch.tensor(sizes).cumsum(0)].tolist()]
        parts = [part for part, before, now in zip(parts, at_ends, at_ends[1:], strict=False) if now > before]
    if parts:
        views = [u.view(grad) for u, grad, _ in parts]
        beside = [_beside(u, view, f) for (u, _, f), view in zip(parts, views, strict=True)]
        torch._foreach_mul_(views, beside)  # pyright: ignore[reportPrivateImportUsage]
    return Clipped(tuple(u.name for u in units), tuple(sizes), gradients / floored, over)


def _beside(u: Units, view: Tensor, factors: Tensor) -> Tensor:
    """One factor for each unit, shaped to multiply the gradient's view."""
    if u.groups == 0:
        return factors.reshape(())
    return factors.reshape([1 if d in u.summed else size for d, size in enumerate(view.shape)])


def _check(clip_factor: float, eps: float) -> None:
    check_positive("clip_factor", clip_factor)
    check_positive("eps", eps)


def _named(names: Exclude) -> tuple[str, ...]:
    """Names to exclude; a text may hold several between ``|``, and ``"none"`` is none."""
    if isinstance(names, str):
        return () if names in ("none", "") else tuple(name.strip() for name in names.split("|"))
    found = tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"exclude={names!r} is neither a name nor names; 'none' excludes nothing")
    return found


class _Clipper:
    """The parameters of a model that are clipped, with the checked names of those that are not."""

    def __init__(self, model: nn.Module, clip_factor: float, eps: float, exclude: Exclude) -> None:
        _check(clip_factor, eps)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, got {type(model).__name__}")
        model = bare(model)
        if isinstance(exclude, str) and exclude == "auto":
            last = classifier(model)
            self.excluded = matched(model, () if last is None else (f"{last}.weight",))
        else:
            self.excluded = matched(model, _named(exclude))
        self.places = [place for place in places(model) if place.name not in self.excluded]
        if not self.places:
            raise ValueError(f"exclude={exclude!r} leaves no parameter of {type(model).__name__} to clip")
        self.clip_factor = clip_factor
        self.eps = eps

    def __call__(self, optimizer: Optimizer | None = None) -> Clipped:
        """Clip what the optimizer holds of these parameters, or all."""
        units = [Units.at(place) for place in self.places]
        scale = None
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            units = [u for u in units if id(u.parameter) in held]
            # Left there for a fused step by a GradScaler that has not unscaled the gradients.
            scale = getattr(optimizer, "grad_scale", None)
        return _clip(units, self.clip_factor, self.eps, scale)

    def around(self, closure: Callable[[], Any], optimizer: Optimizer, tell: Callable[[Clipped], None]) -> Any:
        """A closure that clips the gradients that ``closure`` has yet to compute, and tells what it clipped."""

        def clipping() -> Any:
            loss = closure()
            tell(self(optimizer))
            return loss

        return clipping

    def check_holds(self, optimizer: Optimizer) -> None:
        """Raise a `ValueError` if the optimizer steps none of the parameters, or is one to clip inside of."""
        if isinstance(optimizer, SAM):
            raise ValueError(
                "around SAM the gradient by which it seeks the worst place would be clipped too; clip inside of it: "
                "SAM(AGC(optimizer, model))"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(place.parameter) in held for place in self.places):
            raise ValueError(
                "the optimizer holds no parameter of the model that could be clipped; was it made for another?"
            )


Parameters = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def adaptive_clip_grad_(
    parameters: Parameters, clip_factor: float = 0.01, eps: float = 1e-3, *, exclude: Iterable[str] = ()
) -> Clipped:
    """Scale down, in place, the gradient of each unit whose norm is large beside that of the unit's weights.

    For unit i with weights W and gradient G: ``m = clip_factor * max(|W|, eps)``; where ``|G| > m``, G becomes
    ``G * m / max(|G|, 1e-6)``. Norms are Euclidean, in float32 or wider. A gradient stays as it
    is where its norm is not finite.

    A unit is what makes one output: of linear layers and convolutions a row, W[o]; of transposed convolutions, whose
    filter is (I, O / groups, *), a group and an output in it; of embeddings and modules unknown here an entry of
    dimension 0. Gains, biases, whatever has at most one dimension larger than 1 (as gains of shape (C, 1, 1, 1)), and
    parameters of norms are each one unit, as in the release; timm clips each entry of a (C, 1, 1, 1) gain by itself.
    Only a model tells of its modules: given tensors, everything with two dimensions or more counts as rows.

    Call it when the gradient is complete: after accumulation, after averaging over processes, and unscaled (a
    `GradScaler`'s ``unscale_``). Parameters without gradient are left out. Of FSDP2's sharded parameters every process
    clips its shard, with norms of what is split summed over the processes; all of them must call it.

    Numbers that start at 0, such as skip gains, have ``|W| < eps`` for long: at clip_factor 0.01 and eps 1e-3 a step
    moves them by at most 1e-5 times the learning rate (times ten or so with momentum), so that at learning rates of
    0.01 and below they are as good as frozen. There let them start elsewhere, exclude them, or raise eps.

    Made for SGD with momentum; optimizers that normalize each entry's gradient, as Adam does, undo most of it.

    Args:
        parameters: A model, tensors, or pairs of name and tensor.
        clip_factor: lambda, the largest ratio of gradient to weights, above 0; 0.01 for batches of 1024 to 4096; larger
            ones do for smaller batches.
        eps: The norm that weights have at least, above 0.
        exclude: Names of parameters, or of layers whose weight is meant, that are not clipped: the paper leaves out the
            classifier's weight, not its bias (`attach_agc` finds it).

    Returns:
        What was clipped; nothing in it waits for the device until it is looked at.

    Raises:
        ValueError: If no parameter has a gradient, a gradient is sparse, a name means nothing (the nearest are named)
            or there are no names, or ``clip_factor`` or ``eps`` is not above 0.

    Source:
        Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization", arXiv:2102.06171,
        eq. 3; units and the floor of 1e-6: its released code.

    >>> layer = nn.Linear(3, 2)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> clipped = adaptive_clip_grad_(layer)
    >>> clipped.units, int(clipped.clipped)  # two rows and the bias
    (3, 3)
    """
    if isinstance(parameters, nn.Module):
        return _Clipper(parameters, clip_factor, eps, exclude)()
    _check(clip_factor, eps)
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for item in given:
        if not isinstance(item, Tensor) and not (isinstance(item, tuple) and isinstance(item[-1], Tensor)):
            raise TypeError(
                f"parameters must be a model, tensors, or pairs of name and tensor, got a {type(item).__name__} in them"
            )
    names = _named(exclude)
    if names and any(isinstance(item, Tensor) for item in given):
        raise ValueError(f"exclude={names!r} needs names; give a model or its named_parameters()")
    named = [(f"parameter {i}", item) if isinstance(item, Tensor) else item for i, item in enumerate(given)]
    firsts = {id(p): (name, p) for name, p in reversed(named)}  # of tied weights, which are clipped once
    named = [pair for pair in named if firsts[id(pair[1])] == pair]
    known = {name for name, _ in named} | {name.removesuffix(".weight") for name, _ in named}
    for name in names:
        if name not in known:
            raise unknown("parameter or layer", name, known)
    return _clip(
        [
            Units(name, p, 0 if is_vector(p) else None)
            for name, p in named
            if not {name, name.removesuffix(".weight")} & set(names)
        ],
        clip_factor,
        eps,
    )


class AttachedAGC:
    """Clipping attached to an optimizer; `remove` takes it off.

    Attributes:
        excluded: Names of the parameters that are not clipped.
        last: What the last step clipped, or None before the first.
    """

    def __init__(self, optimizer: Optimizer, clipper: _Clipper) -> None:
        self.excluded = frozenset(clipper.excluded)
        self.last: Clipped | None = None
        self._clipper = clipper
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._tell(self._clipper(optimizer))
            return None
        return args[:1], {**kwargs, "closure": self._clipper.around(closure, optimizer, self._tell)}

    def _tell(self, clipped: Clipped) -> None:
        self.last = clipped

    def remove(self) -> None:
        """Step without clipping from now on."""
        self._handle.remove()


def attach_agc(
    optimizer: Optimizer,
    model: nn.Module,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    *,
    exclude: Exclude = "auto",
) -> AttachedAGC:
    """Let a torch optimizer clip by `adaptive_clip_grad_` before each step.

    With a `GradScaler`, fused steps included, thresholds follow the scale that gradients still have. A closure given to
    ``step`` is called first, so that it works in Lightning's automatic optimization. Weight decay is added after
    clipping, by the optimizer, as in the release. The optimizer's copies and pickles do not take it along; `AGC`'s do.

    Args:
        optimizer: Any of torch's; those of the model's parameters that it holds are clipped.
        model: Tells units and names; may be wrapped in DDP or compiled.
        clip_factor: As in `adaptive_clip_grad_`.
        eps: As in `adaptive_clip_grad_`.
        exclude: Names of parameters, or of layers whose weight is meant. ``"auto"`` is the classifier: what
            ``get_classifier()`` returns, or timm's configuration names, or ``fc``, ``head.fc``, ``head``,
            ``classifier``. ``"none"``, or no names, for none.

    Returns:
        A handle: `AttachedAGC.remove`, `AttachedAGC.last`.

    Raises:
        ValueError: If a name means nothing in the model, the classifier cannot be found, the optimizer holds none of
            the parameters or is `SAM`, inside of which clipping belongs; in a step, as `adaptive_clip_grad_` does.

    Source:
        Brock et al. 2021, arXiv:2102.06171, sections 4.1 and 5.1.
    """
    clipper = _Clipper(model, clip_factor, eps, exclude)
    clipper.check_holds(optimizer)
    return AttachedAGC(optimizer, clipper)


class AGC(OptimizerAround):
    """An optimizer that clips by `adaptive_clip_grad_`, then lets another step.

    Unlike `attach_agc` it can be copied and pickled. Parameter groups, state and state dict are the other's, so that
    learning rate schedulers, checkpoints and `GradScaler` work as without it.

    Args:
        optimizer: Does the steps.
        model: Tells units and names, as in `attach_agc`.
        clip_factor: As in `adaptive_clip_grad_`.
        eps: As in `adaptive_clip_grad_`.
        exclude: As in `attach_agc`.

    Raises:
        ValueError: As `attach_agc`.

    Source:
        Brock et al. 2021, arXiv:2102.06171, eq. 3.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        *,
        exclude: Exclude = "auto",
    ) -> None:
        super().__init__(optimizer, clipper=_Clipper(model, clip_factor, eps, exclude), last=None)
        self.clipper.check_holds(optimizer)

    clipper: _Clipper
    last: Clipped | None
    """What the last step clipped."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if closure is None:
            self._tell(self.clipper(self.optimizer))
            return self.optimizer.step()
        return self.optimizer.step(self.clipper.around(closure, self.optimizer, self._tell))

    def _tell(self, clipped: Clipped) -> None:
        self.last = clipped


def _clip_of(model: nn.Module, clip_factor: float, eps: float, exclude: Exclude) -> Callable[[], Clipped]:
    return _Clipper(model, clip_factor, eps, exclude)


def agc(clip_factor: float = 0.01, eps: float = 1e-3, *, exclude: str = "auto") -> Scheme:
    """Adaptive gradient clipping before each step, of everything but the classifier's weight.

    The published threshold is meant for batches of 1024 and more and a hundred thousand steps. In short runs with small
    batches it holds back what starts at 0: so the part ``nf`` lets its skip gains start at 1, which are 0 as published,
    and a larger threshold learns faster still.

    Args:
        clip_factor: The largest ratio of a unit's gradient to its weights.
        eps: The norm that a unit's weights have at least.
        exclude: Names of parameters, or of layers whose weight is meant, that are not clipped, with ``|`` between;
            ``"auto"`` for the classifier's weight, ``"none"`` for none.
    """
    _check(clip_factor, eps)
    if isinstance(exclude, int) and not isinstance(exclude, bool):
        exclude = str(exclude)  # a layer of a sequence
    if not isinstance(exclude, str):
        raise ValueError(f"exclude={exclude!r} is not a name, or names with | between; 'none' excludes nothing")
    return Scheme(
        name="agc",
        clip=partial(_clip_of, clip_factor=clip_factor, eps=eps, exclude=exclude),
        sources=("arXiv:2102.06171",),
    )
