"""Positional normalization, and the moment shortcut that gives back later what it took away."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from anybatch.dispatch import op
from anybatch.methods.common import (
    ChannelNorm,
    TakesActivation,
    activated,
    check_has_channels,
    scaled_and_shifted,
    widened,
)
from anybatch.scheme import Scheme, check_flag, check_number


def _check_channels(channels: int, what: str) -> None:
    if channels == 1:
        raise ValueError(
            f"{what} has one channel, which normalizing each position over its channels would erase; use another norm"
        )


def _centered_and_variance(x: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` without its mean, the mean and the variance, each (N, 1, *), in float32 or wider."""
    check_has_channels(x)
    _check_channels(x.shape[1], f"x of shape {tuple(x.shape)}")
    # Two passes by hand: torch.var_mean over a dimension that is not the last costs dozens of copies on a CPU.
    x = widened(x)
    mean = x.mean(1, keepdim=True)
    centered = x - mean
    var = centered.square().mean(1, keepdim=True)
    return centered, mean, var * (x.shape[1] / (x.shape[1] - 1)) if unbiased else var


@op
def positional_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unbiased: bool = False,
    activation: str = "none",
) -> Tensor:
    """Normalize each position of each sample over its channels.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias)``, with the biased variance unless told otherwise. Without
    weight and bias it is the paper's; with them it is ConvNeXt's layer norm over channels, whose eps is 1e-6.
    Statistics are taken in float32 or wider.

    Args:
        x: (N, C, *), floating point, any memory format, which the result keeps.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to the variance, so its unit is that of ``x`` squared.
        unbiased: Whether to divide by C - 1, as the released code does, and not by C, as the paper's equation.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"``. As part of the op it keeps no tensor for backward.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, or one channel, which normalizing would erase; if there is no
            such activation.

    Source:
        Li et al. 2019, "Positional Normalization", arXiv:1907.04312.
    """
    centered, _, var = _centered_and_variance(x, unbiased)
    y = scaled_and_shifted(centered * torch.rsqrt(var + eps), weight, bias)
    return activated(y, activation).to(x.dtype)


@op
def positional_moments(x: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> Tensor:
    """Mean and standard deviation of each position over its channels: what `positional_norm` takes away.

    Args:
        x: (N, C, *), floating point.
        eps: Added to the variance under the root.
        unbiased: Whether to divide by C - 1, as the released code does, and not by C, as the paper's equation.

    Returns:
        (2, N, 1, *), to be unpacked as ``mean, std``, in float32 or wider. ``moment_shortcut(positional_norm(x), mean,
        std)`` is ``x``.

    Raises:
        ValueError: If ``x`` has no channel dimension, or one channel.

    Source:
        Li et al. 2019, "Positional Normalization", arXiv:1907.04312.

    >>> mean, std = positional_moments(torch.tensor([[1.0, 3.0]]), eps=0.0)
    >>> mean.item(), std.item()
    (2.0, 1.0)
    """
    _, mean, var = _centered_and_variance(x, unbiased)
    return torch.stack([mean, torch.sqrt(var + eps)])


def moment_shortcut(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``x * std + mean``: the moments that `positional_norm` took away from an early layer, given to a late one.

    Args:
        x: (N, C, *), with any number of channels.
        mean: (N, 1, *), from `positional_moments` of a map with the positions of ``x``.
        std: (N, 1, *), likewise.

    Returns:
        (N, C, *), with the dtype of ``x``.

    Raises:
        ValueError: If the moments are of other positions or samples than ``x``.

    Source:
        Li et al. 2019, "Positional Normalization", arXiv:1907.04312.
    """
    for name, moment in (("mean", mean), ("std", std)):
        if moment.shape != (x.shape[0], 1, *x.shape[2:]):
            raise ValueError(
                f"{name} must be (N, 1, *) with the positions of x, {(x.shape[0], 1, *x.shape[2:])}, "
                f"got shape {tuple(moment.shape)}"
            )
    return (widened(x) * std + mean).to(x.dtype)


class PositionalNorm(TakesActivation, ChannelNorm):
    """Positional normalization; see `anybatch.functional.positional_norm`.

    With ``affine=False`` it is the paper's. With a scale and a shift, and ``eps=1e-6``, it is ConvNeXt's LayerNorm2d
    (timm's too), whose state dict it loads.

    Args:
        num_channels: C, 2 or more.
        eps: Added to the variance.
        affine: Whether to learn ``weight`` (C,), first 1, and ``bias`` (C,), first 0.
        unbiased: Whether to divide by C - 1, as the released code does, and not by C, as the paper's equation.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *) to (N, C, *).

    Raises:
        ValueError: If there is one channel, which normalizing would erase.

    Source:
        Li et al. 2019, "Positional Normalization", arXiv:1907.04312.

    >>> PositionalNorm(64)(torch.randn(1, 64, 1, 1)).shape
    torch.Size([1, 64, 1, 1])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        unbiased: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)
        _check_channels(num_channels, f"{type(self).__name__} with num_channels=1")
        self.unbiased = unbiased

    def normalize(self, x: Tensor) -> Tensor:
        options = {"eps": self.eps, "unbiased": self.unbiased, "activation": self.activation}
        return positional_norm(x, self.weight, self.bias, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, unbiased={self.unbiased}{self.shown_activation()}"


class MomentShortcut(nn.Module):
    """Positional normalization before a part of a network, and the moments it took away given back behind it.

    ``y = body((x - mean) / std) * std + mean``, with the mean and ``std = sqrt(var + eps)`` of each position of ``x``
    over its channels. The paper normalizes behind convolutions of a generator's encoder and gives back before the
    convolutions of its decoder that have maps of the same size, so that these layers nest. Where both halves do not fit
    into one ``body``, call `anybatch.functional.positional_moments` and `anybatch.functional.moment_shortcut`.

    Args:
        body: Takes (N, C, *) and returns (N, C', *) with the same positions.
        eps: Added to the variance.
        unbiased: Whether to divide by C - 1, as the released code does, and not by C, as the paper's equation.

    Shape:
        (N, C, *) to (N, C', *).

    Raises:
        ValueError: In `forward`, if ``x`` has one channel, or ``body`` returns other positions.

    Source:
        Li et al. 2019, "Positional Normalization", arXiv:1907.04312.

    >>> MomentShortcut(nn.Identity())(torch.tensor([[1.0, 3.0]])).round(decimals=4)
    tensor([[1., 3.]])
    """

    def __init__(self, body: nn.Module, eps: float = 1e-5, *, unbiased: bool = False) -> None:
        super().__init__()
        check_number("eps", eps)
        self.body = body
        self.eps = eps
        self.unbiased = unbiased

    def forward(self, x: Tensor) -> Tensor:
        mean, std = positional_moments(x, eps=self.eps, unbiased=self.unbiased)
        y = self.body(positional_norm(x, eps=self.eps, unbiased=self.unbiased))
        return moment_shortcut(y, mean, std)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, unbiased={self.unbiased}"


def pn(*, eps: float = 1e-5, affine: bool = True) -> Scheme:
    """Positional normalization over the channels of each position; the paper's has no scale and shift."""
    check_number("eps", eps)
    check_flag("affine", affine)
    return Scheme(name="pn", norm=partial(PositionalNorm, eps=eps, affine=affine), sources=("arXiv:1907.04312",))
