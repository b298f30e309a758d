"""The table of cases. A method joins the contract tests by adding its rows to `OPS`, `LAYERS` and `SCHEMES`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import anybatch
from anybatch import functional, layers
from anybatch.dispatch import Op

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
    are averaged together in each row. ``activations`` says whether that argument grows with the batch.
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

    def __str__(self) -> str:
        return self.name

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The same values each time, rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64) + self.mean
        return in_layout(x.to(dtype), self.layout), *self.others(generator, dtype)

    def output_gradient(self, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def doubled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same arguments in float64."""
        return tuple(a.double() if isinstance(a, Tensor) else a for a in args)

    def conditioning(self, args: tuple[Any, ...]) -> float:
        """1 + |mean| / std of the worst row: how much a rounding of its mean counts."""
        var, mean = torch.var_mean(self.rows(args[0].double()), dim=1, correction=0)
        return 1 + (mean.abs() / var.sqrt().clamp_min(1e-3)).max().item()

    def roundoff(self, args: tuple[Any, ...], exact: Tensor, terms: int = 1) -> float:
        """What a two-pass evaluation in float32 or wider may err, its result being rounded to the dtype of x.

        Four roundings (mean, difference, variance, root), each multiplied by the conditioning; ``terms`` of size 1
        that are summed err as their root. A variance taken as E[x²] - E[x]² errs by the conditioning squared.
        """
        dtype = args[0].dtype
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        size = max(exact.abs().max().item(), terms**0.5)
        return 0.5 * torch.finfo(dtype).eps * exact.abs().max().item() + 4 * wide * self.conditioning(args) * size


