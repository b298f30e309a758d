"""Squeeze-excite: each channel times a gate that is computed from the means of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Squeeze-excite as normalizer-free networks have it: ``gain * sigmoid(fc2(act(fc1(mean x)))) * x``.

    The mean is over the positions of each sample and channel, taken in float32 or wider. The gain of 2 makes up for
    the gate of 1/2 that is there at the start. The linear layers have biases and are not standardized; their weights
    start normal with variance 1 / fan-in (LeCun's), truncated at two standard deviations, their biases at 0. The paper
    writes a scaled GELU between them; its release, whose weights this loads, has a plain ReLU, and so have we.

    Args:
        num_channels: C.
        ratio: Hidden channels for each of C; there are ``max(1, int(C * ratio))``. 0.5 in NFNets and NF-RegNets, 0.25
            in NF-ResNets.
        gain: The factor.
        hidden: Hidden channels in place of ``ratio``.
        act: Makes the activation between the linear layers.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, *) to (N, C, *).

    A state dict may hold the linear layers as convolutions of one position, as timm's does.

    Raises:
        ValueError: If there is not at least one channel, or ``ratio`` is not above 0; in `forward`, if the input has
            another number of channels.

    Source:
        Hu et al. 2017, arXiv:1709.01507, eq. 2-4; the gain: Brock et al. 2021, arXiv:2102.06171, appendix C, and its
        release (deepmind-research, nfnets/base.py).

    >>> SqueezeExcite(8)(torch.randn(1, 8, 7, 7)).shape
    torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        num_channels: int,
        ratio: float = 0.5,
        *,
        gain: float = 2.0,
        hidden: int | None = None,
        act: Callable[[], nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_channels < 1:
            raise ValueError(f"num_channels must be 1 or more, got {num_channels}")
        if ratio <= 0:
            raise ValueError(f"ratio must be above 0, got {ratio}")
        self.num_channels = num_channels
        self.ratio = ratio
        self.gain = gain
        hidden = max(1, int(num_channels * ratio)) if hidden is None else hidden
        self.fc1 = nn.Linear(num_channels, hidden, device=device, dtype=dtype)
        self.act = act()
        self.fc2 = nn.Linear(hidden, num_channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance 1 / fan-in, truncated at two standard deviations; biases 0."""
        for linear in (self.fc1, self.fc2):
            # The standard deviation of a standard normal that is truncated at -2 and 2.
            std = linear.in_features**-0.5 / 0.87962566103423978
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            raise ValueError(f"SqueezeExcite is made for (N, {self.num_channels}, *), got x of shape {tuple(x.shape)}")
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_nc = x.mean(tuple(range(2, x.dim())), dtype=wide).to(x.dtype) if x.dim() > 2 else x
        gate_nc = self.gain * torch.sigmoid(self.fc2(self.act(self.fc1(mean_nc))))
        return x * gate_nc.to(x.dtype).reshape(*gate_nc.shape, *(1 for _ in x.shape[2:]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in ("fc1.weight", "fc2.weight"):
            weight = state_dict.get(f"{prefix}{name}")
            if isinstance(weight, Tensor) and weight.dim() > 2 and weight[0, 0].numel() == 1:
                state_dict[f"{prefix}{name}"] = weight.flatten(
                    1
                )  # before the linear layers, which load themselves, see it

    def extra_repr(self) -> str:
        return f"{self.num_channels}, ratio={self.ratio}, gain={self.gain}"
