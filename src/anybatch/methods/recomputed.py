"""Layers in a row of which backward keeps what the first took, and computes anew what they gave each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anybatch.methods.common import ChannelLayer, TakesActivation


class Recomputed(nn.Sequential):
    """A norm, the activation behind it and the convolution that takes both, with half of what they keep for backward.

    In training the norm's input alone is kept. Backward runs norm and activation again, for what the convolution took,
    and not the convolution; so it costs two passes over the map. Values, gradients and random numbers are those of
    ``nn.Sequential``, and so are the names of parameters. Any layers will do; of several convolutions all but the last
    are run again.

    Args:
        *layers: In order.

    Shape:
        What the first layer takes to what the last gives.

    Raises:
        ValueError: If one is a BatchNorm, whose running averages would take in each batch twice.

    Source:
        Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.

    >>> conv = nn.Conv2d(8, 8, 3, padding=1)
    >>> Recomputed(nn.GroupNorm(2, 8), nn.ReLU(), conv)(torch.ones(1, 8, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, *layers: nn.Module) -> None:
        for layer in layers:
            for module in layer.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    raise ValueError(
                        f"{type(module).__name__} would let each batch into its running averages twice; take a norm "
                        f"that keeps none, or Batch-Channel Norm, which notices"
                    )
        super().__init__(*layers)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        layers = list(self)
        if len(layers) > 1 and _is_plain(input) and _keeps_input_alone(layers[:-1], input):
            return _without_between(layers[:-1], layers[-1], input)
        return checkpoint(super().forward, input, use_reentrant=False)


def _keeps_input_alone(front: list[nn.Module], x: Tensor) -> bool:
    """Whether it is a norm that draws nothing and applies its activation, with identities behind."""
    norm, *behind = front
    return (
        isinstance(norm, ChannelLayer)
        and isinstance(norm, TakesActivation)
        and norm.keeps_input_alone(x)
        and all(isinstance(one, nn.Identity) for one in behind)
    )


def _is_plain(x: Tensor) -> bool:
    """Whether nothing casts, traces or transforms what is done with it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled(x.device.type)
    )


def _without_between(front: list[nn.Module], layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(front(x))``, whose backward runs the front again for what the layer took.

    The front keeps its input and a few numbers anyway, so that the layer's input is all there is to leave out, without
    the cost of a checkpoint.
    """

    def run() -> Tensor:
        y = x
        for one in front:
            y = one(y)
        return y

    def anew() -> Tensor:
        if x._version != version:
            raise RuntimeError("the input of a Recomputed was overwritten before backward, which needs it")
        with torch.no_grad():
            return run()

    def told(t: Tensor) -> tuple[Any, ...]:
        return t.data_ptr(), t.shape, t.stride(), t.dtype, t._version  # that of what was overwritten since is another

    y = run()
    between, version = told(y), x._version

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        return anew if told(kept) == between else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(y)
