"""What is constant in evaluation, computed once: BatchNorm into filters, filters standardized or centered."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from anybatch.convert.graph import Graphs
from anybatch.convert.kinds import as_affine, changed, has_averages, is_constant, own_forward, wide
from anybatch.methods.batch_channel_norm import _BatchChannelNorm
from anybatch.methods.filters import StandardizedFilter
from anybatch.methods.kn_conv import _KNConv
from anybatch.methods.parameters import bare, shapeless

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STANDARDIZING = (
    *("gain", "weight_gamma", "weight_beta", "eps", "variant", "gamma", "eps_rule", "affine"),
    *("scale", "same_pad"),  # timm's
)
_PLAIN: tuple[type[nn.Module], ...] = (*_CONVS, *_TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did, by the names of layers."""

    folded: dict[str, str] = field(default_factory=dict)
    """What became of each layer that was folded."""
    left: dict[str, str] = field(default_factory=dict)
    """Why each other BatchNorm, standardized filter or KNConv stayed what it was."""

    def __str__(self) -> str:
        told = [f"{len(self.folded)} layers folded, {len(self.left)} left"]
        return "\n".join([*told, *(f"{name}: {why}" for name, why in self.left.items())])


@overload
def fold(model: nn.Module, inplace: bool = False, *, return_report: Literal[False] = False) -> nn.Module: ...


@overload
def fold(model: nn.Module, inplace: bool = False, *, return_report: Literal[True]) -> tuple[nn.Module, FoldReport]: ...


@torch.no_grad()
def fold(
    model: nn.Module, inplace: bool = False, *, return_report: bool = False
) -> nn.Module | tuple[nn.Module, FoldReport]:
    """The same function as a network in evaluation, with fewer passes: for inference, not for further training.

    - BatchNorm becomes part of the convolution, transposed convolution or linear layer that feeds it: torch's, with
      its SyncBatchNorm and what `freeze_batchnorm` froze, ours, torchvision's and timm's, also frozen. An activation
      that such a layer holds stays in its place.
    - So does the batch part of Batch-Channel Norm, of which group normalization is left.
    - Filters of Weight Standardization and Scaled Weight Standardization, ours and timm's, are standardized, gains
      included, and their layers become torch's.
    - Filters of KNConv are centered (in half precision the layer stays as it is, since rounding undoes it).

    Which layer feeds which is read off a trace (`anybatch.convert.graph.Graphs`). A network that cannot be traced is
    traced in parts, each of which is taken to be used through its ``forward``, with its required arguments. A BatchNorm
    is left where its input is used elsewhere too, where it or the layer in front is called more than once, and where it
    takes statistics of the batch. Computed in float64 and rounded to the layers' dtype.

    Args:
        model: Any network in evaluation mode.
        inplace: Whether to change the network itself, instead of a copy.
        return_report: Whether to tell what was done too.

    Returns:
        The folded network, whose parameters ask for no gradients; with ``return_report`` that and a `FoldReport`.

    Raises:
        ValueError: If the model is in training mode, a lazy layer has seen no input yet, or it cannot be copied.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> fold(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    model = ready(model)
    if model.training:
        raise ValueError("the model is in training mode, where BatchNorm takes statistics of the batch; call eval()")
    model = model if inplace else copied(model)
    report = FoldReport()
    graphs = Graphs(model)
    for name, module in model.named_modules():
        if isinstance(module, _KNConv):
            reason, done = _center(module), "centered"
        elif (made := _standardized(module)) is not None:
            reason, done = made if isinstance(made, str) else _bake(module, made), "standardized"
        else:
            continue
        if reason is None:
            report.folded[name] = done
        else:
            report.left[name] = reason
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    inner = {module.bn for module in modules.values() if isinstance(module, _BatchChannelNorm)}
    for name, module in modules.items():
        if not is_constant(module) or module in inner:
            continue
        layer = _feeding(graphs, module)
        reason = layer if isinstance(layer, str) else _join(layer, module)
        if isinstance(layer, str) or reason is not None:
            report.left[name] = str(reason)
            continue
        report.folded[name] = f"folded into {names[layer]}"
        _place(model, places[module], _behind(module, isinstance(layer, nn.Linear)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return (model, report) if return_report else model


def ready(model: nn.Module) -> nn.Module:
    """The network itself, out of wrappers; a `ValueError` where its layers cannot be seen or have no shapes yet."""
    model = bare(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("the model is compiled to TorchScript; give the module that it was made from")
    if lazy := shapeless(model):
        raise ValueError(f"{lazy[0]} has no shape before the model has seen an input; call the model once")
    return model


def copied(model: nn.Module) -> nn.Module:
    """A copy; a `ValueError` where there is none, as of a model that holds a tensor of a graph."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # of whatever the model holds
        raise ValueError(f"the model cannot be copied: {' '.join(str(error).split())[:200]}") from None


