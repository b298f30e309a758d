"""What methods share: wide statistics, a scale and shift for each channel, and the shapes a layer takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.scheme import check_count, check_number


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 or wider, in which statistics are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(values_c: Tensor, dims: int) -> Tensor:
    """One value a channel, (C,), shaped to go with (N, C, *) of so many dimensions."""
    return values_c.reshape(1, -1, *(1 for _ in range(dims - 2)))


def scaled_and_shifted(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``y * weight + bias`` channel by channel; None stands for 1 and for 0."""
    if weight is not None:
        _check_channels("weight", weight, y)
        y = y * per_channel(weight, y.dim())
    if bias is not None:
        _check_channels("bias", bias, y)
        y = y + per_channel(bias, y.dim())
    return y


def _check_channels(name: str, values_c: Tensor, y: Tensor) -> None:
    # Others would be spread over the channels, or the channels over them.
    if values_c.numel() != y.shape[1]:
        raise ValueError(f"{name} is of {values_c.numel()} channels, x has {y.shape[1]}")


def check_has_channels(x: Tensor) -> None:
    """Raise a `ValueError` unless ``x`` is (N, C, *), and a `TypeError` unless it is floating point."""
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, *), got shape {tuple(x.shape)}")
    check_floating("x", x)


def check_floating(name: str, t: Tensor) -> None:
    """Raise a `TypeError` unless a tensor is floating point: others would round what is computed, to 0 mostly."""
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}; convert it, as by {name}.float()")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
"""What an op with the argument ``activation`` applies to its result."""


def activated(y: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS` of ``y``; a `ValueError` names them."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation](y)


_MODULES: dict[str, type[nn.Module]] = {"none": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class Taken(nn.Identity):
    """In the place of an activation that the layer in front applies: who exchanges that layer has to put it back."""


class TakesActivation:
    """A layer that can apply the activation behind it itself, and then keeps one tensor for backward in place of two.

    `anybatch.models.blocks.Pieces` asks it to. Names and state dict stay as they are.
    """

    activation: str = "none"
    """A key of `ACTIVATIONS`."""
    takes_residual: ClassVar[bool] = False
    """Whether it can also add what is given to it behind its input, in front of the activation."""

    def take_activation(self, act: nn.Module) -> bool:
        """Apply ``act`` from now on and return True, or return False where it is none of `ACTIVATIONS`."""
        name = {kind: name for name, kind in _MODULES.items()}.get(type(act))
        if name is None or getattr(act, "approximate", "none") != "none":
            return False
        self.activation = name
        return True

    def keeps_input_alone(self, x: Tensor) -> bool:
        """Whether for an input like ``x`` nothing else of its size is kept for backward."""
        return True

    def shown_activation(self) -> str:
        """The end of `extra_repr`: empty where there is no activation."""
        return "" if self.activation == "none" else f", activation={self.activation}"

    def taken_activation(self) -> nn.Module:
        """What `take_activation` was given, anew."""
        return _MODULES[self.activation]()


class ChannelLayer(nn.Module):
    """A function of (N, C, *) with a scale and a shift for each channel; methods give `normalize`.

    Args:
        num_channels: C.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If there is not at least one channel; in `forward`, if the input has another number of channels or,
            in classes for 1d, 2d or 3d data, of dimensions. These take one sample without N too.
        TypeError: In `forward`, if the input is not floating point.
    """

    dims: ClassVar[int | None] = None
    """Spatial dimensions of the data; None for any number."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_channels", num_channels)
        self.num_channels = num_channels
        self.affine = affine
        self._starts: dict[str, float] = {}
        self.learn("weight", 1.0 if affine else None, device=device, dtype=dtype)
        self.learn("bias", 0.0 if affine else None, device=device, dtype=dtype)

    def learn(
        self,
        name: str,
        start: float | None,
        size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add a parameter of ``size`` values, C by default, that starts at one value, or is None if that is None."""
        if start is None:
            self.register_parameter(name, None)
            return
        values = torch.full((size or self.num_channels,), float(start), device=device, dtype=dtype)
        self.register_parameter(name, nn.Parameter(values))
        self._starts[name] = start

    def reset_parameters(self) -> None:
        """Set every parameter to the value it starts at; the scale to 1, the shift to 0."""
        for name, start in self._starts.items():
            nn.init.constant_(self.get_parameter(name), start)

    def normalize(self, x: Tensor) -> Tensor:
        """(N, C, *) to (N, C, *)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        alone = self.dims is not None and x.dim() == self.dims + 1
        x = x.unsqueeze(0) if alone else x
        if self.dims is not None and x.dim() != self.dims + 2:
            raise ValueError(
                f"{type(self).__name__} takes (N, C, *) or (C, *) with {self.dims} spatial dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"{type(self).__name__} is made for {self.num_channels} channels, got x of shape {tuple(x.shape)}"
            )
        check_floating("x", x)  # before anything is counted in
        y = self.normalize(x)
        return y.squeeze(0) if alone else y

    def extra_repr(self) -> str:
        return f"{self.num_channels}, affine={self.affine}"


class ChannelNorm(ChannelLayer):
    """A `ChannelLayer` that divides by a root to whose radicand ``eps`` is added.

    Args:
        num_channels: C.
        eps: Added to the variance.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, affine, device=device, dtype=dtype)
        check_number("eps", eps)
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"
