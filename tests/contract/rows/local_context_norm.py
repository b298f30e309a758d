"""Rows of local context normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _local_context_norm(
    name: str,
    shape: tuple[int, ...],
    window: int | tuple[int, ...],
    size: int = 2,
    *,
    weights: torch.dtype | None = None,
    **more: Any,
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
        return window, size, weight.to(weights or dtype), bias.to(weights or dtype)

    def rows(x: Tensor) -> Tensor:
        """Each complete window of each group."""
        windows = (window,) * (x.dim() - 2) if isinstance(window, int) else window
        x = x.unflatten(1, (-1, size)).movedim(2, -1)
        for dim, w in enumerate(windows, start=2):
            x = x.unfold(dim, min(w, x.shape[dim]), 1)
        return x.reshape(-1, size * torch.Size(x.shape[2 + len(windows) + 1 :]).numel())

    return OpCase(f"local_context_norm-{name}", functional.local_context_norm, shape, others, rows, **more)


OPS: list[OpCase] = [
    _local_context_norm("odd", (2, 6, 5, 7), 3),
    _local_context_norm("even_eps", (1, 6, 5, 7), (2, 4), 3, options={"eps": 0.1}),
    _local_context_norm("one_dimension_whole", (2, 6, 5, 7), (9, 3)),
    _local_context_norm("whole", (2, 6, 5, 7), 9),
    _local_context_norm("relu", (2, 6, 5, 7), 3, options={"activation": "relu"}),
    _local_context_norm("whole_gelu", (2, 6, 5, 7), 9, options={"activation": "gelu"}),
    _local_context_norm("silu", (2, 6, 5, 7), (5, 3), 3, options={"activation": "silu"}),
    _local_context_norm("one_position", (2, 6, 1, 1), 3),
    _local_context_norm("3d", (2, 6, 3, 4, 5), (3, 2, 3)),
    _local_context_norm("mean_1000", (2, 8, 9, 9), 5, mean=1000),
    _local_context_norm("channels_last_mean_100", (2, 6, 5, 7), 3, layout="channels_last", mean=100),
    _local_context_norm("strided", (2, 6, 5, 7), 3, layout="strided"),
]

MIXED_OPS: list[OpCase] = [_local_context_norm("float32_weights", (2, 6, 5, 7), 3, weights=torch.float32)]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.LocalContextNorm1d,
        (6,),
        (3, 6, 9),
        ("6", "window=4", "channels_per_group=3", "eps=0.001", "affine=True"),
        window=4,
        channels_per_group=3,
        eps=1e-3,
    ),
    layer_case(layers.LocalContextNorm2d, (6,), (3, 6, 5, 7), ("window=(3, 5)",), window=(3, 5)),
    layer_case(
        layers.LocalContextNorm2d, (6, 3), (3, 6, 5, 7), ("window=3", "affine=False", "released=False"), affine=False
    ),
    layer_case(layers.LocalContextNorm3d, (4, 3), (3, 4, 4, 3, 5), ("window=3", "channels_per_group=2")),
]

SCHEMES: list[SchemeCase] = [SchemeCase("lcn(window=3)")]
