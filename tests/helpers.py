"""Assertions that raise with the worst element, switches that restore on exit, and work shared by two processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
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


@contextmanager
def fenced_saved_tensors() -> Iterator[None]:
    """Within this context backward gets copies of what autograd keeps, as offloading gives, with NaN all around."""

    def fenced(t: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        if t.numel() == 0 or not t.is_floating_point():
            return t.clone()
        return t.new_full((span + 8192,), torch.nan).as_strided(t.shape, t.stride(), 4096).copy_(t)

    with torch.autograd.graph.saved_tensors_hooks(fenced, lambda t: t):
        yield


def run_two_ranks(worker: Path, folder: Path) -> None:
    """Run ``python worker RANK FOLDER`` as rank 0 and as rank 1, and raise with what both said where one fails."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(worker), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    if codes != [0, 0]:
        raise AssertionError(f"ranks of {worker.name} ended with {codes}:\n" + "\n".join(map("".join, said)))


@contextmanager
def one_of_two_ranks(rank: int, folder: Path) -> Iterator[None]:
    """Within this context a process that `run_two_ranks` started reaches the other one over gloo."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=90))
    yield
    dist.barrier()  # only behind work that is done: a rank that fails ends at once, and the launcher tells why
    dist.destroy_process_group()
