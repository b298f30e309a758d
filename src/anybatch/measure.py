"""What a network costs: multiply-adds, and the memory that training keeps. Needs torch alone."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products in a forward pass over ``x``, in evaluation mode."""
    from torch.utils.flop_counter import FlopCounterMode  # here, since it loads triton

    was_training = model.training
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x)
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, each storage once, parameters left out.

    Args:
        model: Whose parameters are left out.
        forward: Runs the forward pass, loss and all.
    """
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # keeps the storage, and with it its address, until the graph is gone

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def device_name(device: torch.device) -> str:
    """The device as a person would name it; a processor with the widest vectors that torch computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"CPU, {name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
