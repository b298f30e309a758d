"""Rows of local response normalization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _local_response_norm(name: str, shape: tuple[int, ...], *others: float, **more: Any) -> OpCase:
    def rows(x: Tensor) -> Tensor:
        return x.movedim(1, -1).reshape(-1, shape[1])

    return OpCase(f"local_response_norm-{name}", functional.local_response_norm, shape, lambda *_: others, rows, **more)


def _layer(**_: Any) -> nn.Module:  # without parameters, so without device and dtype
    return layers.LocalResponseNorm(3, 0.1, 0.7, 2.0)


OPS: list[OpCase] = [
    _local_response_norm("odd", (2, 6, 5, 7), 3, 0.5, 0.75, 2.0),
    _local_response_norm("even_wide", (1, 6, 5, 7), 8, 0.5, 0.7, 1.0),
    _local_response_norm("no_positions", (4, 8)),
    _local_response_norm("3d", (2, 6, 3, 4, 5)),
    _local_response_norm("mean_1000", (2, 6, 5, 7), mean=1000),  # squares that float16 does not hold
    _local_response_norm("channels_last", (2, 6, 5, 7), 3, 0.5, 0.75, 2.0, layout="channels_last"),
    _local_response_norm("strided", (2, 6, 5, 7), 3, 0.5, 0.75, 2.0, layout="strided"),
]

LAYERS: list[LayerCase] = [layer_case(_layer, (), (3, 6, 5, 7), ("3", "alpha=0.1", "beta=0.7", "k=2.0"))]

SCHEMES: list[SchemeCase] = [SchemeCase("lrn(alpha=0.01)")]
