"""Rows of squeeze-excite."""

from __future__ import annotations

from torch import nn

from anybatch import layers
from contract.kinds import LayerCase, layer_case

LAYERS: list[LayerCase] = [
    layer_case(layers.SqueezeExcite, (6,), (3, 6, 5, 7), ("6, ratio=0.5, gain=2.0", "out_features=3", "ReLU()")),
    layer_case(
        layers.SqueezeExcite, (8,), (3, 8, 4, 3, 2), ("ratio=0.25", "gain=1.5", "SiLU()"),
        ratio=0.25, gain=1.5, act=nn.SiLU,
    ),
]  # fmt: skip
