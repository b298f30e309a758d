"""Rows of positional normalization and its moment shortcut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _positional_norm(
    name: str, shape: tuple[int, ...], *, affine: bool = True, weights: torch.dtype | None = None, **more: Any
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        if not affine:
            return ()
        weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
        return weight.to(weights or dtype), bias.to(weights or dtype)

    def rows(x: Tensor) -> Tensor:
        return x.movedim(1, -1).reshape(-1, shape[1])

    return OpCase(f"positional_norm-{name}", functional.positional_norm, shape, others, rows, **more)


def _shortcut(**more: Any) -> nn.Module:
    return layers.MomentShortcut(nn.Conv2d(6, 4, 1, **more), 1e-3, unbiased=True)


OPS: list[OpCase] = [
    _positional_norm("odd", (2, 6, 5, 7)),
    _positional_norm("unbiased_eps", (1, 6, 5, 7), affine=False, options={"unbiased": True, "eps": 0.1}),
    _positional_norm("no_positions", (4, 8)),
    _positional_norm("3d", (2, 6, 3, 4, 5)),
    _positional_norm("mean_1000", (2, 64, 5, 5), mean=1000),
    _positional_norm("channels_last", (2, 6, 5, 7), layout="channels_last"),
    _positional_norm("strided_mean_100", (2, 6, 5, 7), layout="strided", mean=100),
]

MIXED_OPS: list[OpCase] = [_positional_norm("float32_weights", (2, 6, 5, 7), weights=torch.float32)]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.PositionalNorm,
        (12,),
        (3, 12, 5, 7),
        ("12", "eps=0.001", "affine=True", "unbiased=True"),
        eps=1e-3,
        unbiased=True,
    ),
    layer_case(layers.PositionalNorm, (12,), (3, 12, 7), ("affine=False", "unbiased=False"), affine=False),
    layer_case(_shortcut, (), (3, 6, 5, 7), ("eps=0.001", "unbiased=True", "Conv2d(6, 4")),
]

SCHEMES: list[SchemeCase] = [SchemeCase("pn")]
