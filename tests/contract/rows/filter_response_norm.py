"""Rows of filter response normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _filter_response_norm(
    name: str, shape: tuple[int, ...], parameters: int = 3, *, weights: torch.dtype | None = None, **more: Any
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        """The first so many of weight, bias, tau and eps_l."""
        values = torch.randn(4, shape[1], generator=generator, dtype=torch.float64)[:parameters]
        return tuple(value.to(weights or dtype) for value in values)

    def rows(x: Tensor) -> Tensor:
        return x.reshape(shape[0] * shape[1], -1)

    return OpCase(f"filter_response_norm-{name}", functional.filter_response_norm, shape, others, rows, **more)


OPS: list[OpCase] = [
    _filter_response_norm("odd", (2, 6, 5, 7)),
    _filter_response_norm("learned_eps", (1, 6, 5, 7), 4),
    _filter_response_norm("affine", (2, 6, 5, 7), 2, options={"eps": 0.1}),
    _filter_response_norm("plain_3d", (2, 6, 3, 4, 5), 0),
    _filter_response_norm("one_position", (2, 6, 1, 1), 4),
    _filter_response_norm("mean_1000", (2, 6, 5, 7), mean=1000),  # squares that float16 does not hold
    _filter_response_norm("channels_last", (2, 6, 5, 7), layout="channels_last"),
    _filter_response_norm("strided", (2, 6, 5, 7), layout="strided"),
]

MIXED_OPS: list[OpCase] = [_filter_response_norm("float32_weights", (2, 6, 5, 7), weights=torch.float32)]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.FilterResponseNorm1d,
        (6,),
        (3, 6, 9),
        ("6", "eps=0.001", "affine=False", "apply_act=True"),
        eps=1e-3,
        affine=False,
    ),
    layer_case(
        layers.FilterResponseNorm2d,
        (6,),
        (3, 6, 5, 7),
        ("6", "eps=1e-06", "affine=True", "learnable_eps=True"),
        learnable_eps=True,
    ),
    layer_case(layers.FilterResponseNorm3d, (4,), (3, 4, 4, 3, 5), ("apply_act=False",), apply_act=False),
]

SCHEMES: list[SchemeCase] = [SchemeCase("frn")]
