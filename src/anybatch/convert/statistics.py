"""Population statistics by a pass over data, and freezing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.methods.batch_norm import channel_moments
from anybatch.methods.parameters import bare


class _Frozen(nn.Module):
    """Stands before the class of a frozen layer: the layer stays in evaluation, whatever its network does."""

    def train(self, mode: bool = True) -> _Frozen:
        super().train(mode)
        self.training = False
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _frozen_anew, (type(self).__mro__[2],), self.__getstate__()


@functools.cache
def _frozen_class(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Frozen{kind.__name__}", (_Frozen, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _frozen_anew(kind: type[_BatchNorm]) -> _BatchNorm:
    frozen = _frozen_class(kind)
    return frozen.__new__(frozen)


def freeze_batchnorm(model: nn.Module) -> list[str]:
    """Freeze statistics, scale and shift of every BatchNorm in a model, in place; ``model.train()`` does not undo it.

    The layers stay what they are (torch's 1d, 2d and 3d and SyncBatchNorm, timm's BatchNormAct2d, ours), under their
    names and with their state dict, but they normalize by their running averages in training too, and their parameters
    ask for no gradient and lose the one they have. Dropout and activation inside such a layer keep following the mode.
    Convert to SyncBatchNorm before freezing, not after: torch's conversion makes new layers. Estimated statistics of
    Batch-Channel Norm are left to learn.

    Args:
        model: Any network; one without BatchNorm is left as it is.

    Returns:
        Names of the layers frozen now; those that were frozen before are not among them.

    Raises:
        ValueError: If a layer keeps no running averages, so that there is nothing to freeze.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> freeze_batchnorm(model), model.train()[1].training
    (['1'], False)
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and not isinstance(m, _Frozen)}
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(
                f"layer {name!r} keeps no running averages (track_running_stats=False), so that it cannot be frozen"
            )
    for layer in layers.values():
        own = dict(layer.named_parameters(recurse=False))
        layer.__dict__["_asked_gradient"] = [name for name, p in own.items() if p.requires_grad]
        for p in own.values():
            p.requires_grad_(False)
            p.grad = None
        layer.__class__ = _frozen_class(type(layer))
        layer.training = False
    return list(layers)


def unfreeze_batchnorm(model: nn.Module) -> list[str]:
    """Undo `freeze_batchnorm`: the layers follow the model's mode again, and the same parameters ask for gradients.

    Args:
        model: Any network.

    Returns:
        Names of the layers that were frozen.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _Frozen)}
    for layer in layers.values():
        layer.__class__ = type(layer).__mro__[2]
        layer.training = model.training
        for name in layer.__dict__.pop("_asked_gradient"):
            layer.get_parameter(name).requires_grad_(True)
    return list(layers)


@dataclass
class _Population:
    """Moments of one layer's channels over the batches so far, in float64 on the CPU."""

    count: int = 0
    batches: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    means: Tensor | float = 0.0
    variances: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        count = x.numel() // x.shape[1]
        mean, squares = (moment.cpu().double() for moment in channel_moments(x))
        drift = mean - self.mean
        total = self.count + count
        self.squares = self.squares + squares + drift.square() * (self.count * count / total)
        self.mean = self.mean + drift * (count / total)
        self.means = self.means + mean
        self.variances = self.variances + squares / (count - 1)
        self.count, self.batches = total, self.batches + 1

    def estimate(self, estimator: str) -> tuple[Any, Any]:
        if estimator == "pooled":
            return self.mean, self.squares / self.count
        return self.means / self.batches, self.variances / self.batches


