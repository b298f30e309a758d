"""Which layers a model has, which of them normalize, and over what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.methods.batch_channel_norm import _BatchChannelNorm
from anybatch.methods.common import ChannelLayer
from anybatch.methods.derf import DynamicErf
from anybatch.methods.dynamic_tanh import DynamicTanh
from anybatch.methods.evo_norm import EvoNormB0, EvoNormS0
from anybatch.methods.filter_response_norm import _FilterResponseNorm
from anybatch.methods.group_norm import GroupNorm
from anybatch.methods.kernel_norm import _KernelNorm
from anybatch.methods.kn_conv import _KNConv
from anybatch.methods.local_context_norm import _LocalContextNorm
from anybatch.methods.positional_norm import PositionalNorm

Scope = Literal["batch", "sample", "window", "position", "nothing"]
"""Over what a norm takes its statistics; nothing: it takes none."""

REASONS: dict[Scope, str] = {
    "batch": "statistics of each channel over all samples of the batch",
    "sample": "statistics over all positions of one sample",
    "window": "statistics over a window of one sample",
    "position": "statistics over the channels of one position",
    "nothing": "no statistics",
}
_SCOPES: tuple[tuple[Any, Scope], ...] = (
    ((_BatchChannelNorm, EvoNormB0), "batch"),
    ((DynamicTanh, DynamicErf), "nothing"),
    ((GroupNorm, EvoNormS0, _FilterResponseNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm), "sample"),
    ((_KNConv, _KernelNorm, _LocalContextNorm), "window"),
    ((PositionalNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d), "position"),
    (_BatchNorm, "batch"),
)
CONVS = (nn.modules.conv._ConvNd,)
FILTERS = (*CONVS, nn.Linear)
_ROW_BY_ROW = ("conv", "linear", "activation", "pooling", "dropout", "padding", "flatten", "upsampling", "pixelshuffle")


def is_row_by_row(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers that are known to treat each sample for itself."""
    home = type(module).__module__
    return any(home == f"torch.nn.modules.{part}" for part in _ROW_BY_ROW) and not isinstance(
        module, nn.MultiheadAttention
    )


def scope_of(module: nn.Module) -> Scope | None:
    """Over what a norm takes statistics; None for what is no norm, ``"sample"`` for norms that only their name tells.

    Layers of other libraries are known by torch's classes that they derive from, else by their name.
    """
    if "FrozenBatchNorm" in type(module).__name__:
        return "nothing"
    if isinstance(module, (EvoNormB0, EvoNormS0)) and not module.apply_act:
        return "nothing"
    for kinds, scope in _SCOPES:
        if isinstance(module, kinds):
            return scope
    name = type(module).__name__.lower()
    if not re.search("norm(?!ali)", name) or isinstance(module, (nn.Sequential, *FILTERS)) or not _own(module):
        return None
    return "batch" if "batch" in name else "position" if "layernorm" in name or "rmsnorm" in name else "sample"


def _own(module: nn.Module) -> bool:
    """Whether it is a layer, and no block that has norms inside."""
    return not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Norms, and modules without modules inside; what stands inside a norm is the norm's."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or isinstance(module, nn.Identity):
            continue
        norm = scope_of(module) is not None
        if norm:
            inside |= {id(m) for m in module.modules() if m is not module}
        if norm or not any(True for _ in module.children()):
            yield name, module


def values_of(module: nn.Module, x: Tensor) -> int | None:
    """From how many values of its input a norm takes one statistic; None where it takes none, or nobody knows."""
    n, positions = max(len(x), 1), math.prod(x.shape[2:])
    scope = scope_of(module)
    if scope == "batch":
        return n * positions
    if isinstance(module, (_KNConv, _KernelNorm)):
        return x.shape[1] // module.norm_groups * math.prod(module.kernel_size)
    if isinstance(module, _LocalContextNorm):
        sides = (module.window,) * (x.dim() - 2) if isinstance(module.window, int) else module.window
        return module.channels_per_group * math.prod(map(min, sides, x.shape[2:]))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return math.prod(module.normalized_shape)
    if scope == "position" and not isinstance(module, (nn.LocalResponseNorm, nn.CrossMapLRN2d)):
        return x.shape[1]
    if isinstance(module, (nn.modules.instancenorm._InstanceNorm, _FilterResponseNorm)):
        return positions
    groups = getattr(module, "num_groups", None)
    return x.shape[1] // groups * positions if isinstance(groups, int) and scope == "sample" else None


def has_channel_affine(module: nn.Module) -> bool:
    """Whether it is a norm whose scale and shift can be left out to see what it normalized."""
    scope = scope_of(module)
    if scope in (None, "nothing") or isinstance(module, (EvoNormB0, EvoNormS0, _FilterResponseNorm, *CONVS)):
        return False
    return isinstance(module, (ChannelLayer, _BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm))
