"""Rows of batch normalization in its forms, and of no normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def statistics(generator: torch.Generator, channels: int, mean: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means and variances near to those of the case's input."""
    noise, spread = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    return (mean + 0.1 * noise).to(dtype), (0.1 * spread).exp().to(dtype)


def _frozen_batch_norm(
    name: str, shape: tuple[int, ...], *, affine: bool = True, wide: bool = False, **more: Any
) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        dtype = torch.float32 if wide else dtype
        mean, var = statistics(generator, shape[1], more.get("mean", 0.0), dtype)
        weights = [torch.randn(shape[1], generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
        return mean, var, *(weights if affine else ())

    return OpCase(f"frozen_batch_norm-{name}", functional.frozen_batch_norm, shape, others, by_channel, **more)


OPS: list[OpCase] = [
    _frozen_batch_norm("odd", (2, 6, 5, 7)),
    _frozen_batch_norm("no_affine", (1, 6, 1, 1), affine=False, options={"eps": 0.1}),
    _frozen_batch_norm("3d", (2, 3, 3, 4, 5), layout="channels_last"),
    _frozen_batch_norm("mean_1000", (2, 64, 9, 9), mean=1000),
    _frozen_batch_norm("channels_last_mean_100", (2, 6, 5, 7), mean=100, layout="channels_last"),
    _frozen_batch_norm("strided", (2, 6, 5, 7), layout="strided"),
]

MIXED_OPS: list[OpCase] = [_frozen_batch_norm("float32_weights_mean_100", (2, 6, 5, 7), wide=True, mean=100)]

LAYERS: list[LayerCase] = [
    layer_case(layers.FrozenBatchNorm, (12,), (3, 12, 5, 7), ("12, eps=0.001",), eps=1e-3),
    layer_case(
        layers.SyncBatchNorm,
        (12,),
        (3, 12, 5, 7),
        ("12, eps=0.001, momentum=0.2, affine=True", "track_running_stats=True", "process_group=None"),
        batch_independent=False,
        eps=1e-3,
        momentum=0.2,
    ),
]

SCHEMES: list[SchemeCase] = [
    SchemeCase("bn", one_position=False),
    SchemeCase("syncbn", one_position=False, synchronized=True),
    SchemeCase("frozenbn"),
    SchemeCase("none"),
]
