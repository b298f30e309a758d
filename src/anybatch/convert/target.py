"""What takes the place of a BatchNorm and of the convolution in front of it, made from a scheme's slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.convert.kinds import as_affine, channels_of, has_averages, is_batchnorm, wide
from anybatch.methods.activation_gain import activation_gain
from anybatch.methods.batch_channel_norm import _BatchChannelNorm
from anybatch.methods.batch_norm import FrozenBatchNorm
from anybatch.methods.group_norm import Groups, resolve_groups
from anybatch.methods.normalizer_free import NormalizerFreeRule
from anybatch.methods.scaled_weight_standardization import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d
from anybatch.scheme import Scheme
from anybatch.schemes import scheme

_DEFAULT_GROUPS = 32  # of every part that has groups; networks whose channels they divide are the exception
_SCALED = (ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d)
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class CannotTakeError(ValueError):
    """Why a layer cannot become what the scheme asks for."""


@dataclass(frozen=True)
class Target:
    """A scheme that finished networks can be given, and the number of groups where it says none itself."""

    scheme: Scheme
    groups: Groups = "auto"
    each: Mapping[str, int] = field(default_factory=dict)
    """Numbers of groups that were chosen before, by the name of the BatchNorm."""

    @classmethod
    def named(cls, to: Any, groups: Groups | Mapping[str, int] = "auto") -> Target:
        """The target that a text names.

        Raises:
            ValueError: If the scheme is unknown or incomplete, or no conversion reaches it.
        """
        each = groups if isinstance(groups, Mapping) else {}
        groups = "auto" if isinstance(groups, Mapping) else groups
        if groups != "auto" and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
            raise ValueError(f"groups={groups!r} is neither a number above 0 nor 'auto'")
        chosen = scheme(to)
        chosen.check_complete()
        own = ("act", "residual") if _is_normalizer_free(chosen) else ()
        foreign = [slot for slot in chosen.filled if slot in ("act", "residual", "clip") and slot not in own]
        if foreign == ["clip"]:
            raise ValueError(
                f"to={chosen.name!r} also asks for clipping, which is the training's: leave it out here, and call "
                f"anybatch.optim.attach_agc(optimizer, model) in front of the training"
            )
        if foreign:
            raise ValueError(
                f"to={chosen.name!r} also asks for another {' and '.join(foreign)}, which a finished network cannot be "
                f"given; convert to a scheme of convolutions and norms alone, such as 'ws+gn' or 'sws'"
            )
        if own:
            _check_normalizer_free(chosen)
        made = cls(chosen, groups, each)
        if not {"conv", "norm", "norm_act"} & set(chosen.filled):
            raise ValueError(f"to={chosen.name!r} has nothing to put in the place of BatchNorm; take 'gn' or 'ws+gn'")
        if made.inside:
            return made
        try:
            probe = made._norm(64, 2, True, device="meta", dtype=torch.float32)
        except TypeError:
            raise ValueError(f"to={chosen.name!r} has no scale and shift that could keep what was learned") from None
        except ValueError:
            return made  # groups for other widths
        if is_batchnorm(probe) and not isinstance(probe, FrozenBatchNorm):
            raise ValueError(f"to={chosen.name!r} is BatchNorm again; take 'gn', 'ws+gn' or 'frozen'")
        return made

    @property
    def free_groups(self) -> bool:
        """Whether its norm has groups of which the scheme does not say the number."""
        make: Any = _of_dims(self.scheme.norm_act or self.scheme.norm, 2)
        told: dict[str, Any] = make.keywords if isinstance(make, partial) else {}
        return told.get("num_groups") == _DEFAULT_GROUPS and told.get("group_size") is None

    @property
    def normalizer_free(self) -> bool:
        """Whether residual branches get scales, and no norm is left; see `anybatch.convert.normalizer_free`."""
        return self.scheme.residual is not None

    @property
    def inside(self) -> bool:
        """Whether convolutions do what the norm did, and none stands behind them."""
        return self.scheme.norm is None and self.scheme.norm_act is None

    @property
    def chooses(self) -> bool:
        """Whether calibration may choose the number of groups."""
        return not self.inside and self.free_groups and self.groups == "auto" and not self.each

    @property
    def by_dims(self) -> bool:
        """Whether its norm differs between data of 1, 2 and 3 dimensions."""
        return isinstance(self.scheme.norm_act or self.scheme.norm, tuple)

    @property
    def reads_graph(self) -> bool:
        """Whether it matters what stands in front of a norm or behind it."""
        return self.scheme.conv is not None or self.scheme.norm_act is not None

    def norm(self, name: str, old: nn.Module, dims: int, *, act: bool, like: Tensor) -> nn.Module:
        """The norm in the place of a BatchNorm, with its scale, shift and statistics where it has such.

        Args:
            name: Of the BatchNorm.
            old: A BatchNorm of `is_batchnorm`.
            dims: Spatial dimensions of the data.
            act: Whether a ReLU stands behind it, which a layer that activates replaces.
            like: Tells device and dtype where the old one has no tensors.

        Raises:
            CannotTakeError: If the channels do not go with the scheme, or the old one's statistics are missing.
        """
        values: Any = next((v for v in (*old.parameters(False), *old.buffers(False)) if v.is_floating_point()), like)
        try:
            new = self._norm(channels_of(old), dims, act, device=values.device, dtype=values.dtype)
        except ValueError as error:
            raise CannotTakeError(str(error)) from None
        if isinstance(new, FrozenBatchNorm):
            if not has_averages(old):
                raise CannotTakeError("it keeps no running averages that could be frozen")
            new.eps = float(old.eps)  # pyright: ignore[reportArgumentType]
        if name in self.each and hasattr(new, "num_groups"):
            new.num_groups = resolve_groups(channels_of(old), self.each[name])  # pyright: ignore[reportArgumentType]
        _fill(new.bn if isinstance(new, _BatchChannelNorm) else new, old)
        return new.train(old.training)

    def _norm(self, channels: int, dims: int, act: bool, **like: Any) -> nn.Module:
        slot = self.scheme.norm_act or self.scheme.norm
        make = _of_dims(slot, dims)
        if self.free_groups:
            like["num_groups"] = self.groups
        if self.scheme.norm_act is not None:
            like["apply_act"] = act
        return make(channels, **like)

    def conv(self, old: Any) -> nn.Module:
        """The scheme's convolution with the parameters of a plain one, and its filters as far as it can have them.

        Raises:
            CannotTakeError: If it takes no such convolution.
        """
        dims = len(old.kernel_size)
        make: Any = _of_dims(self.scheme.conv, dims)
        options: dict[str, Any] = {
            name: getattr(old, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        }
        if isinstance(make, partial) and make.keywords.get("variant") == "default":
            options["variant"] = "aws"  # the one that keeps the filters
        if isinstance(make, partial) and make.func in _SCALED:
            options["affine"] = True  # for the same reason
        try:
            new = make(
                old.in_channels,
                old.out_channels,
                old.kernel_size,
                bias=old.bias is not None or self.inside,
                device="meta",  # draws nothing
                dtype=old.weight.dtype,
                **options,
            )
        except ValueError as error:
            raise CannotTakeError(str(error)) from None
        new.weight = old.weight
        if old.bias is not None or not self.inside:
            new.bias = old.bias
        else:
            new.bias = nn.Parameter(old.weight.new_zeros(old.out_channels))
        if "affine" in options:
            like = {"device": old.weight.device, "dtype": old.weight.dtype}
            new.gain = nn.Parameter(torch.empty(new.gain.shape, **like), requires_grad=old.weight.requires_grad)
            for name in ("weight_gamma", "weight_beta"):
                setattr(new, name, torch.empty(new.weight_gamma.shape, **like))
        if options.get("variant") == "aws" or "affine" in options:
            new.restore_filters()
        return new.train(old.training)


def _is_normalizer_free(chosen: Scheme) -> bool:
    return isinstance(chosen.residual, partial) and chosen.residual.func is NormalizerFreeRule


def _check_normalizer_free(chosen: Scheme) -> None:
    """Raise a `ValueError` for options of ``nf`` that a finished network cannot be given."""
    act: Any = chosen.act
    told: dict[str, Any] = chosen.residual.keywords  # pyright: ignore
    if act.args != ("relu",) or act.keywords["gain"] != activation_gain("relu"):
        raise ValueError(
            f"to={chosen.name!r} asks for another activation or gain: those of a finished network stay, and their "
            f"gains are read off BatchNorm's averages; leave act, released and fold_gain out"
        )
    if told["skip_gain"] not in (1.0, None):
        raise ValueError(
            f"to={chosen.name!r}: each branch's number starts where the network stays the same; leave skip_gain "
            f"out, or write skip_gain=None for no number"
        )
    if not told["alpha"]:
        raise ValueError(f"to={chosen.name!r}: alpha=0 takes every branch away; it must be above 0")


def _of_dims(slot: Any, dims: int) -> Callable[..., nn.Module]:
    return slot[dims - 1] if isinstance(slot, tuple) else slot


def _size(weight: Tensor) -> Tensor:
    """The norm of each filter without its mean, (O,)."""
    rows = wide(weight.detach()).flatten(1)
    return (rows - rows.mean(1, keepdim=True)).norm(dim=1)


@torch.no_grad()
def _fill(new: nn.Module, old: nn.Module) -> None:
    """The old norm's values under the same names, and what asks for gradients there."""
    for name in _STATE:
        mine, theirs = getattr(new, name, None), getattr(old, name, None)
        if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor) or mine.shape != theirs.shape:
            continue
        mine.copy_(theirs)
        if isinstance(mine, nn.Parameter) and isinstance(theirs, nn.Parameter):
            mine.requires_grad_(theirs.requires_grad)


