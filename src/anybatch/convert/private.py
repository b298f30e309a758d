"""What Opacus needs beyond norms: nothing in place, no buffers beside parameters that are trained."""

from __future__ import annotations

from torch import Tensor, nn

from anybatch.convert.out_of_place import make_out_of_place
from anybatch.per_sample import prepare_for_opacus

_FILTERS = ("weight_gamma", "weight_beta")


def make_private(model: nn.Module) -> nn.Module:
    """Make a converted network one that Opacus accepts and trains, in place.

    Activations and sums give new tensors; a block whose own ``forward`` adds in place becomes a graph of it with the
    same children. The scale and shift that keep standardized filters are no buffers any more, but parameters that ask
    for no gradients.

    Returns:
        The model, or a graph of it where its own ``forward`` adds in place.

    Raises:
        ImportError: If Opacus is not installed.
        ValueError: If a layer stays that depends on other samples.
    """
    check_private(model)
    for module in list(model.modules()):
        if isinstance(getattr(module, "weight_gamma", None), Tensor):
            for name in _FILTERS:
                value = module._buffers.pop(name)
                if value is not None:
                    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return make_out_of_place(prepare_for_opacus(model))


def check_private(model: nn.Module) -> None:
    """Raise a `ValueError` where a layer's output depends on other samples, by what it keeps of them."""
    for name, module in model.named_modules():
        own = [key for key, _ in module.named_buffers(recurse=False) if key not in _FILTERS]
        if own and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(
                f"dp=True: {name} ({type(module).__name__}) keeps {own[0]} of other samples, which Opacus refuses; "
                f"convert it too, or take another scheme such as 'gn'"
            )