def _group_norm(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    *,
    affine: bool = True,
    weights: torch.dtype | None = None,
    **more: Any,
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        if not affine:
            return (groups,)
        weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
        return groups, weight.to(weights or dtype), bias.to(weights or dtype)

    def rows(x: Tensor) -> Tensor:
        return x.reshape(shape[0] * groups, -1)

    return OpCase(f"group_norm-{name}", functional.group_norm, shape, others, rows, **more)


def _weight_standardize(name: str, shape: tuple[int, ...], **more: Any) -> OpCase:
    return OpCase(
        f"weight_standardize-{name}",
        functional.weight_standardize,
        shape,
        lambda *_: (),
        lambda w: w.flatten(1),
        activations=False,
        **more,
    )


OPS = [
    _group_norm("odd", (2, 6, 5, 7), 3),
    _group_norm("batch1", (1, 6, 5, 7), 3),
    _group_norm("eps", (2, 6, 5, 7), 3, options={"eps": 0.1}),
    _group_norm("no_affine", (2, 6, 5, 7), 2, affine=False),
    _group_norm("layer", (2, 6, 5, 7), 1),
    _group_norm("instance", (2, 6, 5, 7), 6),
    _group_norm("32_groups", (2, 64, 9, 9), 32),
    _group_norm("one_channel", (3, 1, 5, 3), 1),
    _group_norm("one_position", (2, 6, 1, 1), 2),
    _group_norm("no_positions", (4, 8), 2),
    _group_norm("1d", (2, 8, 33), 4),
    _group_norm("3d", (2, 6, 3, 4, 5), 3),
    _group_norm("mean_100", (2, 6, 5, 7), 3, mean=100),
    _group_norm("mean_100_layer", (2, 64, 9, 9), 1, mean=100),
    _group_norm("mean_1000", (2, 64, 9, 9), 32, mean=1000),
    _group_norm("channels_last", (2, 6, 5, 7), 3, layout="channels_last"),
    _group_norm("channels_last_one_position", (2, 6, 1, 1), 2, layout="channels_last"),
    _group_norm("channels_last_one_channel", (3, 1, 5, 3), 1, layout="channels_last"),
    _group_norm("channels_last_mean_100", (2, 6, 5, 7), 3, layout="channels_last", mean=100),
    _group_norm("channels_last_mean_1000", (2, 64, 9, 9), 32, layout="channels_last", mean=1000),
    _group_norm("channels_last_3d", (2, 6, 3, 4, 5), 3, layout="channels_last"),
    _group_norm("strided", (2, 6, 5, 7), 3, layout="strided"),
    _group_norm("strided_mean_100", (2, 6, 5, 7), 3, layout="strided", mean=100),
    _weight_standardize("odd", (5, 3, 3, 3)),
    _weight_standardize("eps", (5, 3, 3, 3), options={"eps": 0.1}),
    _weight_standardize("depthwise", (4, 1, 3, 3)),
    _weight_standardize("1x1", (8, 64, 1, 1)),
    _weight_standardize("one_filter", (1, 2, 3, 3)),
    _weight_standardize("linear", (3, 7)),
    _weight_standardize("1d", (4, 16, 3)),
    _weight_standardize("3d", (2, 5, 2, 3, 2)),
    _weight_standardize("mean_100", (5, 3, 3, 3), mean=100),
    _weight_standardize("mean_1000", (8, 64, 1, 1), mean=1000),
    _weight_standardize("channels_last", (5, 3, 3, 3), layout="channels_last"),
    _weight_standardize("channels_last_mean_100", (5, 3, 3, 3), layout="channels_last", mean=100),
    _weight_standardize("strided", (5, 3, 3, 3), layout="strided"),
]

# As autocast calls it: activations in half precision, parameters in float32.
MIXED_OPS = [
    _group_norm("float32_weights", (2, 6, 5, 7), 3, weights=torch.float32),
    _group_norm("float32_weights_mean_100", (2, 6, 5, 7), 3, weights=torch.float32, mean=100),
    _group_norm("float32_weights_channels_last", (2, 6, 5, 7), 3, weights=torch.float32, layout="channels_last"),
]


@dataclass(frozen=True)
class LayerCase:
    """One layer, made with values that are not its defaults; ``shown`` is what its repr must hold."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    shown: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return self.name

    def input(self, dtype: torch.dtype = torch.float32, batch: int | None = None) -> Tensor:
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def _layer(
    kind: Callable[..., nn.Module], args: tuple[Any, ...], shape: tuple[int, ...], shown: tuple[str, ...], **kwargs: Any
) -> LayerCase:
    def make(**more: Any) -> nn.Module:
        torch.manual_seed(3)
        layer = kind(*args, **kwargs, **more)
        for p in layer.parameters():  # away from 0 and 1, which would hide a missing scale or shift
            if p.dim() == 1 and not p.is_meta:
                nn.init.normal_(p, 1.0)
        return layer

    # `functools.partial` would hide the class, by which ids are read.
    name = f"{kind.__name__}-{'x'.join(map(str, shape))}-{len(kwargs)}"
    return LayerCase(make, shape, shown, name)


LAYERS = [
    _layer(
        layers.GroupNorm,
        (12,),
        (3, 12, 5, 7),
        ("12", "num_groups=4", "eps=0.001", "affine=True"),
        num_groups=4,
        eps=1e-3,
    ),
    _layer(
        layers.GroupNorm, (12,), (3, 12, 5, 7), ("num_groups=6", "affine=False"), group_size=2, affine=False, eps=1e-5
    ),
    _layer(layers.GroupNorm, (12, "auto"), (3, 12, 7), ("num_groups=6",)),
    _layer(layers.GroupNorm, (12, 1), (3, 12, 2, 3, 4), ("num_groups=1",)),
    _layer(
        layers.WSConv1d,
        (6, 4, 3),
        (3, 6, 9),
        ("6, 4", "kernel_size=(3,)", "stride=(2,)", "padding=(1,)", "bias=False", "eps=0.001"),
        stride=2,
        padding=1,
        bias=False,
        eps=1e-3,
    ),
    _layer(
        layers.WSConv2d,
        (6, 4, 3),
        (3, 6, 7, 5),
        (
            "6, 4",
            "kernel_size=(3, 3)",
            "dilation=(2, 2)",
            "groups=2",
            "padding=(2, 2)",
            "padding_mode=circular",
            "eps=1e-06",
        ),
        dilation=2,
        groups=2,
        padding=2,
        padding_mode="circular",
    ),
    _layer(layers.WSConv2d, (6, 8, 1), (3, 6, 5, 7), ("kernel_size=(1, 1)", "bias=False"), bias=False),
    _layer(layers.WSConv2d, (6, 6, 3), (3, 6, 5, 7), ("groups=6", "padding=same"), groups=6, padding="same"),
    _layer(
        layers.WSConv3d,
        (2, 4, 3),
        (3, 2, 4, 5, 3),
        ("2, 4", "kernel_size=(3, 3, 3)", "stride=(1, 1, 1)", "padding=(1, 1, 1)"),
        padding=1,
    ),
]


@dataclass(frozen=True)
class SchemeCase:
    """One scheme in a small network; ``one_position`` says whether it takes maps of 1 x 1 in the last stage."""

    scheme: str
    one_position: bool = True
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
        model = anybatch.create_model(self.model, self.scheme, **{**self.options, **options})
        for p in model.parameters():
            if p.dim() == 1:
                nn.init.normal_(p, 0.5, 0.3)
        return model.to(dtype)


SCHEMES = [
    SchemeCase("bn", one_position=False),
    SchemeCase("gn"),
    SchemeCase("gn:auto"),
    SchemeCase("gn/8"),
    SchemeCase("ln"),
    SchemeCase("in", one_position=False),
    SchemeCase("ws+gn"),
    SchemeCase("ws+bn", one_position=False),
    SchemeCase("ws+ln"),
    SchemeCase("none"),
]
BATCH_FREE = [case for case in SCHEMES if case.claims_batch_independence]
BATCH_BOUND = [case for case in SCHEMES if not case.claims_batch_independence]


def images(n: int, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """n images of 3 channels whose means and contrasts differ, so that a batch's statistics are no sample's."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    contrast = torch.linspace(0.5, 2, n, dtype=torch.float64).reshape(n, 1, 1, 1)
    return (x * contrast + torch.arange(n).reshape(n, 1, 1, 1)).to(dtype)
