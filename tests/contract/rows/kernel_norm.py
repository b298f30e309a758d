"""Rows of kernel normalization and of KNConv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch import functional, layers
from anybatch.methods.windows import pad, taps, windows
from contract.kinds import LayerCase, OpCase, SchemeCase, layer_case


def _rows(dims: int, norm_groups: int, *geometry: Any) -> Any:
    """Lays out the values of each unit as a row."""

    def rows(x: Tensor) -> Tensor:
        at = windows(dims, *geometry)
        x = pad(x, at)
        for dim in range(dims):
            x = torch.stack(taps(x, at, dim, dim + 2), -1)
        x = x.unflatten(1, (norm_groups, -1)).movedim(2, dims + 2)  # (N, G, *positions, C / G, *kernel)
        return x.flatten(dims + 2).flatten(0, dims + 1)

    return rows


def _kernel_norm(name: str, shape: tuple[int, ...], out: tuple[int, ...], *geometry: Any, **more: Any) -> OpCase:
    groups = more.get("options", {}).get("norm_groups", 1)
    return OpCase(
        f"kernel_norm-{name}",
        functional.kernel_norm,
        shape,
        lambda *_: geometry,
        _rows(len(shape) - 2, groups, *geometry),
        out_shape=out,
        **more,
    )


def _kn_conv(
    name: str,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    out: tuple[int, ...],
    stride: int = 1,
    padding: Any = 0,
    dilation: int = 1,
    groups: int = 1,
    *,
    norm_groups: int = 1,
    options: dict[str, Any] | None = None,
    weights: torch.dtype | None = None,
    **more: Any,
) -> OpCase:
    filters = (out[1], shape[1] // groups, *kernel)

    def others(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        weight = torch.randn(filters, generator=generator, dtype=torch.float64) + 0.5
        bias = torch.randn(out[1], generator=generator, dtype=torch.float64)
        return weight.to(weights or dtype), bias.to(weights or dtype), stride, padding, dilation, groups

    return OpCase(
        f"kn_conv-{name}",
        functional.kn_conv,
        shape,
        others,
        _rows(len(kernel), norm_groups, kernel, stride, padding, dilation),
        options={"norm_groups": norm_groups, **(options or {})},
        terms=shape[1] // groups * torch.Size(kernel).numel(),
        out_shape=out,
        **more,
    )


OPS: list[OpCase] = [
    _kernel_norm("odd", (2, 6, 5, 7), (2, 6, 9, 12), 3, 2, 1),
    _kernel_norm(
        "1d_groups_dropped",
        (2, 6, 9),
        (2, 6, 18),
        2,
        1,
        "same",
        4,
        options={"norm_groups": 3, "p": 0.25, "seed": torch.tensor(5)},
    ),
    _kernel_norm("3d_expected", (1, 3, 3, 4, 2), (1, 3, 4, 6, 2), 2, 1, options={"p": 0.25}),
    _kernel_norm("mean_100_channels_last", (2, 6, 5, 7), (2, 6, 9, 16), (3, 4), mean=100, layout="channels_last"),
    _kn_conv("odd", (2, 6, 5, 7), (3, 3), (2, 4, 3, 4), 2, 1),
    _kn_conv("1x1_strided_mean_100", (2, 6, 5, 7), (1, 1), (2, 4, 3, 4), 2, mean=100, layout="strided"),
    _kn_conv("groups_mean_100", (2, 8, 5, 7), (3, 2), (2, 12, 3, 6), groups=4, norm_groups=2, mean=100),
    _kn_conv(
        "1d_dropped", (2, 6, 9), (3,), (2, 4, 9), 1, "same", groups=2, options={"p": 0.25, "seed": torch.tensor(5)}
    ),
    _kn_conv("3d_expected", (1, 3, 3, 4, 2), (2, 2, 2), (1, 2, 3, 4, 2), 1, ((1, 0),) * 3, options={"p": 0.25}),
    _kn_conv("channels_last", (2, 6, 5, 7), (3, 3), (2, 4, 5, 7), 1, 1, layout="channels_last"),
    _kn_conv("channels_last_mean_100", (2, 16, 7, 7), (3, 3), (2, 8, 3, 3), 1, 0, 2, mean=100, layout="channels_last"),
]

# As autocast calls it: activations in half precision, parameters in float32.
MIXED_OPS: list[OpCase] = [
    _kn_conv("float32_weights", (2, 6, 5, 7), (3, 3), (2, 4, 5, 7), 1, 1, weights=torch.float32),
    _kn_conv(
        "float32_weights_mean_30_channels_last",
        (2, 6, 5, 7),
        (3, 3),
        (2, 4, 3, 5),
        weights=torch.float32,
        mean=30,
        layout="channels_last",
    ),
]

LAYERS: list[LayerCase] = [
    layer_case(
        layers.KernelNorm1d,
        (3, 2),
        (3, 6, 9),
        ("kernel_size=(3,)", "stride=(2,)", "p=0.0", "eps=1e-05", "eval_stats="),
        p=0.0,
    ),
    layer_case(
        layers.KernelNorm2d,
        ((3, 2),),
        (3, 6, 7, 5),
        ("padding=((1, 0), (0, 2))", "dilation=(2, 1)", "norm_groups=2", "padding_mode=reflect", "eps=0.001"),
        padding=((1, 0), (0, 2)),
        dilation=(2, 1),
        norm_groups=2,
        padding_mode="reflect",
        eps=1e-3,
        p=0.0,
    ),
    layer_case(
        layers.KernelNorm3d, (2,), (3, 2, 4, 5, 3), ("kernel_size=(2, 2, 2)", "padding=(1, 1, 1)"), p=0.0, padding=1
    ),
    layer_case(
        layers.KNConv1d,
        (6, 4, 3),
        (3, 6, 9),
        ("6, 4", "kernel_size=(3,)", "stride=(2,)", "bias=False", "p=0.0", "eval_stats=", "eps=0.001"),
        stride=2,
        padding=1,
        bias=False,
        p=0.0,
        eps=1e-3,
    ),
    layer_case(
        layers.KNConv2d,
        (8, 4, 3),
        (3, 8, 7, 5),
        ("dilation=(2, 2)", "groups=4", "padding=same", "padding_mode=circular", "norm_groups=2"),
        dilation=2,
        groups=4,
        padding="same",
        padding_mode="circular",
        norm_groups=2,
        p=0.0,
    ),
    layer_case(layers.KNConv2d, (6, 8, 1), (3, 6, 5, 7), ("kernel_size=(1, 1)", "stride=(2, 2)"), stride=2, p=0.0),
    layer_case(
        layers.KNConv3d,
        (2, 4, (3, 2, 2)),
        (3, 2, 4, 5, 3),
        ("2, 4", "kernel_size=(3, 2, 2)", "padding=((1, 1), (0, 1), (1, 0))"),
        padding=((1, 1), (0, 1), (1, 0)),
        p=0.0,
    ),
]

SCHEMES: list[SchemeCase] = [SchemeCase("kn(p=0)"), SchemeCase("kn", drops=True)]
