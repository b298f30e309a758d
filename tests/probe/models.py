"""Models that probes meet, and whether one is what it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch import probe

PROBES: dict[str, Callable[..., probe.Result]] = {
    name: getattr(probe, name)
    for name in (
        "batch_dependence",
        "split_invariance",
        "tile_consistency",
        "signal_propagation",
        "elimination_singularities",
        "smoothness",
    )
}


def small(norm: Callable[[int], nn.Module], *more: nn.Module) -> nn.Sequential:
    """Two convolutions with norms, for images of 3 channels; it gives maps."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(first, norm(8), nn.ReLU(inplace=True), second, norm(8), *more)


class Centered(nn.Module):
    """Takes the mean over the batch away, in code that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return F.relu(h - h.mean(0, keepdim=True))


class Fails(nn.Module):
    """Fails behind layers that change state and draw, from the n-th call on."""

    def __init__(self, works: int) -> None:
        super().__init__()
        self.body = small(nn.BatchNorm2d, nn.Dropout(0.5))
        self.head = nn.Conv2d(8, 2, 1)
        self.left = [works]

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.body(x))
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RuntimeError("no more")
        return h


def state(model: nn.Module) -> dict[str, Any]:
    """All that a probe may not change, to compare exactly."""
    modules = {
        name: {key: value for key, value in vars(m).items() if not isinstance(value, Tensor)}
        | {key: list(value.items()) for key, value in vars(m).items() if "hooks" in key and isinstance(value, dict)}
        | {"left": list(getattr(m, "left", []))}
        for name, m in model.named_modules()
    }
    for inner in modules.values():
        for key in ("_parameters", "_buffers", "_modules"):
            inner[key] = {name: id(value) for name, value in inner[key].items()}
    tensors = {
        name: (id(t), t.detach().clone(), t.requires_grad, t.grad, None if t.grad is None else t.grad.clone())
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()
    return {"modules": modules, "tensors": tensors, "random": drawn}


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise with what differs."""
    assert after["modules"] == before["modules"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (key, value, asks, grad, grads) in before["tensors"].items():
        key_now, value_now, asks_now, grad_now, grads_now = after["tensors"][name]
        assert (key_now, asks_now) == (key, asks), name
        assert grad_now is grad, name
        assert torch.equal(value_now, value), name
        assert grads is None or torch.equal(grads_now, grads), name
    (torch_state, python, numpy), (torch_now, python_now, numpy_now) = before["random"], after["random"]
    assert torch.equal(torch_now, torch_state)
    assert python_now == python
    assert all(np.array_equal(a, b) for a, b in zip(numpy_now, numpy, strict=True))