@torch.no_grad()
def absorb(conv: Any, scale: Tensor, shift: Tensor) -> None:
    """Let a convolution's output without its bias be scaled and then shifted, (O,) each."""
    factor = conv.gain if isinstance(getattr(conv, "gain", None), nn.Parameter) else conv.weight
    factor.mul_(scale.to(factor).reshape(-1, *(1 for _ in factor.shape[1:])))
    conv.bias.copy_(shift)


def _absorb_exactly(conv: Any, norm: Any) -> None:
    """Gain, bias and constants of Scaled WS with which it gives what the BatchNorm behind it gave in evaluation."""
    if not has_averages(norm):
        raise CannotTakeError("it keeps no running averages that a convolution could take in")
    scale, shift = as_affine(norm)
    std = (wide(norm.running_var) + norm.eps).sqrt()
    for constants in (conv.weight_gamma, conv.weight_beta):
        constants.copy_(wide(constants) / std.reshape(constants.shape))
    if norm.weight is not None:
        conv.gain.copy_(norm.weight)
    conv.bias.copy_(shift + scale * wide(conv.bias))
    for mine, theirs in ((conv.gain, norm.weight), (conv.bias, norm.bias)):
        if isinstance(theirs, nn.Parameter):
            mine.requires_grad_(theirs.requires_grad)


