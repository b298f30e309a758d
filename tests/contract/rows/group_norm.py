"""Rows of group, layer and instance normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


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


OPS: list[OpCase] = [
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
]

# As autocast calls it: activations in half precision, parameters in float32.
MIXED_OPS: list[OpCase] = [
    _group_norm("float32_weights", (2, 6, 5, 7), 3, weights=torch.float32),
    _group_norm("float32_weights_mean_100", (2, 6, 5, 7), 3, weights=torch.float32, mean=100),
    _group_norm("float32_weights_channels_last", (2, 6, 5, 7), 3, weights=torch.float32, layout="channels_last"),
]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.GroupNorm,
        (12,),
        (3, 12, 5, 7),
        ("12", "num_groups=4", "eps=0.001", "affine=True"),
        num_groups=4,
        eps=1e-3,
    ),
    layer_case(
        layers.GroupNorm, (12,), (3, 12, 5, 7), ("num_groups=6", "affine=False"), group_size=2, affine=False, eps=1e-5
    ),
    layer_case(layers.GroupNorm, (12, "auto"), (3, 12, 7), ("num_groups=6",)),
    layer_case(layers.GroupNorm, (12, 1), (3, 12, 2, 3, 4), ("num_groups=1",)),
]

SCHEMES: list[SchemeCase] = [
    SchemeCase("gn"),
    SchemeCase("gn:auto"),
    SchemeCase("gn/8"),
    SchemeCase("ln"),
    SchemeCase("in", one_position=False),
]
