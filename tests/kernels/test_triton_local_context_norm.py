"""Local context normalization's Triton kernels against its reference in float64, interpreted or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch.dispatch import backend, explain
from anybatch.functional import group_norm, local_context_norm
from helpers import saved_tensors
from kernels.common import (
    DEVICE,
    VIEWS,
    Called,
    assert_errs_little,
    gradient,
    images,
    launched,
    needs_triton,
    parameters,
    passed,
)

pytestmark = needs_triton

Window = int | tuple[int, ...]

CASES: dict[str, tuple[tuple[int, ...], Window, int]] = {
    "odd": ((2, 6, 5, 7), 3, 2),
    "three channels a group": ((1, 12, 5, 7), (3, 4), 3),
    "one channel a group": ((1, 5, 6, 5), 3, 1),
    "one group": ((1, 6, 5, 7), 3, 6),
    "more channels a group than a program sees of two": ((1, 1030, 2, 3), 2, 515),
    "even windows": ((1, 4, 6, 9), (2, 6), 2),
    "almost whole": ((1, 4, 6, 9), (5, 8), 2),
    "one position along a dimension": ((1, 4, 5, 7), (1, 3), 2),
    "one position along the other": ((1, 4, 5, 7), (3, 1), 2),
    "one position along both": ((1, 6, 3, 4), 1, 3),
    "larger than a dimension": ((1, 4, 5, 7), (9, 3), 2),
    "larger than the other": ((1, 4, 5, 7), (3, 9), 2),
    "larger than the map": ((2, 4, 5, 7), 9, 2),
    "several chunks": ((1, 2, 37, 35), (5, 7), 2),
    "several chunks of windows of more than a chunk": ((1, 2, 53, 4), (37, 3), 2),
    "many groups and positions": ((1, 40, 3, 70), (2, 3), 1),
    "one row": ((1, 4, 1, 9), 3, 2),
    "one column": ((1, 4, 9, 1), 3, 2),
    "1d": ((2, 4, 33), 5, 2),
    "1d and one channel": ((1, 1, 20), 4, 1),
    "3d": ((2, 4, 3, 4, 5), (3, 2, 3), 2),
    "4d": ((1, 2, 2, 3, 3, 2), 2, 2),
}


def local(x: Tensor, window: Window = 3, each: int = 2, *, affine: bool = True, **options: Any) -> Called:
    return local_context_norm, (window, each, *(parameters(x.shape[1], "weight", "bias") if affine else ())), options


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_all_it_gives_is_right(case: str, last: bool) -> None:
    shape, window, each = CASES[case]
    if last and not 4 <= len(shape) <= 5:
        pytest.skip("has no channels_last")
    x = images(shape, torch.float32, last=last)
    assert "runs" in explain(local_context_norm, x, window, each)["triton"]
    # Where a window holds few values one may hardly vary, through which a rounding passes enlarged.
    assert_errs_little(local(x, window, each, eps=0.1), x, gradient(x))


@pytest.mark.parametrize("given", ["none", "weight", "bias"])
def test_parameters_that_are_left_out(given: str) -> None:
    x = images((2, 6, 5, 7), torch.float32)
    weight, bias = parameters(6, "weight", "bias")
    others = (weight if given == "weight" else None, bias if given == "bias" else None)
    assert_errs_little((local_context_norm, (3, 2, *others), {"eps": 1e-2}), x, gradient(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("window", [3, 9])
def test_half_precision_with_parameters_in_float32(window: int, dtype: torch.dtype, last: bool) -> None:
    x = images((2, 6, 5, 7), dtype, last=last)
    assert_errs_little(local(x, window), x, gradient(x), torch.float32)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("window", [(3, 4), (20, 3), 40])
def test_large_means(window: Window, mean: float, last: bool) -> None:
    x = images((1, 6, 21, 9), torch.float32, last=last, mean=mean)
    assert_errs_little(local(x, window, 3), x, gradient(x))