@torch.no_grad()
def absorb_norm(conv: Any, norm: Any) -> None:
    """Let a convolution do what the BatchNorm behind it did, as far as can be known without data.

    Raises:
        CannotTakeError: If that has no running averages.
    """
    bias: Tensor = conv.bias
    if isinstance(conv, _SCALED):
        _absorb_exactly(conv, norm)
        return
    # What it normalizes has variance 1, and so has the sum over a filter of norm 1 of independent values.
    size = _size(conv.weight).clamp_min(torch.finfo(conv.weight.dtype).tiny)
    scale = size.new_ones(()) if norm.weight is None else norm.weight.detach().to(size)
    absorb(conv, scale / size, bias.new_zeros(()) if norm.bias is None else norm.bias.detach())


def with_activation(norm: nn.Module | None, old: nn.Module, *, taken: bool) -> nn.Module:
    """A norm and, behind it, what timm's BatchNorm holds besides; the identity where nothing is left."""
    kept = {name: part for name, part in old.named_children() if not (isinstance(part, nn.Identity) or name == "norm")}
    if taken:
        kept.pop("act", None)
    parts = OrderedDict({} if norm is None else {"norm": norm}, **kept)
    if not parts:
        return nn.Identity()
    return next(iter(parts.values())) if len(parts) == 1 else nn.Sequential(parts).train(old.training)