@torch.no_grad()
def precise_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = 200,
    estimator: Literal["pooled", "mean"] = "pooled",
    tell: Callable[[int], object] | None = None,
) -> list[str]:
    """Set the running averages of every BatchNorm to population statistics, by a pass over data with fixed weights.

    Running averages lag behind the weights, and at small batches they are noisy; the original paper takes statistics
    anew when training is over. BatchNorm normalizes each batch by its own statistics during the pass, as in training,
    so that those of a deep layer are statistics behind layers that normalize so; dropout and all else evaluate.

    ``estimator="pooled"`` takes mean and variance of all values together, whatever the batches: the variance is that
    within batches plus that of their means (law of total variance). ``estimator="mean"`` is the original paper's, the
    average of batch means and the average of unbiased batch variances, ``E[var_B] m / (m - 1)`` with m values in a
    channel, each batch alike (torch's ``momentum=None``). It leaves the variance of the batch means to m / (m - 1),
    which would do for independent values; but pixels of one image are not, so that with one image a batch it misses
    most of the variance. Where batches are large the two agree. No estimate is right for a network that was trained
    with statistics of single images: it has never seen others.

    Layers that are frozen are left as they are: by `freeze_batchnorm`, or by being in evaluation while the model is in
    training. So are layers without running averages, layers that no batch reaches and ``num_batches_tracked``. Modes
    are put back on every exit, and on an error no statistics are set. Statistics of other processes are not joined.

    Args:
        model: Any network, on any device, in training or evaluation.
        loader: Gives batches: tensors, or tuples or lists whose first item is the tensor for the model.
        batches: How many to take at most; None for all.
        estimator: ``"pooled"`` or ``"mean"``.
        tell: Called with the number of batches done after each.

    Returns:
        Names of the layers whose statistics were set.

    Raises:
        ValueError: If the model has no BatchNorm to set or calls none, the loader is empty or gives something else than
            told above, or a batch leaves one value in a channel or values that are not finite; if an option is none of
            those named.

    Source:
        Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.1 and algorithm 2 (``"mean"``); Wu and Johnson 2021,
        "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3 (``"pooled"``).
    """
    if estimator not in ("pooled", "mean"):
        raise ValueError(f"estimator={estimator!r} is neither 'pooled' nor 'mean'")
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f"batches={batches!r} is not 1 or more; None takes all")
    model = bare(model)  # a compiled model runs no hooks that come later
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not isinstance(layer, _Frozen)
        if layer.training or not model.training
    }
    if not layers:
        raise ValueError("the model has no BatchNorm whose statistics could be set: it has none, or all are frozen")
    populations = {name: _Population() for name in layers}
    done = 0
    with _only_batchnorm_in_training(model, layers.values()), _watched(layers, populations):
        for done, batch in enumerate(itertools.islice(loader, batches), 1):
            model(_input(batch, model))
            if tell is not None:
                tell(done)
    if not done:
        raise ValueError("the loader is empty: statistics need a batch or more")
    found = {name: population for name, population in populations.items() if population.batches}
    if not found:
        raise ValueError(f"the model called none of its BatchNorm layers ({', '.join(layers)})")
    estimates = {name: population.estimate(estimator) for name, population in found.items()}
    for name, moments in estimates.items():
        if not all(moment.isfinite().all() for moment in moments):
            raise ValueError(f"layer {name!r} got values that are not finite, or too large; no statistics are set")
    for name, moments in estimates.items():
        averages = layers[name].running_mean, layers[name].running_var
        for average, value in zip(averages, moments, strict=True):
            cast(Tensor, average).copy_(value)
    return list(found)


def _input(batch: Any, model: nn.Module) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise ValueError(
            f"the loader gave a {type(batch).__name__}, whose input would be a {type(x).__name__}; give tensors or "
            f"(x, y) pairs, as by (batch['image'] for batch in loader)"
        )
    parameter = next(itertools.chain(model.parameters(), model.buffers()))
    return x.to(parameter.device)


@contextmanager
def _only_batchnorm_in_training(model: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """These layers normalize by the statistics of their batch and keep none of it; every other module evaluates."""
    modes = [(module, module.training) for module in model.modules()]
    tracked = [(layer, layer.track_running_stats) for layer in layers]
    try:
        for module, _ in modes:
            module.training = False
        for layer, _ in tracked:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, tracks in tracked:
            layer.track_running_stats = tracks


@contextmanager
def _watched(layers: dict[str, _BatchNorm], populations: dict[str, _Population]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if x.numel() <= x.shape[1]:
                raise ValueError(
                    f"layer {name!r} got {'one' if x.numel() else 'no'} value in each channel, x of shape "
                    f"{tuple(x.shape)}, which has no variance; give larger batches or larger inputs"
                )
            populations[name].add(x)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
