"""What a row of the contract's table is: one call of an op, one layer, one scheme in a small network."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import anybatch
from anybatch.dispatch import Op
from anybatch.models.resnet import BasicBlock, PreActBasicBlock, ResNet

Layout = Literal["contiguous", "channels_last", "strided"]
HALVES = (torch.float16, torch.bfloat16)


def in_layout(x: Tensor, layout: Layout) -> Tensor:
    """The same values, laid out in memory as named."""
    if layout == "channels_last":
        return x.contiguous(memory_format=last_format(x))
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


def last_format(x: Tensor) -> torch.memory_format:
    """The format of x with channels last."""
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


@dataclass(frozen=True)
class OpCase:
    """One call of an op.

    ``others`` gives the arguments behind the first; ``rows`` lays out the first argument as (R, S), S values that
    are averaged together in each row. ``activations`` says whether that argument grows with the batch; ``terms``,
    how many products an element of the output sums (a convolution's); ``out_shape`` is None for the input's.
    """

    name: str
    op: Op
    shape: tuple[int, ...]
    others: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]
    rows: Callable[[Tensor], Tensor]
    mean: float = 0.0
    layout: Layout = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)
    activations: bool = True
    terms: int = 1
    out_shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The same values each time, rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64) + self.mean
        return in_layout(x.to(dtype), self.layout), *self.others(generator, dtype)

    def output_gradient(self, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.out_shape or self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def doubled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same arguments in float64."""
        return tuple(a.double() if isinstance(a, Tensor) else a for a in args)

    def conditioning(self, args: tuple[Any, ...]) -> float:
        """1 + |mean| / std of the worst row: how much a rounding of its mean counts."""
        var, mean = torch.var_mean(self.rows(args[0].double()), dim=1, correction=0)
        return 1 + (mean.abs() / var.sqrt().clamp_min(1e-3)).max().item()

    def roundoff(self, args: tuple[Any, ...], exact: Tensor, terms: int = 1, *, as_they_are: bool = False) -> float:
        """What a two-pass evaluation in float32 or wider may err, its result being rounded to the dtype of x.

        Four roundings (mean, difference, variance, root), each multiplied by the conditioning; ``terms`` of size 1
        that are summed err as their root. A variance taken as E[x²] - E[x]² errs by the conditioning squared. Where
        filters are convolved ``as_they_are``, the mean times the sum of each is taken off behind: it errs as a
        convolution and BatchNorm do.
        """
        dtype = args[0].dtype
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        sums = args[1].double().flatten(1).sum(1).abs().max().item() if as_they_are else 0.0
        size = max(exact.abs().max().item(), (terms * self.terms) ** 0.5, sums)
        # The products of a convolution are of values rounded to the dtype.
        products = torch.finfo(dtype).eps * self.terms**0.5 if self.terms > 1 else 0.0
        return (
            products
            + 0.5 * torch.finfo(dtype).eps * exact.abs().max().item()
            + 4 * wide * self.conditioning(args) * size
        )


@dataclass(frozen=True)
class LayerCase:
    """One layer, made with values that are not its defaults; ``shown`` is what its repr must hold.

    ``batch_independent`` says whether it claims so. Layers that do not are tested in evaluation mode, in which every
    sample must be on its own all the same.
    """

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    shown: tuple[str, ...]
    name: str
    batch_independent: bool = True

    def __str__(self) -> str:
        return self.name

    def input(self, dtype: torch.dtype = torch.float32, batch: int | None = None) -> Tensor:
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def layer_case(
    kind: Callable[..., nn.Module],
    args: tuple[Any, ...],
    shape: tuple[int, ...],
    shown: tuple[str, ...],
    batch_independent: bool = True,
    **kwargs: Any,
) -> LayerCase:
    def make(**more: Any) -> nn.Module:
        torch.manual_seed(3)
        layer = kind(*args, **{**kwargs, **more}).train(batch_independent)
        for p in layer.parameters():  # away from 0 and 1, which would hide a missing scale or shift
            if p.dim() <= 1 and not p.is_meta:
                nn.init.normal_(p, 1.0)
        return layer

    # `functools.partial` would hide the class, by which ids are read.
    name = f"{kind.__name__}-{'x'.join(map(str, shape))}-{len(kwargs)}"
    return LayerCase(make, shape, shown, name, batch_independent)


@dataclass(frozen=True)
class SchemeCase:
    """One scheme in a small network.

    ``one_position`` says whether it takes maps of 1 x 1 in the last stage; ``drops``, whether it draws random numbers
    in training, so that training and evaluation differ; ``synchronized``, whether ranks share statistics of the batch.
    """

    scheme: str
    one_position: bool = True
    drops: bool = False
    synchronized: bool = False
    model: str = "resnet8"
    options: dict[str, Any] = field(default_factory=lambda: {"width": 32, "num_classes": 5})

    def __str__(self) -> str:
        return self.scheme

    @property
    def claims_batch_independence(self) -> bool:
        return anybatch.scheme(self.scheme).batch_independent

    def network(self, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """The network with every scale and shift drawn at random: at 0, as they start, branches would not count."""
        torch.manual_seed(4)
        return _drawn(anybatch.create_model(self.model, self.scheme, **{**self.options, **options}), dtype)

    def short(self, dtype: torch.dtype) -> nn.Module:
        """The network without its last stage: a block that keeps its map and one that halves it are all to trace."""
        torch.manual_seed(4)
        block = PreActBasicBlock if self.model.startswith("preact") else BasicBlock
        return _drawn(ResNet(anybatch.scheme(self.scheme), block, (1, 1), stem="cifar", **self.options), dtype)


def _drawn(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for p in model.parameters():
        if p.dim() <= 1:
            nn.init.normal_(p, 0.5, 0.3)
        elif not p.any():
            nn.init.kaiming_normal_(p)
    return model.to(dtype)


def images(n: int, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """n images of 3 channels whose means and contrasts differ, so that a batch's statistics are no sample's."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    contrast = torch.linspace(0.5, 2, n, dtype=torch.float64).reshape(n, 1, 1, 1)
    return (x * contrast + torch.arange(n).reshape(n, 1, 1, 1)).to(dtype)
