"""Weight Standardization, plain and scaled, as Triton kernels on CUDA: one launch each way for a filter, or for all.

The formulas are those of `anybatch.kernels.torch_weight_standardize`. All filters of a network at once are one node of
autograd's graph, which waits for the gradients of all of them: a few launches then give those of all weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch.kernels.layouts import laid_out
from anybatch.kernels.recompute import recomputed_gradients, taken_in_formulas
from anybatch.kernels.triton_common import (
    Dtypes,
    Plan,
    dtypes_of,
    on_its_device,
    planned,
    power_of_two,
    refused_device,
)
from anybatch.kernels.triton_tables import DTYPES, LARGE, aligned, block, dense_rows, on, owners, table, triton_type
from anybatch.kernels.triton_tuning import Launch, Tuned, Way
from anybatch.methods.filters import Rule, StandardizedFilter, standardize_together
from anybatch.methods.scaled_weight_standardization import filter_rule, scaled_weight_standardize
from anybatch.methods.weight_standardization import VARIANTS, variant_rule, weight_standardize


def _of_rows(kernel: Any, filters: int, size: int, numbers: tuple[Any, ...], about: tuple[Any, ...]) -> Launch:
    """One program for each of so many filters, the largest of so many values."""
    width, warps = block(size)

    def plan(way: Way) -> Plan:
        return Plan(kernel, (filters,), (*numbers, way.of_values(width)), way.of_warps(warps))

    return Tuned(plan, (power_of_two(filters), power_of_two(size), *about))


@planned
def _standardizing(filters: int, size: int, rule: Rule, dtypes: Dtypes) -> Launch:
    numbers = (filters, size, rule.divisor(size), rule.eps, rule.place)
    return _of_rows(_kernels().standardize_filters, filters, size, numbers, (rule.place, dtypes))


@planned
def _pulling(filters: int, size: int, dtypes: Dtypes) -> Launch:
    return _of_rows(_kernels().pull_filters, filters, size, (filters, size), (dtypes,))


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, rule: Rule, reference: Callable[..., Tensor]) -> Tensor:
        filters, size = len(weight), weight[0].numel()
        made = torch.empty_like(weight)
        stats = weight.new_empty((3, filters), dtype=torch.float32)
        _standardizing(filters, size, rule, dtypes_of(weight, gain))(weight, made, gain, stats)
        ctx.reference = reference
        ctx.save_for_backward(weight, gain, stats)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, gain, stats = ctx.saved_tensors
        if taken_in_formulas(gradient):  # a gradient that is differentiated again
            return *recomputed_gradients(ctx.reference, (weight, gain), gradient), None, None
        g_weight, g = torch.empty_like(weight), laid_out(gradient, weight)
        g_gain = None if gain is None else torch.empty_like(stats[0])
        plan = _pulling(len(weight), weight[0].numel(), dtypes_of(weight, gain))
        plan(g, weight, g_weight, gain, stats, g_gain)
        to_gain = None if gain is None or g_gain is None else g_gain.to(gain.dtype).reshape(gain.shape)
        return g_weight, to_gain, None, None


def _refusal(weight: Tensor, gain: Tensor | None = None) -> str | None:
    if reason := refused_device(weight):
        return reason
    if type(weight) not in (Tensor, nn.Parameter):
        return f"weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES or weight.dim() < 2 or weight.numel() == 0 or weight[:1].numel() <= 1:
        return f"weight is {weight.dtype} of shape {tuple(weight.shape)}"
    if gain is not None and (gain.numel() != len(weight) or gain.dtype not in DTYPES or not gain.is_contiguous()):
        return "gain is not one number a filter"
    if gain is not None and gain.device != weight.device:
        return f"gain is on {gain.device}, weight on {weight.device}"
    return None if dense_rows(weight, len(weight)) else "filters are no rows in memory"


def _refusal_of_ws(
    weight: Tensor, *, eps: float | None = None, variant: str = "default", dim: tuple[int, ...] | None = None
) -> str | None:
    if dim is not None:
        return "dim is given"
    return f"variant {variant!r} is unknown" if variant not in VARIANTS else _refusal(weight)


def _refusal_of_sws(
    weight: Tensor, gain: Tensor | None = None, *, eps: float = 1e-4, eps_rule: str = "max"
) -> str | None:
    return f"eps_rule={eps_rule!r} is unknown" if eps_rule not in ("max", "add") else _refusal(weight, gain)


@weight_standardize.kernel("triton", refusal=_refusal_of_ws, first=True)
@on_its_device
def triton_weight_standardize(
    weight: Tensor, *, eps: float | None = None, variant: Any = "default", **_: Any
) -> Tensor:
    def reference(w: Tensor, _: None) -> Tensor:
        return weight_standardize.reference(w, eps=eps, variant=variant)

    return _Standardize.apply(weight, None, variant_rule(variant, eps), reference)  # pyright: ignore[reportReturnType]


@scaled_weight_standardize.kernel("triton", refusal=_refusal_of_sws, first=True)
@on_its_device
def triton_scaled_weight_standardize(
    weight: Tensor, gain: Tensor | None = None, *, eps: float = 1e-4, eps_rule: Any = "max"
) -> Tensor:
    reference = partial(scaled_weight_standardize.reference, eps=eps, eps_rule=eps_rule)
    rule = filter_rule(eps_rule, eps, weight[0].numel())
    return _Standardize.apply(weight, gain, rule, reference)  # pyright: ignore[reportReturnType]


class _Kind(NamedTuple):
    """What the tensors of a launch have in common."""

    weight: torch.dtype
    gain: torch.dtype | None
    place: str
    aligned: bool
    large: bool

    @property
    def constants(self) -> tuple[Any, ...]:
        sizes = (self.weight.itemsize, 0 if self.gain is None else self.gain.itemsize)
        return triton_type(self.weight), triton_type(self.gain), *sizes


class _Member(NamedTuple):
    """A layer's weight among all: which it is, its filters, what a table tells of it, and eps."""

    number: int
    filters: int
    entry: tuple[int, ...]  # addresses of weight and gain, values, divisor
    behind: tuple[int, int]  # the first filter of all, where what is made begins
    eps: float