def _set(layer: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    """A parameter of its own: the old one may be another layer's too."""
    setattr(layer, name, nn.Parameter(value.to(like.device, like.dtype), requires_grad=False))


def _standardized(layer: nn.Module) -> Tensor | str | None:
    """The filters that a standardized layer multiplies with, why they are not constant, or None for other layers."""
    if not isinstance(layer, StandardizedFilter) and type(layer).__module__ != "timm.layers.std_conv":
        return None
    if (reason := changed(layer)) is not None:
        return reason
    if isinstance(layer, StandardizedFilter):
        known = type(layer).forward.__module__.startswith("anybatch.methods.")
        return layer.standardized() if known else f"{type(layer).__name__} has a forward of its own"
    theirs = cast(Any, layer)
    if getattr(theirs, "same_pad", False):
        return "it pads as it finds its input"
    gain = (theirs.gain * theirs.scale).flatten() if hasattr(theirs, "gain") else None
    rows = theirs.weight.reshape(1, len(theirs.weight), -1)
    return F.batch_norm(rows, None, None, gain, training=True, eps=theirs.eps).reshape_as(theirs.weight)


def _bake(layer: nn.Module, filters: Tensor) -> None:
    """Make a standardized layer a plain one with these filters."""
    for name in _STANDARDIZING:
        if hasattr(layer, name):
            delattr(layer, name)
    _set(layer, "weight", filters, layer.get_parameter("weight"))
    layer.__class__ = next(kind for kind in type(layer).__mro__ if kind in _PLAIN)


def _center(layer: _KNConv) -> str | None:
    """Center a KNConv's filters for good, or say why not."""
    if (reason := changed(layer)) is not None:
        return reason
    if layer.weight.dtype.itemsize < 4:
        return f"{str(layer.weight.dtype).removeprefix('torch.')} rounds filters that were centered"
    if layer.groups != layer.norm_groups:
        return "its filters read a part of the channels that are normalized together, and need their own sum"
    filters = wide(layer.weight)
    _set(layer, "weight", filters - filters.mean(tuple(range(1, filters.dim())), keepdim=True), layer.weight)
    layer.centered = True
    return None


def _batch_part(norm: nn.Module) -> nn.Module:
    return norm.bn if isinstance(norm, _BatchChannelNorm) else norm


def _feeding(graphs: Graphs, norm: nn.Module) -> nn.Module | str:
    """The layer that feeds a constant BatchNorm, or why there is none to fold into."""
    reason = changed(norm) or _varying(norm)
    return feeding_layer(graphs, norm) if reason is None else reason


def feeding_layer(graphs: Graphs, norm: nn.Module) -> nn.Module | str:
    """The linear layer whose output a norm alone takes, each called once, or why there is none."""
    reason = graphs.obstacle(norm)
    if reason is not None:
        return reason
    arguments = graphs.call(norm).args
    source: Any = arguments[0] if arguments else None
    while isinstance(source, fx.Node):
        if len(source.users) > 1:
            return f"its input, {_shown(source)}, is used elsewhere too"
        module = graphs.module(source)
        if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
            source = source.args[0] if source.args else None
            continue
        if module is None or not takes_filters(module):
            return f"its input is no linear layer's: {_shown(source)}"
        reason = changed(module) or graphs.obstacle(module)
        return module if reason is None else f"{source.target} feeds it, and {reason}"
    return "nothing certain is known of its input"


def _shown(node: fx.Node) -> str:
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return "the network's own input" if node.op == "placeholder" else str(node.target)


def _varying(norm: nn.Module) -> str | None:
    """Why a BatchNorm is no constant scale and shift, or None."""
    if (reason := own_forward(norm)) is not None:
        return reason
    batch = _batch_part(norm)
    if batch.training:
        return "it is in training mode"
    if has_averages(batch):
        return None
    return "it keeps no running averages, and takes statistics of each batch"


def takes_filters(module: nn.Module) -> bool:
    """Whether it is affine in its filters and biases as torch's layers are, and nothing more."""
    kind = next((kind for kind in type(module).__mro__ if kind in _PLAIN), None)
    if kind is None:
        return False
    if type(module).__module__ == "timm.layers.conv2d_same":  # which pads first
        return True
    own = ("forward", "_conv_forward") if issubclass(kind, _CONVS) else ("forward",)
    return all(getattr(type(module), name) is getattr(kind, name) for name in own)


def _join(layer: Any, norm: Any) -> str | None:
    """Fold the norm's scale and shift into the layer, or say why not."""
    weight: Tensor = layer.weight
    transposed = isinstance(layer, _TRANSPOSED)
    out = layer.weight.shape[1] * layer.groups if transposed else layer.weight.shape[0]
    batch: Any = _batch_part(norm)
    if batch.running_mean.numel() != out:
        return f"it has {batch.running_mean.numel()} channels, and what feeds it {out}"
    scale, shift = as_affine(batch, norm.eps)
    bias = shift if layer.bias is None else shift + wide(layer.bias) * scale
    filters = wide(weight)
    positions = (1,) * (weight.dim() - 2)
    if transposed:  # (I, O / groups, *)
        by_group = filters.unflatten(0, (layer.groups, -1)) * scale.reshape(layer.groups, 1, -1, *positions)
        folded = by_group.flatten(0, 1)
    else:
        folded = filters * scale.reshape(-1, 1, *positions)
    _set(layer, "weight", folded, weight)
    _set(layer, "bias", bias, weight)
    return None


class _Rows(nn.Module):
    """In the place of a BatchNorm behind a linear layer.

    Its channels are the layer's outputs where there is one row for each sample, which no trace shows.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"a linear layer with BatchNorm folded into it gives (N, C), got shape {tuple(x.shape)}")
        return x


def _behind(norm: nn.Module, rows: bool) -> nn.Module:
    """What is left of a norm that is folded: what it does behind normalizing by constants."""
    if isinstance(norm, _BatchChannelNorm):
        return norm.group_part()
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    parts = [_Rows(), *parts] if rows else parts
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()


def _place(model: nn.Module, names: list[str], module: nn.Module) -> None:
    module.eval()
    for name in names:
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, module)
