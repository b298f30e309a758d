"""Rows of Batch-Channel Normalization."""

from __future__ import annotations

from typing import Any

import torch

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case
from contract.rows.batch_norm import by_channel, statistics


def _batch_channel_norm(
    name: str, shape: tuple[int, ...], groups: int, *, scales: int | None = None, wide: bool = False, **more: Any
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        dtype = torch.float32 if wide else dtype
        mean, var = statistics(generator, shape[1], more.get("mean", 0.0), dtype)
        if scales == 0:
            return groups, mean, var
        sizes = (shape[1], shape[1], scales or groups, scales or groups)
        return groups, mean, var, *(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)

    return OpCase(f"batch_channel_norm-{name}", functional.batch_channel_norm, shape, others, by_channel, **more)


OPS: list[OpCase] = [
    _batch_channel_norm("odd", (2, 6, 5, 7), 3),
    _batch_channel_norm("scale_a_channel", (2, 6, 5, 7), 3, scales=6),
    _batch_channel_norm("no_affine", (1, 6, 1, 1), 2, scales=0, options={"eps": 0.1}),
    _batch_channel_norm("32_groups", (2, 64, 9, 9), 32),
    _batch_channel_norm("1d", (2, 8, 33), 4),
    _batch_channel_norm("3d", (2, 6, 3, 4, 5), 3, layout="channels_last"),
    _batch_channel_norm("mean_1000", (2, 64, 9, 9), 8, mean=1000),
    _batch_channel_norm("channels_last_mean_100", (2, 6, 5, 7), 3, mean=100, layout="channels_last"),
]

MIXED_OPS: list[OpCase] = [_batch_channel_norm("float32_weights_mean_100", (2, 6, 5, 7), 3, wide=True, mean=100)]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.BatchChannelNorm2d,
        (12,),
        (3, 12, 5, 7),
        (
            "12, num_groups=4, eps=0.001, affine=True",
            "statistics=estimate",
            "rate=0.25",
            "warm_start=False",
            "channel_affine=channel",
        ),
        batch_independent=False,
        num_groups=4,
        eps=1e-3,
        rate=0.25,
        warm_start=False,
        channel_affine="channel",
    ),
    layer_case(
        layers.BatchChannelNorm2d,
        (12, "auto"),
        (3, 12, 5, 7),
        ("num_groups=6", "statistics=batch", "momentum=0.1"),
        batch_independent=False,
        statistics="batch",
    ),
    layer_case(layers.BatchChannelNorm1d, (12, 3), (3, 12, 7), ("num_groups=3",), batch_independent=False),
    layer_case(
        layers.BatchChannelNorm3d,
        (12,),
        (3, 12, 2, 3, 4),
        ("num_groups=6", "affine=False"),
        batch_independent=False,
        group_size=2,
        affine=False,
    ),
]

SCHEMES: list[SchemeCase] = [
    # With 32 groups of 32 channels the channel part would undo the batch part's scale and shift.
    SchemeCase("bcn:8", synchronized=True),
    SchemeCase("ws+bcn:8", synchronized=True),
]
