"""Rows of Scaled Weight Standardization."""

from __future__ import annotations

from typing import Any

import torch

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _scaled(name: str, shape: tuple[int, ...], *, gain: bool = True, **more: Any) -> OpCase:
    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.randn(shape[0], generator=generator, dtype=torch.float64).to(dtype),) if gain else ()

    return OpCase(
        f"scaled_weight_standardize-{name}",
        functional.scaled_weight_standardize,
        shape,
        others,
        lambda w: w.flatten(1),
        activations=False,
        **more,
    )


OPS: list[OpCase] = [
    _scaled("odd", (5, 3, 3, 3)),
    _scaled("no_gain", (5, 3, 3, 3), gain=False),
    _scaled("add", (5, 3, 3, 3), options={"eps": 0.1, "eps_rule": "add"}),
    _scaled("floored", (5, 3, 3, 3), options={"eps": 1000.0}),
    _scaled("linear", (3, 7)),
    _scaled("mean_1000", (8, 64, 1, 1), mean=1000),
    _scaled("channels_last", (5, 3, 3, 3), layout="channels_last", mean=100),
    _scaled("strided", (5, 3, 3, 3), layout="strided"),
]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.ScaledWSConv1d,
        (6, 4, 3),
        (3, 6, 9),
        ("6, 4", "kernel_size=(3,)", "stride=(2,)", "bias=False", "gamma=1.7", "eps=0.0001", "eps_rule=max"),
        stride=2,
        bias=False,
        gamma=1.7,
    ),
    layer_case(
        layers.ScaledWSConv2d,
        (6, 4, 3),
        (3, 6, 7, 5),
        ("groups=2", "padding=same", "gamma=1.0", "eps=0.01", "eps_rule=add"),
        groups=2,
        padding="same",
        eps=1e-2,
        eps_rule="add",
    ),
    layer_case(layers.ScaledWSConv2d, (6, 4, 3), (3, 6, 7, 5), ("6, 4", "affine=True"), affine=True),
    layer_case(layers.ScaledWSConv3d, (2, 4, 3), (3, 2, 4, 5, 3), ("2, 4", "padding=(1, 1, 1)"), padding=1),
    layer_case(
        layers.ScaledWSLinear,
        (6, 4),
        (3, 6),
        ("in_features=6", "out_features=4", "gamma=0.5", "eps=0.0001", "eps_rule=max"),
        gamma=0.5,
    ),
]

SCHEMES: list[SchemeCase] = [SchemeCase("sws")]
