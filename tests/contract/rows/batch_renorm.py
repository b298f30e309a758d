"""Rows of Batch Renormalization."""

from __future__ import annotations

from typing import Any

import torch

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case
from contract.rows.batch_norm import by_channel, statistics


def _batch_renorm(name: str, shape: tuple[int, ...], *, affine: bool = True, wide: bool = False, **more: Any) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        dtype = torch.float32 if wide else dtype
        d, r = statistics(generator, shape[1], 0.0, dtype)
        weights = [torch.randn(shape[1], generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
        return r, d, *(weights if affine else ())

    return OpCase(f"batch_renorm-{name}", functional.batch_renorm, shape, others, by_channel, **more)


OPS: list[OpCase] = [
    _batch_renorm("odd", (2, 6, 5, 7)),
    _batch_renorm("no_affine", (3, 6), affine=False, options={"eps": 0.1}),
    _batch_renorm("3d", (2, 3, 3, 4, 5), layout="channels_last"),
    _batch_renorm("mean_1000", (2, 64, 9, 9), mean=1000),
    _batch_renorm("channels_last_mean_100", (2, 6, 5, 7), mean=100, layout="channels_last"),
]

MIXED_OPS: list[OpCase] = [_batch_renorm("float32_weights_mean_100", (2, 6, 5, 7), wide=True, mean=100)]

LAYERS: list[LayerCase] = [
    layer_case(layers.BatchRenorm1d, (12,), (3, 12, 7), ("affine=False",), batch_independent=False, affine=False),
    layer_case(
        layers.BatchRenorm2d,
        (12,),
        (3, 12, 5, 7),
        ("12, eps=0.001, momentum=0.02, affine=True", "r_max=2.0", "d_max=1.5", "start=1", "r_end=3", "d_end=2"),
        batch_independent=False,
        eps=1e-3,
        momentum=0.02,
        r_max=2.0,
        d_max=1.5,
        start=1,
        r_end=3,
        d_end=2,
    ),
    layer_case(layers.BatchRenorm3d, (12,), (3, 12, 2, 3, 4), ("r_max=3.0",), batch_independent=False),
]

SCHEMES: list[SchemeCase] = [SchemeCase("brn", one_position=False)]
