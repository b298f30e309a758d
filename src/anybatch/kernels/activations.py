"""Activations as kernels apply and differentiate them: in place, and from the activation's input alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from anybatch.methods.common import ACTIVATIONS

_aten = torch.ops.aten

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "silu": lambda y: F.silu(y, inplace=True),
    "gelu": _aten.gelu_,
}


def _silu_gradient(g: Tensor, y: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(g, y)
    s = torch.sigmoid(y)  # torch's has no derivative
    return g * s * (1 + y * (1 - s))


_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda g, y: g,
    "relu": lambda g, y: _aten.threshold_backward(g, y, 0),
    "silu": _silu_gradient,
    "gelu": _aten.gelu_backward,
}


def activated_in_place(y: Tensor, activation: str) -> Tensor:
    """One of `anybatch.methods.common.ACTIVATIONS`, known to be one, of ``y``, which it overwrites."""
    return _IN_PLACE[activation](y)


def activation_gradient(g: Tensor, y: Tensor, activation: str) -> Tensor:
    """The gradient of the activation's input ``y`` for the gradient ``g`` of its output; differentiable itself."""
    return _GRADIENTS[activation](g, y)


def refused_activation(activation: str) -> str | None:
    """Why no kernel takes this name, or None."""
    return None if activation in ACTIVATIONS else f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}"


def refused_tracing() -> str | None:
    """Why a kernel with a backward of its own gives way to formulas, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile chooses what it keeps"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records operations of torch"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func and forward-mode differentiation take derivatives of formulas"
    return None


def refused_export() -> str | None:
    """Why an operator of ours does not go into a program, or None."""
    # The flag itself: torch 2.11 takes `torch.compiler.is_exporting()` for true in all that it compiles.
    exporting = torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateUsage]
    return "exported programs are to run anywhere" if exporting else None
