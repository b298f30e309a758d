"""Rows of EvoNorm-S0 and B0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _evo_norm_s0(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    *,
    parameters: int = 3,
    weights: torch.dtype | None = None,
    **more: Any,
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        values = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)[:parameters]
        return groups, *(value.to(weights or dtype) for value in values)

    def rows(x: Tensor) -> Tensor:
        return x.reshape(shape[0] * groups, -1)

    return OpCase(f"evo_norm_s0-{name}", functional.evo_norm_s0, shape, others, rows, **more)


def _evo_norm_b0(
    name: str, shape: tuple[int, ...], *, parameters: int = 3, weights: torch.dtype | None = None, **more: Any
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        values = torch.randn(4, shape[1], generator=generator, dtype=torch.float64)[: 1 + parameters]
        values[0] = 0.5 + values[0].square()  # a variance
        return tuple(value.to(weights or dtype) for value in values)

    def rows(x: Tensor) -> Tensor:
        return x.reshape(shape[0] * shape[1], -1)

    return OpCase(f"evo_norm_b0-{name}", functional.evo_norm_b0, shape, others, rows, **more)


OPS: list[OpCase] = [
    _evo_norm_s0("odd", (2, 6, 5, 7), 3),
    _evo_norm_s0("no_affine_eps", (1, 6, 5, 7), 2, parameters=0, options={"eps": 0.1}),
    _evo_norm_s0("one_position", (2, 6, 1, 1), 2),
    _evo_norm_s0("3d", (2, 6, 3, 4, 5), 3),
    _evo_norm_s0("mean_1000", (2, 8, 9, 9), 2, mean=1000),
    _evo_norm_s0("channels_last", (2, 6, 5, 7), 3, layout="channels_last"),
    _evo_norm_s0("strided_mean_100", (2, 6, 5, 7), 3, layout="strided", mean=100),
    _evo_norm_b0("odd", (2, 6, 5, 7)),
    _evo_norm_b0("no_affine_eps", (1, 6, 5, 7), parameters=0, options={"eps": 0.1}),
    _evo_norm_b0("channels_last_mean_100", (2, 6, 5, 7), layout="channels_last", mean=100),
]

MIXED_OPS: list[OpCase] = [
    _evo_norm_s0("float32_weights", (2, 6, 5, 7), 3, weights=torch.float32),
    _evo_norm_b0("float32_weights", (2, 6, 5, 7), weights=torch.float32),
]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.EvoNormS0,
        (12, 4),
        (3, 12, 5, 7),
        ("12", "num_groups=4", "eps=0.001", "affine=True", "apply_act=True"),
        eps=1e-3,
    ),
    layer_case(layers.EvoNormS0, (12,), (3, 12, 7), ("num_groups=6", "apply_act=False"), group_size=2, apply_act=False),
    layer_case(
        layers.EvoNormB0,
        (6,),
        (3, 6, 5, 7),
        ("6", "eps=0.001", "affine=True", "momentum=0.2", "unbiased=True", "apply_act=True"),
        batch_independent=False,
        eps=1e-3,
        momentum=0.2,
        unbiased=True,
    ),
]

SCHEMES: list[SchemeCase] = [SchemeCase("evos0"), SchemeCase("evob0", one_position=False)]
