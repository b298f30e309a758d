"""Layers in a row of which backward keeps what the first took, and computes anew what they gave each other."""

from __future__ import annotations

from collections.abc import Callable

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
        norm, *between, layer = self
        lean = isinstance(norm, ChannelLayer) and isinstance(norm, TakesActivation)
        if lean and all(isinstance(one, nn.Identity) for one in between) and _is_plain(input):
            return _without_between(norm, layer, input)
        return checkpoint(super().forward, input, use_reentrant=False)


def _is_plain(x: Tensor) -> bool:
    """Whether nothing casts, traces or transforms what is done with it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled(x.device.type)
    )


def _without_between(norm: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(norm(x))``, whose backward runs the norm again for what the layer took.

    A norm that draws nothing and applies its activation keeps its input and a few numbers anyway, so that the layer's
    input is all there is to leave out, without the cost of a checkpoint.
    """
    y = norm(x)
    place, version = (y.data_ptr(), y.shape, y.stride(), y.dtype), x._version

    def anew() -> Tensor:
        if x._version != version:
            raise RuntimeError("the input of a Recomputed was overwritten before backward, which needs it")
        with torch.no_grad():
            return norm(x)

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        return anew if (kept.data_ptr(), kept.shape, kept.stride(), kept.dtype) == place else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(y)
