"""Rows of DyT and Derf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch import functional, layers
from anybatch.dispatch import Op
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _bounded(
    op: Op,
    name: str,
    shape: tuple[int, ...],
    *,
    affine: bool = True,
    weights: torch.dtype | None = None,
    **more: Any,
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        scalars = torch.rand(2, 1, generator=generator, dtype=torch.float64)[: 1 + (op is functional.dynamic_erf)]
        vectors = torch.randn(2, shape[1], generator=generator, dtype=torch.float64) if affine else ()
        return tuple(value.to(weights or dtype) for value in (*scalars, *vectors))

    def rows(x: Tensor) -> Tensor:
        return x.reshape(shape[0] * shape[1], -1)

    return OpCase(f"{op.__name__}-{name}", op, shape, others, rows, **more)


OPS: list[OpCase] = [
    case
    for op in (functional.dynamic_tanh, functional.dynamic_erf)
    for case in (
        _bounded(op, "odd", (2, 6, 5, 7)),
        _bounded(op, "no_affine_3d", (2, 6, 3, 4, 5), affine=False),
        _bounded(op, "channels_last_mean_1", (2, 6, 5, 7), layout="channels_last", mean=1),
    )
]

MIXED_OPS: list[OpCase] = [
    _bounded(op, "float32_weights", (2, 6, 5, 7), weights=torch.float32)
    for op in (functional.dynamic_tanh, functional.dynamic_erf)
]

LAYERS: list[LayerCase] = [
    layer_case(layers.DynamicTanh, (6,), (3, 6, 5, 7), ("6", "alpha=0.7", "affine=True"), alpha=0.7),
    layer_case(
        layers.DynamicErf,
        (6,),
        (3, 6, 5, 7),
        ("6", "alpha=0.7", "shift=0.1", "affine=False"),
        alpha=0.7,
        shift=0.1,
        affine=False,
    ),
]

SCHEMES: list[SchemeCase] = [SchemeCase("dyt"), SchemeCase("derf")]
