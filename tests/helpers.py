"""Assertions that raise with the worst element, and switches that restore on exit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def error(got: Tensor, exact: Tensor) -> float:
    """The largest absolute error; NaN counts as infinite."""
    difference = (got.detach().double() - exact.detach().double()).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return difference.max().item() if difference.numel() else 0.0


def assert_error_within(got: Tensor, exact: Tensor, allowed: float, what: str = "result") -> None:
    """Raise with the worst element where the largest absolute error is above ``allowed``."""
    if got.shape != exact.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    if error(got, exact) <= allowed:
        return
    worst = (got.detach().double() - exact.detach().double()).abs().nan_to_num(nan=torch.inf).argmax()
    place = tuple(int(i) for i in torch.unravel_index(worst, got.shape))
    raise AssertionError(
        f"{what}: error {error(got, exact):.3g} at {place}, allowed {allowed:.3g}; "
        f"got {got[place].item():.9g}, exact {exact[place].item():.9g}"
    )


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float) -> None:
    """Each parameter's gradient within ``relative`` of its own largest entry."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        if size == 0:
            raise AssertionError(f"the gradient of {name} is 0, so that comparing it shows nothing")
        assert_error_within(got[name], gradient, relative * size, f"gradient of {name}")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter's gradient."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """Within this context ``torch.empty`` holds NaN, so that an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for backward within this context."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