def _tables(members: Sequence[_Member], last: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    firsts = itertools.accumulate((m.filters for m in members), initial=0)
    rows = zip(members, firsts, last, strict=False)
    return tuple((*m.entry, first, *m.behind, *more) for m, first, more in rows)


@planned
def _standardizing_all(kind: _Kind, programs: int, filters: int) -> Launch:
    numbers = (filters, *kind.constants, kind.place, kind.aligned)
    return _of_rows(_kernels().standardize_all, programs, LARGE + kind.large, numbers, kind)


@planned
def _pulling_all(kind: _Kind, programs: int, filters: int) -> Launch:
    numbers = (filters, *kind.constants, kind.aligned)
    return _of_rows(_kernels().pull_all, programs, LARGE + kind.large, numbers, kind)


class _Batch:
    """All filters that are standardized at once, and where each one's result begins among those of its dtype."""

    def __init__(self, layers: Sequence[StandardizedFilter], weights: Sequence[Tensor], gains: Sequence[Tensor | None]):
        self.layers, self.device, self.addresses = layers, weights[0].device, _addresses(weights, gains)
        self.members: dict[_Kind, list[_Member]] = {}
        self.sizes: dict[torch.dtype, int] = {}
        self.filters = 0
        for i, (layer, w, gain) in enumerate(zip(layers, weights, gains, strict=True)):
            rule, size = layer.rule(), w[0].numel()
            places = (w.data_ptr(), 0 if gain is None else gain.data_ptr())
            is_aligned = aligned(size, places[0])
            kind = _Kind(w.dtype, None if gain is None else gain.dtype, rule.place, is_aligned, size > LARGE)
            start = self.sizes.get(w.dtype, 0)
            entry, behind = (*places, size, rule.divisor(size)), (self.filters, start)
            self.members.setdefault(kind, []).append(_Member(i, len(w), entry, behind, rule.eps))
            self.sizes[w.dtype] = start + -(-w.numel() // 16) * 16
            self.filters += len(w)

    def of(self, weights: Sequence[Tensor], gains: Sequence[Tensor | None]) -> _Batch:
        """The same filters where they lie now: whoever shards parameters moves them between forward and backward."""
        return self if _addresses(weights, gains) == self.addresses else _Batch(self.layers, weights, gains)

    def like(self, weights: Sequence[Tensor]) -> tuple[dict[torch.dtype, Tensor], list[Tensor]]:
        """Memory for one tensor for each weight, by dtype, and these tensors."""
        memory = {dtype: torch.empty(size, dtype=dtype, device=self.device) for dtype, size in self.sizes.items()}
        starts = {m.number: m.behind[1] for members in self.members.values() for m in members}
        return memory, [memory[w.dtype].as_strided(w.shape, w.stride(), starts[i]) for i, w in enumerate(weights)]

    def standardize(self, memory: dict[torch.dtype, Tensor], stats: Tensor) -> None:
        for kind, members in self.members.items():
            counts = tuple(m.filters for m in members)
            places = table(self.device, _tables(members, [()] * len(members)))
            eps = table(self.device, tuple((float(m.eps),) for m in members))
            plan = _standardizing_all(kind, sum(counts), self.filters)
            plan(owners(self.device, counts), places, eps, memory[kind.weight], stats)

    def pull(
        self, gradients: Sequence[Tensor | None], memory: dict[torch.dtype, Tensor], stats: Tensor, g_gain: Tensor
    ) -> None:
        for kind, members in self.members.items():
            given = [(m, g) for m in members if (g := gradients[m.number]) is not None]
            if not given:
                continue
            counts = tuple(m.filters for m, _ in given)
            whole = kind.aligned and not any(g.data_ptr() & 15 for _, g in given)
            places = table(self.device, _tables([m for m, _ in given], [(g.data_ptr(),) for _, g in given]))
            plan = _pulling_all(kind._replace(aligned=whole), sum(counts), self.filters)
            plan(owners(self.device, counts), places, stats, memory[kind.weight], g_gain)


def _addresses(weights: Sequence[Tensor], gains: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in (*weights, *gains)]


class _Together(torch.autograd.Function):
    """Of weights, and behind them as many gains or None."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[StandardizedFilter], *given: Tensor | None) -> tuple[Tensor, ...]:
        weights, gains = given[: len(layers)], given[len(layers) :]
        batch = _Batch(layers, weights, gains)  # pyright: ignore[reportArgumentType] (weights are no None)
        memory, made = batch.like(weights)  # pyright: ignore[reportArgumentType]
        stats = torch.empty((3, batch.filters), dtype=torch.float32, device=batch.device)
        with on(batch.device):
            batch.standardize(memory, stats)
        ctx.batch = batch
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, stats)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, stats = ctx.saved_tensors
        count = len(gradients)
        weights, gains = given[:count], given[count:]
        batch: _Batch = ctx.batch.of(weights, gains)
        if taken_in_formulas(*gradients):  # gradients that are differentiated again
            found = [
                [None, None] if g is None else recomputed_gradients(layer.standardize, (w, gain), g)
                for layer, w, gain, g in zip(batch.layers, weights, gains, gradients, strict=True)
            ]
            return None, *(g for g, _ in found), *(g for _, g in found)
        pairs = zip(gradients, weights, strict=True)
        laid = [None if g is None else laid_out(g, w) for g, w in pairs]
        memory, found = batch.like(weights)
        g_gain = torch.empty_like(stats[0])
        with on(batch.device):
            batch.pull(laid, memory, stats, g_gain)
        parts = g_gain.split([len(w) for w in weights])
        to_gains = [
            None if g is None or gain is None else part.to(gain.dtype).reshape(gain.shape)
            for g, gain, part in zip(gradients, gains, parts, strict=True)
        ]
        return None, *(None if g is None else w for g, w in zip(laid, found, strict=True)), *to_gains


def _is_taken(layer: StandardizedFilter, gain: Tensor | None) -> bool:
    plain = not layer.transposed_filters and not layer.changes_standardized
    return plain and layer.weight.device.type != "meta" and _refusal(layer.weight, gain) is None


def _refusal_together(layers: Sequence[StandardizedFilter]) -> str | None:
    if not layers:
        return "there are no layers"
    if reason := refused_device(layers[0].weight):
        return reason
    if len({layer.weight.device for layer in layers}) > 1:
        return "weights are on several devices"
    if layers[0].weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured, in which a table of addresses would stay what it is"
    return None


@standardize_together.kernel("triton", refusal=_refusal_together, first=True)
def triton_standardize_together(layers: Sequence[StandardizedFilter]) -> list[Tensor]:
    gains = [layer.filter_gain() for layer in layers]
    taken = [i for i, layer in enumerate(layers) if _is_taken(layer, gains[i])]
    made: dict[int, Tensor] = {}
    if taken:
        some = [layers[i] for i in taken]
        given = (*(layer.weight for layer in some), *(gains[i] for i in taken))
        made = dict(zip(taken, _Together.apply(some, *given), strict=True))  # pyright: ignore[reportArgumentType]
    return [made[i] if i in made else layer.standardized() for i, layer in enumerate(layers)]


def _kernels() -> Any:
    from anybatch.kernels import triton_parameter_kernels  # here, since Triton takes a while to import

    return triton_parameter_kernels
