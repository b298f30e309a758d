"""Rows of the scaled activation."""

from __future__ import annotations

from typing import Any

from torch import nn

from anybatch import layers
from contract.kinds import LayerCase


def _scaled(act: str, shape: tuple[int, ...], shown: tuple[str, ...], **arguments: Any) -> LayerCase:
    def make(**_: Any) -> nn.Module:  # it has no parameters that a device or dtype could reach
        return layers.ScaledActivation(act, **arguments)

    return LayerCase(make, shape, shown, f"ScaledActivation-{act}")


LAYERS: list[LayerCase] = [
    _scaled("relu", (3, 6, 5, 4), ("gain=1.712858550", "ReLU()")),
    _scaled("gelu_tanh", (3, 6, 5), ("gain=3.5", "GELU(approximate='tanh')"), gain=3.5),
]
