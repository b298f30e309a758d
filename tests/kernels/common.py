"""What tests of Triton kernels of norms share, in its interpreter or on a GPU where there is one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import Op, backend
from anybatch.kernels import triton_common
from anybatch.kernels.triton_common import INTERPRETED
from anybatch.methods.batch_channel_norm import estimated_batch_channel_norm
from helpers import assert_error_within, empty_is_nan, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="no Triton, or no GPU and TRITON_INTERPRET is not 1",
)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_format(x: Tensor, last: bool) -> Tensor:
    """The same values, with channels last where told and where there is such a format."""
    return x.contiguous(memory_format=_LAST[x.dim()]) if last and x.dim() in _LAST else x.contiguous()


def roundoff(x: Tensor, exact: Tensor) -> float:
    """What two passes over ``x`` in float32 may err in ``exact``, which is rounded to the dtype of ``x``.

    Eight roundings, each multiplied by how much one of the mean counts; what is summed errs as the root of its terms.
    """
    conditioning = 1 + (x.double().mean().abs() / x.double().std()).item() if x.numel() > 1 else 1.0
    size = max(exact.abs().max().item(), (x.numel() / exact.numel()) ** 0.5)
    whole = torch.finfo(x.dtype).eps * exact.abs().max().item() if x.dtype.itemsize < 4 else 0.0
    return whole + 8 * torch.finfo(torch.float32).eps * conditioning * size


Called = tuple[Op, tuple[Any, ...], dict[str, Any]]
"""An op, what it takes behind x, and its options."""


def parameters(channels: int, *names: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(names))
    return tuple(torch.randn(channels, generator=generator, dtype=torch.float64) + 0.5 for _ in names)


def images(shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = False, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
    x += torch.linspace(-1, 1, shape[1], dtype=torch.float64).view(-1, *[1] * (x.dim() - 2))
    return in_format(x.to(dtype).to(DEVICE), last)


def passed(how: str, called: Called, x: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output and all gradients by one backend; parameters in a dtype of their own."""
    op, others, options = called
    leaves = [
        a.to(x.device, dtype or x.dtype).requires_grad_() if isinstance(a, Tensor) else a for a in (x.detach(), *others)
    ]
    leaves[0] = x.detach().requires_grad_()  # in its own memory
    with backend(how):
        y = op(*leaves, **options)
    wanted = [t for t in leaves if isinstance(t, Tensor)]
    found = torch.autograd.grad(y, wanted, g.to(y.dtype))
    return {"output": y.detach(), **{f"gradient {i}": t for i, t in enumerate(found)}}


def assert_errs_little(called: Called, x: Tensor, g: Tensor, parameters: torch.dtype | None = None) -> None:
    with empty_is_nan():
        got = passed("triton", called, x, g, parameters)
    exact, naive = passed("reference", called, x.double(), g.double()), passed("reference", called, x, g, parameters)
    for name, truth in exact.items():
        assert got[name].dtype == naive[name].dtype, name
        assert got[name].shape == truth.shape, name
        allowed = 2 * error(naive[name], truth) + roundoff(x, truth)
        assert_error_within(got[name], truth, allowed, name)
    assert got["output"].stride() == torch.empty_like(x).stride()


def gradient(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Of an output of the shape of ``x``; 0 where ``like``, that output, is near what a threshold would cut."""
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(x)
    return g if like is None else torch.where(like.abs() < 1e-2, 0, g)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other column": lambda x: x[..., ::2],
    "some channels": lambda x: x[:, 2:8:2],
    "turned": lambda x: x.transpose(2, 3),
    "not at 16 bytes": lambda x: x.flatten()[1 : 1 + 12 * 8].view(1, 12, 2, 4),
}


@contextmanager
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched within this context."""
    names: list[str] = []
    launch = triton_common.Plan.__call__

    def counted(plan: triton_common.Plan, *tensors: Tensor | None) -> None:
        names.append(plan.kernel.__name__)
        launch(plan, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(triton_common.Plan, "__call__", counted)
        yield names


def assert_estimates_take_batches_in(
    which: str, rate: float | None, warm_start: bool, format: torch.memory_format
) -> None:
    """A backend against float64: Batch-Channel Norm by estimates over several batches, with both derivatives."""
    generator = torch.Generator().manual_seed(2)
    options = {"rate": rate, "warm_start": warm_start, "activation": "relu"}
    device = DEVICE if which == "triton" else "cpu"
    own = [torch.zeros(6, device=device), torch.ones(6, device=device), torch.tensor(0, device=device)]
    exact = [own[0].double(), own[1].double(), own[2].clone()]
    scales = [torch.randn(size, generator=generator).to(device) for size in (6, 6, 2, 2)]
    for batch in range(4):
        x = torch.randn(3, 6, 5, 7, generator=generator).contiguous(memory_format=format) * 2 + 100 * batch
        x = x.to(device)
        found = []
        for estimates, dtype, how in ((own, torch.float32, which), (exact, torch.float64, "reference")):
            versions = [t._version for t in estimates]
            asked = [t.to(dtype).requires_grad_() for t in (x, *scales)]
            with backend(how):
                y = estimated_batch_channel_norm(asked[0], 2, *estimates, *asked[1:], **options)
            # As autograd must see.
            assert all(t._version > before for t, before in zip(estimates, versions, strict=True))
            (second,) = torch.autograd.grad(y.sin().sum(), asked[0], create_graph=True)
            found.append([y, *torch.autograd.grad(y.square().sum(), asked, retain_graph=True)])
            found[-1].append(torch.autograd.grad(second.square().sum(), asked[0])[0])
        for got, right in zip(*found, strict=True):
            assert_error_within(got, right, 1e-4 * right.abs().max().item())  # |mean| / std is up to 150
        for got, right in zip(own[:2], exact[:2], strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=1e-6)
    assert own[2] == exact[2] == 4
