"""What every network is built from: the pieces a scheme gives, and the plain choices where it gives none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from anybatch.methods.common import Taken, TakesActivation
from anybatch.methods.residual import Join
from anybatch.methods.stochastic_depth import StochasticDepth
from anybatch.scheme import Scheme, check_rate

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Pieces:
    """The pieces of one network, taken from its scheme. Models ask here and never ask what the scheme is.

    Args:
        scheme: A complete scheme.
        dims: Spatial dimensions of the data: 1, 2 or 3.
        blocks: Number of residual blocks, which a residual rule is told when it is made.
        zero_init_residual: Whether the last norm of each residual branch starts with scale 0.
        act: The network's own activation, where the scheme brings none; None for in-place ReLU.
        drop_path_rate: Of stochastic depth: block i of n, from 0, leaves its branch out for a sample in training with
            probability ``drop_path_rate * i / n``, as in the released code of arXiv:2102.06171. What is kept is scaled,
            as in timm and torchvision, unless the scheme's join says otherwise: ``nf`` does not scale.
        full_rate_last: Whether the rates rise to ``drop_path_rate`` itself in the last block, by ``i / (n - 1)``, as in
            ConvNeXt.

    Raises:
        ValueError: If the scheme lacks a part it needs, or the rate is not in [0, 1).
    """

    def __init__(
        self,
        scheme: Scheme,
        *,
        dims: int = 2,
        blocks: int = 0,
        zero_init_residual: bool = False,
        act: Callable[[], nn.Module] | None = None,
        drop_path_rate: float = 0.0,
        full_rate_last: bool = False,
    ) -> None:
        scheme.check_complete()
        check_rate("drop_path_rate", drop_path_rate)
        self.scheme = scheme
        self.dims = dims
        self.zero_init_residual = zero_init_residual
        self._act = scheme.act or act
        self._drop_path_step = drop_path_rate / max(blocks - full_rate_last, 1)
        self._joins = 0
        self._join: Callable[[bool], Join] | None = None if scheme.residual is None else scheme.residual(blocks)

    def _of_dims(self, factory: Any) -> Any:
        return factory[self.dims - 1] if isinstance(factory, tuple) else factory

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool | None = None,
        padding: int | None = None,
    ) -> nn.Module:
        """A convolution that keeps the map's size at stride 1, with a bias where the scheme has no norm that shifts."""
        make = self._of_dims(self.scheme.conv or _CONVS)
        if bias is None:
            bias = self.scheme.conv_bias or (self.scheme.norm is None and self.scheme.norm_act is None)
        return make(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2 if padding is None else padding,
            groups=groups,
            bias=bias,
        )

    def act(self, *, inplace: bool = True) -> nn.Module:
        """An activation that no norm of the same scheme brings along."""
        return nn.ReLU(inplace=inplace) if self._act is None else self._act()

    def norm(self, channels: int, *, last_in_branch: bool = False) -> nn.Module:
        """A norm with no activation behind it."""
        if self.scheme.norm_act is not None:
            norm = self._of_dims(self.scheme.norm_act)(channels, apply_act=False)
        else:
            norm = nn.Identity() if self.scheme.norm is None else self._of_dims(self.scheme.norm)(channels)
        zero = last_in_branch and self.zero_init_residual
        if zero and isinstance(weight := getattr(norm, "weight", None), nn.Parameter):
            nn.init.zeros_(weight)
        return norm

    def norm_act(self, channels: int, *, behind: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
        """A norm and the activation behind it; where one layer does both, the second is the identity.

        Args:
            channels: Of the map.
            behind: The convolution in front of both, which may take the activation where there is no norm.
        """
        if self.scheme.norm_act is not None:
            return self._of_dims(self.scheme.norm_act)(channels), nn.Identity()
        # Behind no norm it would overwrite what went into the norm, which a pre-activated block's skip still needs.
        norm, act = self.norm(channels), self.act(inplace=self.scheme.norm is not None)
        return norm, _behind(behind if isinstance(norm, nn.Identity) else norm, act)

    def join_act(self, join: Join, conv: nn.Module, norm: nn.Module) -> nn.Module:
        """The activation behind a join; the identity where the branch's last layers do both.

        Args:
            join: Of the branch.
            conv: The branch's last convolution.
            norm: What `norm` gave for behind it.
        """
        act = join.activation(self.act())
        return _behind(conv, act) if isinstance(norm, nn.Identity) and join.move_inside(conv) else act

    def final_norm(self, channels: int) -> nn.Module:
        """A norm in front of the head, where the last convolution has none behind it."""
        if self.scheme.final is None or self.scheme.norm is not None or self.scheme.norm_act is not None:
            return self.norm(channels)
        return self._of_dims(self.scheme.final)(channels)

    def final_norm_act(self, channels: int) -> tuple[nn.Module, nn.Module]:
        """The same and the activation behind it; where one layer does both, the second is the identity."""
        if self.scheme.norm_act is not None:
            return self.norm_act(channels)
        norm = self.final_norm(channels)
        return norm, self.act(inplace=not isinstance(norm, nn.Identity))

    def join(self, *, transition: bool = False) -> Join:
        """The next block's join, in the order of the blocks.

        Args:
            transition: Whether the block's skip connection is a projection.
        """
        join = Join() if self._join is None else self._join(transition)
        if rate := self._drop_path_step * self._joins:
            join.drop = StochasticDepth(rate, scale_by_keep=join.scale_by_keep)
        self._joins += 1
        return join

    def init(self, model: nn.Module, default: Callable[[nn.Module], None] | None = None) -> None:
        """Initialize a finished model as the scheme does.

        Args:
            model: The model.
            default: The network's own way, where the scheme has none; None for `he_normal`.
        """
        (self.scheme.init or default or he_normal)(model)


def named_act(name: str) -> Callable[[], nn.Module] | None:
    """A network's own activation by name, for `Pieces`: ``"relu"`` or ``"mish"``."""
    if name not in ("relu", "mish"):
        raise ValueError(f"act must be 'relu' or 'mish', got {name!r}")
    return None if name == "relu" else nn.Mish


def _behind(layer: nn.Module | None, act: nn.Module) -> nn.Module:
    """What is left to apply behind a layer that may take an activation."""
    return Taken() if isinstance(layer, TakesActivation) and layer.take_activation(act) else act


def torch_init(model: nn.Module) -> None:
    """Convolutions and linear layers as torch draws them."""
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            module.reset_parameters()


def he_normal(model: nn.Module) -> None:
    """Convolutions by He's normal over fan-out, their biases by 0 but where the layer says to keep them."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            zero_bias(module)


def zero_bias(module: nn.Module) -> None:
    """Start a layer's bias at 0, if it has one and does not say to keep it as drawn."""
    if isinstance(bias := getattr(module, "bias", None), nn.Parameter) and not hasattr(module, "keeps_drawn_bias"):
        nn.init.zeros_(bias)
