"""Filters that are standardized before they are used, and how to do it once for many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from anybatch import dispatch
from anybatch.dispatch import op
from anybatch.methods.common import check_floating, widened


@dataclass(frozen=True)
class Rule:
    """How a centred filter of N values and squared norm S is scaled.

    With v = S / (N - correction), or v = S where ``correction`` is None, the factor is ``1 / sqrt(v + eps)`` with eps
    ``"inside"`` the root, ``1 / (sqrt(v) + eps)`` with eps ``"outside"``, ``1 / sqrt(max(v, eps))`` as a ``"floor"``.
    """

    eps: float
    correction: int | None = 0
    place: Literal["inside", "outside", "floor"] = "inside"

    def divisor(self, size: int) -> int:
        """What S is divided by."""
        return 1 if self.correction is None else size - self.correction

    def scale(self, squared_norm: Tensor, size: int) -> Tensor:
        """The factor s."""
        v = squared_norm / self.divisor(size)
        if self.place == "outside":
            # At 0, where the root's gradient is infinite, a constant filter shall get a finite one.
            return 1 / (v.clamp_min(torch.finfo(v.dtype).tiny).sqrt() + self.eps)
        return torch.rsqrt(v + self.eps if self.place == "inside" else v.clamp_min(self.eps))

    def pull(self, squared_norm: Tensor, size: int, scale: Tensor) -> Tensor:
        """``q = -2 s'(S) / s^2``: by Z = s * centred W a gradient g becomes ``s (g - mean g) - q <g, Z> Z``."""
        d = self.divisor(size)
        if self.place == "outside":
            return 1 / (squared_norm * d).sqrt().clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)
        return scale / d if self.place == "inside" else scale * (squared_norm >= self.eps)


def check_fan_in(where: str, weight: Tensor, dim: tuple[int, ...] | None = None) -> None:
    """Raise a `ValueError` unless each filter, which extends over these dimensions, has two values or more.

    And a `TypeError` unless it is floating point.
    """
    check_floating("weight", weight)
    if weight.dim() < 2 or _fan_in(weight, dim or tuple(range(1, weight.dim()))) <= 1:
        raise ValueError(
            f"{where} needs two values or more in a filter, got weight of shape {tuple(weight.shape)}: a filter that "
            f"has one value, which standardizing would set to 0; use a plain layer there"
        )


def _fan_in(weight: Tensor, dim: tuple[int, ...]) -> int:
    size = 1
    for d in dim:
        size *= weight.shape[d]
    return size


