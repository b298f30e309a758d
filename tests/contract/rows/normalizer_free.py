"""Rows of the normalizer-free methods: residual rules, stochastic depth, Fixup, clipping."""

from __future__ import annotations

from typing import Any

from torch import nn

from anybatch import layers
from contract.kinds import LayerCase, SchemeCase, layer_case


def _dropping(**_: Any) -> nn.Module:  # without parameters, so without device and dtype
    return layers.StochasticDepth(0.25, scale_by_keep=True).eval()


LAYERS: list[LayerCase] = [
    # It draws in training, so evaluation is compared.
    LayerCase(_dropping, (3, 4, 5, 7), ("p=0.25", "scale_by_keep=True"), "StochasticDepth", batch_independent=False),
    layer_case(layers.FixupConv1d, (6, 4, 3), (3, 6, 9), ("6, 4", "stride=(2,)"), stride=2),
    layer_case(
        layers.FixupConv2d, (6, 4, 3), (3, 6, 7, 5), ("6, 4", "groups=2", "padding=(2, 2)"), groups=2, padding=2
    ),
    layer_case(layers.FixupConv3d, (2, 4, 3), (3, 2, 4, 5, 3), ("2, 4", "bias=False"), bias=False),
]

SCHEMES: list[SchemeCase] = [
    SchemeCase("nf", model="preact_resnet8"),
    SchemeCase("nf+agc"),
    SchemeCase("nf", drops=True, options={"width": 32, "num_classes": 5, "drop_path_rate": 0.25}),
    SchemeCase("skipinit"),
    SchemeCase("fixup"),
]
