"""Rows of Weight Standardization."""

from __future__ import annotations

from typing import Any

from anybatch import functional, layers
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _weight_standardize(name: str, shape: tuple[int, ...], **more: Any) -> OpCase:
    return OpCase(
        f"weight_standardize-{name}",
        functional.weight_standardize,
        shape,
        lambda *_: (),
        lambda w: w.flatten(1),
        activations=False,
        **more,
    )


OPS: list[OpCase] = [
    _weight_standardize("odd", (5, 3, 3, 3)),
    _weight_standardize("eps", (5, 3, 3, 3), options={"eps": 0.1}),
    _weight_standardize("depthwise", (4, 1, 3, 3)),
    _weight_standardize("1x1", (8, 64, 1, 1)),
    _weight_standardize("one_filter", (1, 2, 3, 3)),
    _weight_standardize("linear", (3, 7)),
    _weight_standardize("1d", (4, 16, 3)),
    _weight_standardize("3d", (2, 5, 2, 3, 2)),
    _weight_standardize("mean_100", (5, 3, 3, 3), mean=100),
    _weight_standardize("mean_1000", (8, 64, 1, 1), mean=1000),
    _weight_standardize("channels_last", (5, 3, 3, 3), layout="channels_last"),
    _weight_standardize("channels_last_mean_100", (5, 3, 3, 3), layout="channels_last", mean=100),
    _weight_standardize("strided", (5, 3, 3, 3), layout="strided"),
    _weight_standardize("unbiased", (5, 3, 3, 3), options={"variant": "bcn"}),
    _weight_standardize("paper", (5, 3, 3, 3), options={"variant": "paper"}, layout="channels_last", mean=100),
]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.WSConv1d,
        (6, 4, 3),
        (3, 6, 9),
        ("6, 4", "kernel_size=(3,)", "stride=(2,)", "padding=(1,)", "bias=False", "eps=0.001"),
        stride=2,
        padding=1,
        bias=False,
        eps=1e-3,
    ),
    layer_case(
        layers.WSConv2d,
        (6, 4, 3),
        (3, 6, 7, 5),
        (
            "6, 4",
            "kernel_size=(3, 3)",
            "dilation=(2, 2)",
            "groups=2",
            "padding=(2, 2)",
            "padding_mode=circular",
            "eps=1e-06",
        ),
        dilation=2,
        groups=2,
        padding=2,
        padding_mode="circular",
    ),
    layer_case(layers.WSConv2d, (6, 8, 1), (3, 6, 5, 7), ("kernel_size=(1, 1)", "bias=False"), bias=False),
    layer_case(layers.WSConv2d, (6, 6, 3), (3, 6, 5, 7), ("groups=6", "padding=same"), groups=6, padding="same"),
    layer_case(
        layers.WSConv3d,
        (2, 4, 3),
        (3, 2, 4, 5, 3),
        ("2, 4", "kernel_size=(3, 3, 3)", "stride=(1, 1, 1)", "padding=(1, 1, 1)"),
        padding=1,
    ),
    layer_case(
        layers.WSConvTranspose1d,
        (6, 4, 3),
        (3, 6, 9),
        ("6, 4", "stride=(2,)", "output_padding=(1,)", "eps=1e-05", "variant=paper"),
        stride=2,
        output_padding=1,
        variant="paper",
    ),
    layer_case(
        layers.WSConvTranspose2d, (6, 4, 3), (3, 6, 7, 5), ("groups=2", "eps=1e-06", "variant=default"), groups=2
    ),
    layer_case(layers.WSConvTranspose3d, (2, 4, 3), (3, 2, 4, 5, 3), ("2, 4", "bias=False"), bias=False),
    layer_case(
        layers.WSLinear,
        (6, 4),
        (3, 6),
        ("in_features=6", "out_features=4", "eps=0.01", "variant=aws"),
        eps=1e-2,
        variant="aws",
    ),
]

SCHEMES: list[SchemeCase] = [
    SchemeCase("ws+gn"),
    SchemeCase("ws+bn", one_position=False),
    SchemeCase("ws+ln"),
]