def _centred(weight: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The centred filters in float32 or wider, and their squared norms."""
    w = widened(weight)
    centred = w - w.mean(dim, keepdim=True)
    return centred, centred.square().sum(dim, keepdim=True)


def standardized(weight: Tensor, rule: Rule, dim: tuple[int, ...] | None = None) -> Tensor:
    """Each filter, which extends over these dimensions (by default all but the first), centred and scaled.

    In float32 or wider, and of two passes, since the variance is taken of what is centred.
    """
    dim = dim or tuple(range(1, weight.dim()))
    centred, squared_norm = _centred(weight, dim)
    return centred * rule.scale(squared_norm, _fan_in(weight, dim))


def as_rows(weight: Tensor, *, like: Tensor | None = None) -> Tensor | None:
    """(O, S): each filter's values in the order of memory, contiguous or channels_last, as a view; None elsewhere.

    With ``like`` in the order of that one's, copied where it is another.
    """
    form = weight if like is None else like
    if form.is_contiguous():
        return weight.reshape(len(weight), -1)
    if like is None and not weight.movedim(1, -1).is_contiguous():
        return None
    return weight.movedim(1, -1).reshape(len(weight), -1)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `as_rows`: rows in the shape and memory format of a weight."""
    if like.is_contiguous():
        return rows.view_as(like)
    return rows.view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


_LEAST = 1e-30
"""Variance that keeps a constant filter's 1/std finite, where the rule itself has no eps inside the root."""


@dataclass(frozen=True)
class Rows:
    """Filters that torch's layer normalization standardized as rows (O, S), and one number a filter, (O, 1)."""

    made: Tensor
    mean: Tensor
    scale: Tensor
    pull: Tensor | None
    """None where torch's backward of layer normalization is the rule's own."""


@op
def standardized_rows(rows: Tensor, rule: Rule, gain: Tensor | None = None) -> Rows:
    """`standardized` of rows in float32 or wider, times a gain (O, 1), in one pass or two."""
    size = rows.shape[1]
    plain = (rule.correction, rule.place) == (0, "inside")
    made, mean, rstd = torch.native_layer_norm(rows, (size,), None, None, rule.eps if plain else _LEAST)
    if plain:
        return Rows(made if gain is None else made.mul_(gain), mean, rstd, None)
    squared_norm = size / rstd.square()
    scale = rule.scale(squared_norm, size)
    factor = scale / rstd
    made = made.mul_(factor if gain is None else factor * gain)
    return Rows(made, mean, scale, rule.pull(squared_norm, size, scale))


@op
def pulled_rows(
    gradient: Tensor, values: Tensor, mean: Tensor | None, scale: Tensor, pull: Tensor | None, gain: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the rows that `standardized_rows` took, (O, S), and of their gains, (O, 1), where they have any.

    Args:
        gradient: Of what it made, (O, S), as ``values``.
        values: What it took; or, without ``mean``, what it made without a gain.
        mean: As it gave it; so are ``scale`` and ``pull``.
        scale: (O, 1).
        pull: (O, 1), or None, for which torch's backward of layer normalization takes the rows themselves.
        gain: (O, 1), or None for 1.
    """
    if pull is None and gain is None:
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(gradient, values, (values.shape[1],), mean, scale, None, None, (True, False, False))[0], None
    z = values if mean is None else (values - mean) * scale
    along = (gradient * z).sum(1, keepdim=True)  # <g, Z>
    pull = scale / values.shape[1] if pull is None else pull
    own, pull = (scale, pull) if gain is None else (scale * gain, pull * gain)
    pulled = torch.addcmul(-own * gradient.mean(1, keepdim=True), gradient, own).addcmul_(z, pull * along, value=-1)
    return pulled, None if gain is None else along


class StandardizedFilter(nn.Module):
    """A layer that multiplies with ``self.weight`` standardized. Methods give `rule` and `standardize`."""

    transposed_filters: ClassVar[bool] = False
    """Whether the filter is (I, O / groups, *), a transposed convolution's."""

    weight: Tensor
    bias: Tensor | None  # pyright: ignore[reportIncompatibleVariableOverride] (torch's linear layer says less)

    @property
    def changes_standardized(self) -> bool:
        """Whether `standardized` is more than what `standardize` gives."""
        return False

    @property
    def filter_dims(self) -> tuple[int, ...]:
        """Dimensions over which a filter extends in what `by_filter` returns."""
        dims = self.weight.dim()
        return (1, *range(3, dims + 1)) if self.transposed_filters else tuple(range(1, dims))

    def by_filter(self, weight: Tensor) -> Tensor:
        """A view in which filters extend over dimensions of their own: (groups, I, O, *) if they are transposed."""
        return weight.unflatten(0, (self.groups, -1)) if self.transposed_filters else weight  # pyright: ignore[reportArgumentType]

    def as_weight(self, filters: Tensor) -> Tensor:
        """Undo `by_filter`."""
        return filters.flatten(0, 1) if self.transposed_filters else filters

    def rule(self) -> Rule:
        """How the centred filter is scaled."""
        raise NotImplementedError

    def standardize(self, weight: Tensor, gain: Tensor | None = None) -> Tensor:
        """A weight, standardized by `rule`, times a gain."""
        raise NotImplementedError

    def filter_gain(self) -> Tensor | None:
        """A learned factor of each standardized filter, (O, 1, *), for layers that have one."""
        return None

    def standardized(self) -> Tensor:
        """The filter that the layer multiplies with, in the shape of its weight."""
        gain = self.filter_gain()
        # While compiling this must come first, so that nothing of what follows is traced.
        if torch.compiler.is_compiling() or not _reusable(self):
            return self.standardize(self.weight, gain)
        wanted = torch.is_grad_enabled() and (self.weight.requires_grad or (gain is not None and gain.requires_grad))
        if wanted and (passing := _SLOTS[self].passing) is not None and passing.state == _state(self.weight):
            return passing.filter
        kept = _kept(self)
        if wanted:
            return _Reused.apply(self.weight, gain, self, kept)  # pyright: ignore[reportReturnType]
        return kept.filter if gain is None else kept.filter * gain


@op
def standardize_together(layers: Sequence[StandardizedFilter]) -> list[Tensor]:
    """The filters that layers multiply with, each in the shape of its weight: `StandardizedFilter.standardized` of all.

    Kernels make them, and the gradients of all weights, in a few launches.

    Args:
        layers: Of Weight Standardization or Scaled Weight Standardization.
    """
    return [layer.standardized() for layer in layers]


@dataclass
class _Kept:
    """Values alone: no graph of the filter's own outlives a batch."""

    key: tuple[Any, ...]
    weight: Tensor  # keeps its memory from being another's, whose address would be the same
    filter: Tensor
    for_backward: tuple[Tensor | None, ...]
    rows: bool  # whether `pulled_rows` serves


class _Passing(NamedTuple):
    """A filter of one forward pass, made with all others."""

    filter: Tensor
    state: tuple[Any, ...]


@dataclass
class _Slot:
    contexts: int = 0
    kept: _Kept | None = None
    passing: _Passing | None = None


_SLOTS: WeakKeyDictionary[StandardizedFilter, _Slot] = WeakKeyDictionary()
_LAYERS: WeakKeyDictionary[nn.Module, list[StandardizedFilter]] = WeakKeyDictionary()
"""Of models in the context."""
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


def _reusable(layer: StandardizedFilter) -> bool:
    """Whether the layer is in a context of `reuse_filters`, and its weight a plain parameter whose changes show."""
    weight = layer.weight
    return (
        layer in _SLOTS
        and type(weight) is nn.Parameter  # not what functional_call, a parametrization or fake tensors put there
        and weight.device.type != "meta"
        and not weight.is_inference()
        and dispatch.current() == "auto"
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _state(weight: Tensor) -> tuple[Any, ...]:
    # Torch's fused optimizers change a parameter without a new version, hence the count of steps.
    return weight.data_ptr(), weight._version, weight.dtype, weight.device, weight.stride(), _steps


def _begin_pass(model: nn.Module, _: Any) -> None:
    """Make the filters of a forward pass at once, where a kernel does."""
    if (
        torch.compiler.is_compiling() or (layers := _LAYERS.get(model)) is None
    ):  # as in copies, which take the hook along
        return
    for layer in layers:
        _SLOTS[layer].passing = None
    # Among processes gradients are to be sent while others are still computed, so that layers stay on their own.
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    some = [layer for layer in layers if _reusable(layer) and layer.weight.requires_grad]
    if not (torch.is_grad_enabled() and alone and some):
        return
    if dispatch.explain(standardize_together, some)["reference"] == "runs":
        return
    made = standardize_together(some)

    def end(*_: Any) -> None:
        for layer, filter in zip(some, made, strict=True):
            if layer in _SLOTS and (passing := _SLOTS[layer].passing) is not None and passing.filter is filter:
                _SLOTS[layer].passing = None

    for layer, filter in zip(some, made, strict=True):
        _SLOTS[layer].passing = _Passing(filter, _state(layer.weight))
    for node in {filter.grad_fn for filter in made}:
        if node is not None:
            node.register_hook(end)  # what they are made of is gone behind their backward


def _kept(layer: StandardizedFilter) -> _Kept:
    weight, rule, slot = layer.weight, layer.rule(), _SLOTS[layer]
    # Lightning's moving average swaps the weights for an evaluation by way of .data, hence the mode.
    key = (*_state(weight), rule, layer.training)
    if slot.kept is None or slot.kept.key != key:
        slot.kept = None  # free it before the next is made
        with torch.inference_mode(False), torch.no_grad():
            slot.kept = _computed(layer, weight.detach(), rule, key)
    return slot.kept


def _computed(layer: StandardizedFilter, weight: Tensor, rule: Rule, key: tuple[Any, ...]) -> _Kept:
    if not layer.transposed_filters and (rows := as_rows(weight)) is not None:
        # What the kernels "torch" run, of which torch's backward is one pass.
        done = standardized_rows(widened(rows), rule)
        made = from_rows(done.made.to(weight.dtype), weight)
        if weight.dtype.itemsize >= 4:
            # Of what was made where its own pull is known: it outlives a step that changes the weight.
            mean = done.mean if done.pull is None else None
            return _Kept(key, weight, made, (mean, done.scale, done.pull), rows=True)
        per_filter = (-1, *(1 for _ in weight.shape[1:]))
        pull = done.scale / rows.shape[1] if done.pull is None else done.pull
        return _Kept(key, weight, made, (done.scale.reshape(per_filter), pull.reshape(per_filter)), rows=False)
    dim, filters = layer.filter_dims, layer.by_filter(weight)
    size = _fan_in(filters, dim)
    centred, squared_norm = _centred(filters, dim)
    scale = rule.scale(squared_norm, size)
    made = layer.as_weight((centred * scale).to(weight.dtype))
    return _Kept(key, weight, made, (scale, rule.pull(squared_norm, size, scale)), rows=False)


class _Reused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, layer: StandardizedFilter, kept: _Kept) -> Tensor:
        ctx.layer, ctx.rows = layer, kept.rows
        ctx.weight, ctx.version = weight, weight._version
        of_weight = kept.rows and kept.for_backward[0] is not None
        ctx.save_for_backward(gain, weight if of_weight else kept.filter, *kept.for_backward)
        # Without a gain a view, since the graph is hung on what is returned and not on what is kept.
        return kept.filter.view_as(kept.filter) if gain is None else kept.filter * gain

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer: StandardizedFilter = ctx.layer
        gain, values, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient that is differentiated again
            if ctx.weight._version != ctx.version:
                raise RuntimeError("a filter was changed in place before its gradient's graph was made")
            inputs = (ctx.weight,) if gain is None else (ctx.weight, gain)
            return *torch.func.vjp(layer.standardize, *inputs)[1](gradient), *([None] * (4 - len(inputs)))
        if ctx.rows:
            rows, given = as_rows(values), as_rows(gradient, like=values)
            pulled, along = pulled_rows(given, rows, *factors, None if gain is None else gain.reshape(-1, 1))
            return from_rows(pulled, values), None if along is None else along.view_as(gain), None, None
        dim, (scale, pull) = layer.filter_dims, factors
        g, z = widened(layer.by_filter(gradient)), widened(layer.by_filter(values))
        along = (g * z).sum(dim, keepdim=True)
        if gain is not None:
            scale, pull = scale * gain, pull * gain
        pulled = torch.addcmul(-scale * g.mean(dim, keepdim=True), g, scale).addcmul_(z, pull * along, value=-1)
        to_gain = None if gain is None else along.to(gain.dtype)
        return layer.as_weight(pulled.to(gradient.dtype)), to_gain, None, None


@contextmanager
def reuse_filters(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Within this context the model's layers standardize a filter once and use it until their weight changes.

    So once per step of the optimizer, however many batches it accumulates, and once per evaluation. Where a kernel
    makes the filters of all layers at once (`standardize_together`), each forward pass of the model begins with it, and
    the gradients of all weights come at the end of backward. Values and gradients are those without the context. For
    layers of Weight Standardization and Scaled Weight Standardization; not while compiling or exporting, under
    ``torch.func``, or with a backend chosen by name, where each call computes anew.

    A weight has changed after the step of any torch optimizer, after any operation in place that autograd can see
    (``load_state_dict``, ``with torch.no_grad(): p.mul_(2)``), and when it, or the layer's mode, is another. Writing
    through ``p.data`` (``p.data.copy_(...)``) shows nowhere: call what the context gives, which forgets all filters,
    after that.

    Args:
        model: Whose layers reuse their filters; copies of it and layers that are added later do not.

    Yields:
        A function that forgets all filters.

    >>> model = nn.Sequential()
    >>> with reuse_filters(model) as forget:
    ...     forget()
    """
    layers = [module for module in model.modules() if isinstance(module, StandardizedFilter)]
    for layer in layers:
        _SLOTS.setdefault(layer, _Slot()).contexts += 1
    counting = register_optimizer_step_post_hook(_count_step)

    beginning = None
    if layers and model not in _LAYERS:
        _LAYERS[model] = layers
        beginning = model.register_forward_pre_hook(_begin_pass)

    def forget() -> None:
        for layer in layers:
            if layer in _SLOTS:
                _SLOTS[layer].kept = _SLOTS[layer].passing = None

    try:
        yield forget
    finally:
        counting.remove()
        if beginning is not None:
            beginning.remove()
            del _LAYERS[model]
        for layer in layers:
            _SLOTS[layer].contexts -= 1
            if not _SLOTS[layer].contexts:
                del _SLOTS[layer]
