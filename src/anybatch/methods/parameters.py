"""What a parameter is: a filter, whose rows are units, or a vector of gains or biases; and which one classifies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from anybatch.methods.common import ChannelLayer
from anybatch.suggest import unknown

_FILTERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    ChannelLayer,
)


class Place(NamedTuple):
    """Where a parameter is: its full name, and the module that holds it."""

    name: str
    module: nn.Module
    key: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stands there now; sharding a model exchanges it."""
        return getattr(self.module, self.key)


def places(model: nn.Module) -> Iterator[Place]:
    """Each parameter once, in the order of ``model.parameters()``."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                yield Place(f"{path}.{key}" if path else key, module, key)


def shapeless(model: nn.Module) -> list[str]:
    """Names of parameters and buffers of lazy layers that no batch has shaped yet."""
    return [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]


def is_filter(place: Place) -> bool:
    """Whether it is the weight of a linear layer, a convolution or an embedding."""
    return place.key == "weight" and isinstance(place.module, _FILTERS)


def is_vector(p: Tensor, module: nn.Module | None = None) -> bool:
    """Whether a parameter counts as one vector: gains, biases, scales and single numbers.

    These are the parameters with at most one dimension larger than 1, so (C, 1, 1, 1) too, as the gains of timm's
    Scaled WS; and all parameters of a norm.
    """
    return sum(size > 1 for size in p.shape) <= 1 or isinstance(module, _NORMS)


def decays(place: Place) -> bool:
    """Whether weight decay acts on it: on filters and whatever else is no vector."""
    return is_filter(place) or not is_vector(place.parameter, place.module)


def bare(model: nn.Module) -> nn.Module:
    """The model itself, where data parallelism or compilation is wrapped around it."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or _parallel(model), nn.Module):
        model = inner
    return model


def _parallel(model: nn.Module) -> Any:
    return model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None


def classifier(model: nn.Module) -> str | None:
    """The name of the layer that gives the classes; None where a model says that it has none.

    It is what ``get_classifier()`` returns, else what timm's ``pretrained_cfg["classifier"]`` names, else ``fc``,
    ``head.fc``, ``head`` or ``classifier``; in a sequence, its last linear layer or convolution.

    Raises:
        ValueError: If there is none of these; the message lists the model's layers.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    for found in _candidates(model):
        if isinstance(found, nn.Identity):
            return None
        if isinstance(found, nn.Module) and id(found) in names:
            weighty = [m for m in found.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
            if weighty:
                return names[id(weighty[-1])]
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    raise ValueError(
        f"cannot tell which layer of {type(model).__name__} is the classifier: it has no get_classifier(), and none of "
        f"{', '.join(_COMMON)}; name it, as in exclude={layers[-1] if layers else 'fc'!r}"
    )


_COMMON = ("fc", "head.fc", "head", "classifier")


def _candidates(model: nn.Module) -> Iterator[Any]:
    get = getattr(model, "get_classifier", None)
    if callable(get):
        yield get()
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    named = config.get("classifier") if isinstance(config, Mapping) else None
    modules = dict(model.named_modules())
    for name in ([named] if isinstance(named, str) else []) + list(_COMMON):
        if name in modules:
            yield modules[name]


def matched(model: nn.Module, names: tuple[str, ...]) -> set[str]:
    """The parameters that are meant: each name is a parameter's, or a layer's, which means the layer's weight.

    Raises:
        ValueError: If a name means nothing in this model; the nearest that do are named.
    """
    known = {place.name for place in places(model)}
    found: set[str] = set()
    for name in names:
        if name in known:
            found.add(name)
        elif f"{name}.weight" in known:
            found.add(f"{name}.weight")
        else:
            layers = {place.name.rpartition(".")[0] for place in places(model) if place.key == "weight"} - {""}
            raise unknown("parameter or layer", name, known | layers, where=f" of {type(model).__name__}")
    return found
